"""Clips, prompts, settings and disks that caching cannot use."""

import json
from dataclasses import replace

import numpy as np
import pytest

from acetate.data.latent_shards import index_latents, read_latents
from acetate.data.shards import (
    MANIFEST,
    ShardError,
    index_shards,
)
from acetate.data.writer import ShardWriter, encode_clip
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.models.rgba_vae import RGBAVAE
from data_prep.bad_clips import TooManyBad
from tests.data_prep.cached_latents import (  # noqa: F401
    CLIPS,
    adapters,
    cached,
    clip,
    clips,
    make,
    manifest_of,
    sources,
    write,
)


def break_clip(folder, name):
    ref = next(ref for ref in index_shards([folder]) if ref.key == name)
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + ref.media[1] // 2)
        file.write(b"\0" * 20)


def test_other_settings_are_refused(make, cached, tmp_path):
    with pytest.raises(
        ShardError,
        match=r"made with other settings: seed: 0 there, 1 now\. Name another folder "
        r".*replace=true",
    ):
        make(cached, seed=1)
    make(tmp_path / "l")
    (tmp_path / "l" / MANIFEST).unlink()  # unfinished
    with pytest.raises(
        ShardError, match='dtype: "float16" there, "bfloat16" now; variants: 2 there, 3 now'
    ):
        make(tmp_path / "l", variants=3, dtype="bfloat16")


def test_bad_clips_and_their_budget(make, tmp_path, caplog):
    broken = write(tmp_path / "s")
    break_clip(broken, "tall")
    break_clip(broken, "short")
    with pytest.raises(TooManyBad, match=r"2 bad clips, bad_clip_budget=1: short: .*CRC.*tall: "):
        make(tmp_path / "l", shards=broken, bad_clip_budget=1)
    assert not (tmp_path / "l" / MANIFEST).exists()
    caplog.clear()
    manifest = make(tmp_path / "l", shards=broken, bad_clip_budget=2)  # goes on
    assert list(manifest["skipped"]) == ["short", "tall"] and "CRC" in manifest["skipped"]["tall"]
    assert (manifest["clips"], manifest["samples"]) == (2, 6)
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        "skipped clip short",
        "skipped clip tall",
    ]


def test_values_that_are_not_finite_are_bad(make, tmp_path, monkeypatch):
    real = RGBAVAE.normalise
    seen = []

    def overflow(self, raw):  # in the second sample
        seen.append(raw)
        return real(self, raw) * (1e9 if len(seen) == 2 else 1)

    monkeypatch.setattr(RGBAVAE, "normalise", overflow)
    manifest = make(tmp_path / "l", bad_clip_budget=1)
    assert manifest["skipped"] == {"long": "window 0, variant 1: latents are not finite in float16"}
    assert manifest["samples"] == 9 and manifest["clips"] == 4


def test_all_prompts_that_are_too_long_are_named_at_once(make, sources, tmp_path, caplog):
    shards = write(
        tmp_path / "s",
        {"short": "a red disc " * 20, "still": "a red disc " * 20, "tall": "a disc " * 20},
    )
    with pytest.raises(
        ValueError, match=r"3 clips .* than the 16 .*: short \(\d+\), still \(\d+\), tall \(\d+\)\."
    ):
        make(tmp_path / "l", shards=shards)
    assert not list((tmp_path / "l").glob("*.tar"))
    make(tmp_path / "l2", shards=shards, sources=replace(sources, long_prompts="truncate"))
    assert "3 clips have prompts of more tokens than the 16" in caplog.text
    refs = {ref.key: ref for ref in index_latents(tmp_path / "l2", manifest_of(tmp_path / "l2"))}
    sample = read_latents(refs["short-w000-v0"])
    assert refs["short-w000-v0"].tokens == len(sample["prompt_embeds"]) == 16
    assert sample["prompt"] == "a red disc " * 20  # whole: only what the DiT reads is cut


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_no_readable_clip_leaves_no_folder(make, tmp_path, workers):
    broken = write(tmp_path / "s")
    for name in CLIPS:
        break_clip(broken, name)
    with pytest.raises(ShardError, match=r"no latents could be made of the clips \(long: .*CRC"):
        make(tmp_path / "l", shards=broken, bad_clip_budget=9, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_full_disk_is_named(make, tmp_path, small_disk):
    noise = np.random.default_rng(0).integers(0, 256, (5, 160, 160, 4), dtype=np.uint8)
    with ShardWriter(tmp_path / "s", max_clips=100, max_bytes=10**9, made_by={}) as writer:
        for i in range(2):
            writer.add(f"clip{i}", encode_clip(noise[:1, :64, :64], 8), split="train",
                prompt="noise", source="",
                       licence="", lossy=False, premultiplied_source=False)  # fmt: skip
    with pytest.raises(
        OSError, match=r"latents-000000\.tar could not be written \(.*\); [\d,]+ MiB are"
    ):
        make(tmp_path / "l", shards=tmp_path / "s", variants=8, area=320 * 320, per_tar=64)
    assert not list((tmp_path / "l").glob("latents-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": (6,)}, r"frames: 6 frames; Wan needs 4k\+1 .*Use frames=5"),
        (
            {"area": 1e12},
            r"area=1e\+12 is [\d,]+ times a side of the largest clip, long \(40x40\); at most 32 "
            r"times",
        ),
        (
            {"sizes": ((1280, 1280),), "allow_empty_buckets": True},
            r"5x1280x1280 .*enlarges short \(60x20\) 64 times",
        ),
        (
            {"frames": (2**21 + 1,)},
            r"bucket 2097153x32x32 .* megapixels over its frames; at most 537",
        ),
        ({"sizes": ((24, 32),)}, r"sizes: height=24; sides are multiples of 16"),
        ({"space_multiple": 12}, r"space_multiple=12; sides are multiples of 8"),
        ({"area": 100}, r"area=100, .*no bucket in multiples of 16\. Raise area to 256"),
        (
            {"sizes": ((16, 64), (32, 32), (32, 48))},
            r"bucket without clips: 5x32x48 .*allow_empty_buckets=true",
        ),
    ],
)
def test_settings_are_checked(make, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "l", **settings)
    assert not (tmp_path / "l").exists()


def test_unusable_shards(make, tmp_path):
    with pytest.raises(ShardError, match=r"holds no finished shards"):
        make(tmp_path / "l", shards=tmp_path)
    write(tmp_path / "empty")
    text = (tmp_path / "empty" / MANIFEST).read_text()
    (tmp_path / "empty" / MANIFEST).write_text(
        json.dumps({**json.loads(text), "clips": 0, "shards": []})
    )
    with pytest.raises(ShardError, match="holds 0 clips"):
        make(tmp_path / "l", shards=tmp_path / "empty")


def test_shards_without_a_readable_clip_leave_nothing(make, tmp_path):
    write(tmp_path / "empty")
    for tar in (tmp_path / "empty").glob("*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(ShardError, match=r"no latents could be made of the clips \(.*empty file"):
        make(tmp_path / "l", shards=tmp_path / "empty", bad_clip_budget=100)
    assert not (tmp_path / "l").exists()


def test_other_base_is_refused(make, sources, make_vae, tmp_path):
    make_vae("wan21", seed=5).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="was trained on another base VAE"):
        make(tmp_path / "l", sources=replace(sources, vae=str(tmp_path)))
    assert load_rgba_vae(vae=sources.vae, adapters=sources.rgba_vae).latents_sha256()
