import logging

import lightning
import pytest
import torch
from omegaconf import OmegaConf

from acetate.data import latents
from acetate.data.latent_shards import index_latents, read_latents
from acetate.data.latents import BucketBatches, LatentDataModule
from acetate.data.order import BucketWalk, ClipOrder
from acetate.data.shards import MANIFEST, BadClip, ShardError, read_manifest
from acetate.replacing import write_json
from tests.data.written_latents import (
    SETTINGS,
    TRAIN,
    VAL,
    VARIANTS,
    WIDE,
    first,
    folder,  # noqa: F401
    module,
    ready,
    value,
    write,
)


def ready_of(folders):
    data = LatentDataModule(latents=[str(folder) for folder in folders], **SETTINGS)
    data.setup()
    return data


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


def test_coverage_is_read_where_the_cache_has_it(tmp_path):
    """Of every cell, as a share; a batch of an older cache has none."""

    def spoiled(name, made):
        return write(
            tmp_path / name, spoil=lambda _, t: t | {"coverage": made(t["latents"].shape[1:])}
        )

    old, new = write(tmp_path / "old"), spoiled("new", lambda shape: torch.full(shape, 51).byte())
    without, batch = (first(ready(of).train_dataloader(), 1)[0] for of in (old, new))
    assert "coverage" not in without
    assert batch["coverage"].shape == (2, 1, *batch["latents"].shape[2:])
    torch.testing.assert_close(batch["coverage"], torch.full_like(batch["coverage"], 0.2))
    wrong = spoiled("wrong", torch.zeros)
    with pytest.raises(BadClip, match=r"coverage torch\.float32 .*; promised torch\.uint8"):
        read_latents(index_latents(wrong, read_manifest(wrong, "latents"))[0])
