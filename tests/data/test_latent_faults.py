"""Latents that are damaged, of another shape or of other settings."""

import logging
import re

import pytest
import torch

from acetate.data.datamodule import BadDataError
from acetate.data.latent_shards import EMPTY_PROMPT, index_latents
from acetate.data.shards import MANIFEST, ShardError, read_manifest
from acetate.replacing import write_json
from tests.data.written_latents import (
    TRAIN,
    WIDE,
    first,
    folder,  # noqa: F401
    module,
    ready,
    write,
)


def break_sample(folder, key):
    manifest = read_manifest(folder, "latents")
    found = next(ref for ref in index_latents(folder, manifest) if ref.key == key)
    with open(found.tar, "r+b") as file:
        file.seek(found.media[0] + found.media[1] - 4)
        file.write(b"\1\2\3\4")


def test_bad_sample_leaves_its_batch_within_the_budget(tmp_path, caplog):
    write(tmp_path, variants=1)
    break_sample(tmp_path, "c-w000-v0")
    data = ready(tmp_path, bad_clip_budget=1)
    with caplog.at_level(logging.WARNING):
        batches = first(data.train_dataloader(), 21)
        assert "1 of 3 buckets have fewer windows than the 2 of a batch" in caplog.text
        caplog.clear()
        for batch in batches:
            data.on_before_batch_transfer(batch, 0)
    assert sum(bool(batch["skipped"]) for batch in batches) > 1
    # once
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "skipped clip c-w000-v0"
    ]
    strict = ready(tmp_path)
    with pytest.raises(
        BadDataError,
        match=r"1 bad clips, bad_clip_budget=0: c-w000-v0: .*CRC.*raise bad_clip_budget",
    ):
        for batch in batches:
            strict.on_before_batch_transfer(batch, 0)


def test_a_batch_without_a_good_sample_is_a_blank(tmp_path):
    write(tmp_path, variants=1)
    for clip in TRAIN:
        break_sample(tmp_path, f"{clip}-w000-v0")
    data = ready(tmp_path, bad_clip_budget=100)
    batches = iter(data.train_dataloader())
    blank = data.on_before_batch_transfer(next(batches), 0)
    assert (
        blank["key"] == [""]
        and blank["latents"].shape == (1, 4, *WIDE)
        and blank["ellipses"].shape == (1, 2, 5)
    )
    assert blank["context"].shape == blank["null_context"].shape == (1, 6, 8)
    with pytest.raises(BadDataError, match=r"none of 7 clips is usable"):
        for batch in batches:
            data.on_before_batch_transfer(batch, 0)


@pytest.mark.parametrize("name", ["latents", "ellipse"])
@pytest.mark.parametrize(("change", "reason"), [("nan", "not finite"), ("shape", "promised")])
def test_wrong_tensors_are_bad(tmp_path, name, change, reason):
    def spoil(clip, tensors):
        wrong = (
            torch.full_like(tensors[name], float("nan"))
            if change == "nan"
            else tensors[name][..., :1].contiguous()
        )
        return tensors | {name: wrong}

    (batch,) = first(ready(write(tmp_path, spoil=spoil)).train_dataloader(), 1)
    assert len(batch["skipped"]) == 2 and reason in batch["skipped"][0]


def test_lost_tar_is_counted_at_setup(tmp_path):
    write(tmp_path)
    (tmp_path / "latents-000001.tar").unlink()
    with pytest.raises(BadDataError, match=r"18 bad clips.*not in .*latents-000001\.tar"):
        ready(tmp_path)


def test_setup_errors(tmp_path, shards):
    with pytest.raises(ShardError, match=r"does not exist.*prep cache_latents"):
        ready(tmp_path / "none")
    with pytest.raises(ShardError, match=r"holds no finished shards.*prep cache_latents"):
        ready(tmp_path)
    with pytest.raises(ShardError, match=r"holds clips; needed: latents.*prep cache_latents"):
        ready(shards)
    write(tmp_path / "train", {"a": ("train", WIDE)})
    with pytest.raises(ShardError, match=r"none of 3 samples is in split 'val'\. Add clips"):
        ready(tmp_path / "train")
    write(tmp_path / "val", {"a": ("val", WIDE)})
    with pytest.raises(ShardError, match=r"none of 3 samples is in split 'train'"):
        ready(tmp_path / "val")
    (write(tmp_path / "no_prompt") / EMPTY_PROMPT).unlink()
    with pytest.raises(ShardError, match=r"empty_prompt\.safetensors cannot be read"):
        ready(tmp_path / "no_prompt")


def test_schema_is_checked(tmp_path):
    manifest = read_manifest(write(tmp_path), "latents")
    write_json(tmp_path / MANIFEST, manifest | {"schema": 99})
    with pytest.raises(ShardError, match="schema 99; this version reads schema 1"):
        ready(tmp_path)


def test_longer_prompt_than_the_model_reads(tmp_path):
    write(tmp_path, tokens={"d": 6})
    with pytest.raises(
        ValueError, match=r"d-w000-v0: a prompt of 6 tokens; prompt_length=5.*made for 6"
    ):
        ready(tmp_path, prompt_length=5)


@pytest.mark.parametrize(
    ("name", "bad"), [("batch_size", 0), ("val_clips", 0), ("bad_clip_budget", -1)]
)
def test_settings_are_checked(folder, name, bad):
    with pytest.raises(ValueError, match=f"{name}={bad}; must be at least"):
        module(folder, **{name: bad})


def recast(name, dtype):
    return lambda tensors: {**tensors, name: tensors[name].to(dtype)}


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda t: {**t, "latents": torch.zeros(8, *t["latents"].shape[1:])}, r"latents \(8, "),
        (lambda t: {**t, "latents": torch.zeros(4, 9, 9)}, r"latents \(4, 9, 9\); promised \(4, "),
        (lambda t: {**t, "prompt_embeds": torch.zeros(3, 9)}, r"prompt_embeds \(3, 9\); promised"),
        (lambda t: {**t, "prompt_embeds": torch.zeros(90, 8)}, r"prompt_embeds \(90, 8\); promi"),
        (lambda t: {**t, "ellipse": t["ellipse"].double() * 1e300}, "ellipse: values that are not"),
        (lambda t: {**t, "latents": t["latents"] * float("nan")}, "latents: values that are not"),
        (lambda t: {"latents": t["latents"]}, "KeyError: 'prompt_embeds'"),
        *((recast("latents", dtype), f"latents of {dtype}; needed: a float of 16") for dtype in (
            torch.bool, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn)),
    ],
)  # fmt: skip
def test_what_a_sample_may_hold(tmp_path, spoil, reason):
    """Each is the fault of its clip, which leaves the batch."""
    spoilt = lambda clip, tensors: spoil(tensors) if clip == "c" else tensors  # noqa: E731
    data = ready(write(tmp_path, variants=1, spoil=spoilt), bad_clip_budget=1)
    batches = first(data.train_dataloader(), 7)
    (said,) = {text for batch in batches for text in batch["skipped"]}
    assert re.search(rf"^c-w000-v0: latents-\d+\.tar:c-w000-v0\.safetensors: .*{reason}", said)
    assert {clip for batch in batches for clip in batch["clip"]} == set(TRAIN) - {"c"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"base_sha256": None}, "base_sha256 is missing: must be text"),
        ({"vae_sha256": 3}, "vae_sha256=3: must be text"),
        ({"prompt_length": "6"}, "prompt_length='6': must be a whole number"),
        ({"geometry": {"channels": 4}}, "geometry.time_stride is missing"),
        ({"made_by": {"settings": {"vae_sha256": "x"}}}, "vae_sha256='abc': must be that of made"),
    ],
)
def test_manifest_of_latents_is_held_to_its_schema(folder, tmp_path, change, said):
    manifest = read_manifest(folder, "latents") | change
    kept = {name: value for name, value in manifest.items() if value is not None}
    write_json(tmp_path / MANIFEST, kept)
    with pytest.raises(ShardError, match=rf"{tmp_path}/manifest\.json: {said}"):
        read_manifest(tmp_path, "latents")


@pytest.mark.parametrize(
    "name, value",
    [("tokens", "18"), ("tokens", -1), ("shape", [2, 2]), ("shape", [0, 2, 2]), ("clip", "../x"),
     ("shape", [2**16, 2**16, 2]), ("variant", 1.5), ("split", "test"), ("crc32", True)],
)  # fmt: skip
def test_entry_of_a_latent_is_held_to_its_schema(folder, tmp_path, name, value):
    manifest = read_manifest(folder, "latents")
    manifest["shards"][1]["samples"][2][name] = value
    write_json(tmp_path / MANIFEST, manifest)
    with pytest.raises(ShardError, match=r"manifest\.json: shards\[1\]\.samples\[2\]") as error:
        module(tmp_path).setup()
    assert name in str(error.value) or "pixels" in str(error.value)
