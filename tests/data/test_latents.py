import logging
import re
from zlib import crc32

import lightning
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save, save_file

from acetate.data import latents
from acetate.data.datamodule import BadDataError
from acetate.data.latent_shards import EMPTY_PROMPT, index_latents, read_latents
from acetate.data.latents import BucketBatches, LatentDataModule
from acetate.data.order import BucketWalk, ClipOrder
from acetate.data.shards import MANIFEST, SCHEMA, ShardError, read_manifest
from acetate.data.writer import ShardTar
from acetate.replacing import write_json

SETTINGS = {
    "batch_size": 2, "seed": 0, "num_workers": 0, "val_batch_size": 2, "val_clips": 100,
    "prompt_length": 6,
    "bad_clip_budget": 0,
}  # fmt: skip
WIDE, TALL, LONG = (2, 2, 4), (2, 4, 2), (3, 2, 2)
TRAIN = {"a": WIDE, "b": TALL, "c": WIDE, "d": LONG, "e": WIDE, "f": TALL, "g": WIDE}
VAL = {"v": WIDE, "w": WIDE, "x": TALL, "y": WIDE, "z": LONG}
VARIANTS = 3


def value(clip, variant):
    return float(ord(clip[0]) + variant / 8)  # exact in half precision


def write(
    out, clips=None, variants=VARIANTS, tokens=None, spoil=lambda clip, tensors: tensors, tars=2
):
    """Latent shards whose values tell clip and variant."""
    out.mkdir(parents=True, exist_ok=True)
    clips = (
        {**{c: ("train", s) for c, s in TRAIN.items()}, **{c: ("val", s) for c, s in VAL.items()}}
        if clips is None
        else clips
    )
    shards = []
    for number in range(tars):
        mine = sorted(clips)[number::tars]
        samples = []
        path = out / f"latents-{number:06d}.tar"
        with ShardTar(path, path.with_suffix(".tar.tmp")) as tar:
            for clip in mine:
                split, shape = clips[clip]
                count = (tokens or {}).get(clip, 3)
                for variant in range(variants):
                    tensors = {
                        "latents": torch.full(
                            (4, *shape), value(clip, variant), dtype=torch.float16
                        ),
                        "ellipse": torch.full((shape[0], 5), value(clip, 0)),
                        "prompt_embeds": torch.full(
                            (count, 8), value(clip, 0), dtype=torch.float16
                        ),
                        "prompt_mask": torch.ones(count, dtype=torch.bool),
                    }
                    data = save(spoil(clip, tensors))
                    key = f"{clip}-w000-v{variant}"
                    meta = b'{"prompt": "prompt of %s"}' % clip.encode()
                    tar.write({"__key__": key, "safetensors": data, "json": meta})
                    samples.append({"key": key, "clip": clip, "variant": variant, "split": split,
                        "shape": list(shape),
                                    "tokens": count, "crc32": crc32(data)})  # fmt: skip
            shards.append({**tar.finish(), "samples": samples})
    save_file({"embeds": torch.ones(1, 8, dtype=torch.float16)}, out / EMPTY_PROMPT)
    write_json(out / MANIFEST, {"schema": SCHEMA, "kind": "latents", "vae_sha256": "abc",
        "base_sha256": "b", "text_encoder_sha256": "t", "prompt_length": 6, "ellipse": {},
                                "geometry": {"channels": 4, "time_stride": 4, "space_stride": 4},
                                "shards": shards})  # fmt: skip
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents"))


def module(folder, **settings):
    return LatentDataModule(latents=str(folder), **(SETTINGS | settings))


def ready(folder, **settings):
    data = module(folder, **settings)
    data.setup()
    return data


def ready_of(folders):
    data = LatentDataModule(latents=[str(folder) for folder in folders], **SETTINGS)
    data.setup()
    return data


def first(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def break_sample(folder, key):
    manifest = read_manifest(folder, "latents")
    found = next(ref for ref in index_latents(folder, manifest) if ref.key == key)
    with open(found.tar, "r+b") as file:
        file.seek(found.media[0] + found.media[1] - 4)
        file.write(b"\1\2\3\4")


def test_batch(folder):
    data = ready(folder)
    assert data.manifest["vae_sha256"] == data.vae_sha256 == "abc"
    for batch in first(data.train_dataloader(), 6):
        shape = batch["latents"].shape[2:]
        assert all(TRAIN[clip] == shape for clip in batch["clip"])  # of one bucket
        assert batch["latents"].shape[:2] == (2, 4) and batch["ellipses"].shape == (2, shape[0], 5)
        assert batch["context"].shape == (2, 6, 8) and batch["null_context"].shape == (1, 6, 8)
        assert batch["context"][:, 3:].abs().max() == 0 and batch["null_context"][
            0, :, 0
        ].tolist() == [
            1,
            0,
            0,
            0,
            0,
            0,
        ]
        tensors = [batch[name] for name in ("latents", "ellipses", "context", "null_context")]
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        for i, (key, clip) in enumerate(zip(batch["key"], batch["clip"], strict=True)):
            assert batch["latents"][i].unique().tolist() == [value(clip, int(key[-1]))]
            assert (
                batch["ellipses"][i].unique().item()
                == batch["context"][i, :3].unique().item()
                == value(clip, 0)
            )
            assert batch["prompt"][i] == f"prompt of {clip}"
        assert batch["skipped"] == []


def test_nothing_is_dropped_and_variants_take_turns(folder):
    batches = first(ready(folder).train_dataloader(), 21 * 3)
    keys = [key for batch in batches for key in batch["key"]]
    counts = {clip: [key[-1] for key in keys if key.startswith(clip)] for clip in TRAIN}
    assert sum(map(len, counts.values())) == 126
    # 18 epochs of 7; a bucket's last few may still wait for company
    assert all(abs(len(seen) - 18) <= 2 for seen in counts.values())
    assert all(
        len(set(seen[i : i + VARIANTS])) == VARIANTS for seen in counts.values() for i in range(12)
    )
    assert len({seen[0] for seen in counts.values()}) > 1


def test_seed_decides(folder):
    def keys(seed):
        return [batch["key"] for batch in first(ready(folder, seed=seed).train_dataloader(), 8)]

    assert keys(0) == keys(0) != keys(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_does_not_depend_on_workers(folder, workers):
    batches = first(ready(folder, num_workers=workers).train_dataloader(), 8)
    assert [batch["key"] for batch in batches] == [
        b["key"] for b in first(ready(folder).train_dataloader(), 8)
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_order(world):
    buckets = [*TRAIN.values()]

    def walk():
        return BucketWalk(buckets, ClipOrder(len(buckets), seed=3))

    whole = iter(BucketBatches(walk, 4, 0, 1))
    ranks = [iter(BucketBatches(walk, 4 // world, rank, world)) for rank in range(world)]
    for _ in range(12):
        parts = [next(rank) for rank in ranks]
        assert sorted(place for part in parts for place in part) == sorted(next(whole))
        assert len({buckets[index] for part in parts for _, index, _ in part}) == 1


class Task(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, _):
        self.seen.append(batch["key"])
        return (self.weight * batch["latents"].mean() - 1) ** 2

    def validation_step(self, batch, _):
        self.validated += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(folder, tmp_path, steps, resume=None, **settings):
    task, data = Task(), module(folder, **settings)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False, check_val_every_n_epoch=None, val_check_interval=3,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=resume)
    return task, data, trainer


def test_resume_takes_the_next_batch(folder, tmp_path):
    whole, data, _ = fit(folder, tmp_path, 15)
    assert data.consumed == 30
    assert set(whole.validated) == {f"{clip}-w000-v0" for clip in VAL}
    # fetches ahead of what it trains on
    start, _, trainer = fit(folder, tmp_path, 8, num_workers=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["LatentDataModule"]
    assert (state["consumed"], state["walk"]) == (16, [[2, 8]])
    rest, data, trainer = fit(folder, tmp_path, 15, resume=tmp_path / "a.ckpt")
    assert start.seen + rest.seen == whole.seen
    assert data.consumed == 30 and data.state_dict()["walk"] == [[2, 15]]


def test_resume_reads_nothing_of_what_it_skips(folder, tmp_path, monkeypatch):
    _, _, trainer = fit(folder, tmp_path, 8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    read = []
    monkeypatch.setattr(
        latents,
        "read_latents",
        lambda ref, width: [read.append(ref.key), read_latents(ref, width)][1],
    )
    rest, _, _ = fit(folder, tmp_path, 9, resume=tmp_path / "a.ckpt")
    assert len(rest.seen) == 1
    # The trained batch, one that is fetched ahead of it, and the validation ones
    assert [key for key in read if not key.startswith(tuple(VAL))][:2] == rest.seen[0] and len(
        read
    ) <= 4 + 2 * len(VAL)


def test_resume_with_another_batch_size_repeats_and_drops_nothing(folder, tmp_path):
    start, _, trainer = fit(folder, tmp_path, 5, batch_size=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    middle, data, trainer = fit(folder, tmp_path, 9, resume=tmp_path / "a.ckpt", batch_size=1)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert data.consumed == 15 + 4
    rest, _, _ = fit(folder, tmp_path, 40, resume=tmp_path / "b.ckpt", batch_size=2)
    keys = [key for keys in start.seen + middle.seen + rest.seen for key in keys]
    counts = [sum(key.startswith(clip) for key in keys) for clip in TRAIN]
    assert len(keys) == 15 + 4 + 62 and max(counts) - min(counts) <= 4


def test_resume_on_other_latents_warns(folder, caplog):
    data = ready(folder, seed=1)
    with caplog.at_level(logging.WARNING):
        data.load_state_dict(ready(folder).state_dict())
    assert "another seed" in caplog.text


def test_folders_are_mixed_by_weight(folder, tmp_path):
    more = {**dict.fromkeys("hijk", ("train", WIDE)), "u": ("val", WIDE)}
    other = write(tmp_path / "more", more)
    mixed = {str(folder): 1, str(other): 3}
    data = LatentDataModule(latents=OmegaConf.create(mixed), **(SETTINGS | {"batch_size": 1}))
    data.setup()
    clips = [batch["clip"][0] for batch in first(data.train_dataloader(), 4 * 11)]
    assert sum(clip in more for clip in clips) == 4 * 8  # of 11 places 8.25, each epoch
    assert {clip for batch in data.val_dataloader() for clip in batch["clip"]} == {*VAL, "u"}
    with pytest.raises(
        ShardError,
        match=r"key 'a-w000-v0' is in .*latents\S* and in .*again; leave one of the two out",
    ):
        ready_of([folder, write(tmp_path / "again")])


def test_latents_of_another_vae_are_not_mixed_in(folder, tmp_path):
    other = write(tmp_path / "other", {"h": ("train", WIDE)})
    write_json(other / MANIFEST, read_manifest(other, "latents") | {"vae_sha256": "xyz"})
    with pytest.raises(
        ShardError, match=r"other was made with vae_sha256 xyz, .* with abc; they cannot be mixed"
    ):
        ready_of([folder, other])


def test_validation_is_fixed_and_of_one_bucket(folder):
    runs = [list(ready(folder, seed=seed).val_dataloader()) for seed in (0, 9)]
    keys = [[batch["key"] for batch in run] for run in runs]
    assert keys[0] == keys[1]
    assert sorted(key for batch in keys[0] for key in batch) == [f"{clip}-w000-v0" for clip in VAL]
    assert all(len({VAL[clip] for clip in batch["clip"]}) == 1 for batch in runs[0])
    few = [key for batch in ready(folder, val_clips=2).val_dataloader() for key in batch["key"]]
    assert len(few) == 2 and set(few) < {key for batch in keys[0] for key in batch}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_validation_is_split_without_repeats(folder, world):
    data = ready(folder)
    places = [
        place
        for rank in range(world)
        for batch in data._val_batches(rank, world)
        for place in batch
    ]
    assert sorted(places) == [(0, i, 0) for i in range(len(VAL))]


def test_unequal_validation_is_announced(folder, caplog):
    data = ready(folder)
    data.trainer = lightning.Trainer(
        accelerator="cpu", devices=4, strategy="ddp", logger=False, use_distributed_sampler=False
    )
    with caplog.at_level(logging.WARNING):
        data.val_dataloader()
    assert "unequal" in caplog.text and "val_batch_size=1 and val_clips=4" in caplog.text


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
