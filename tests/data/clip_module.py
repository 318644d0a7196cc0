"""Shards of clips, their data module, and a run over it."""

import lightning
import numpy as np
import pytest
import torch

from acetate.data.clips import ClipDataModule
from acetate.data.shards import index_shards
from acetate.data.writer import ShardWriter, encode_clip

SETTINGS = {
    "frames": 5, "height": 16, "width": 16, "batch_size": 4, "seed": 0, "num_workers": 0,
    "val_batch_size": 2,
    "val_clips": 100, "bad_clip_budget": 0,
}  # fmt: skip
TRAIN, VAL = 11, 5


def clip(seed):
    """Clips of several lengths and sizes, and stills."""
    rng = np.random.default_rng(seed)
    shape = ((5, 16, 16), (9, 20, 31), (1, 24, 24), (2, 40, 18))[seed % 4]
    return rng.integers(0, 256, (*shape, 4), dtype=np.uint8)


def write(out, max_clips=4, media=None):
    with ShardWriter(out, max_clips=max_clips, max_bytes=10**9, made_by={}) as writer:
        for i in range(TRAIN + VAL):
            key = f"clip{i:02d}"
            writer.add(
                key,
                (media or {}).get(key) or encode_clip(clip(i), 16),
                split="val" if i % 3 == 2 else "train",
                prompt=f"prompt {i}",
                source="",
                licence="",
                lossy=False,
                premultiplied_source=False,
            )
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"))


def module(shards, **settings):
    return ClipDataModule(shards=str(shards), **(SETTINGS | settings))


def ready(shards, **settings):
    data = module(shards, **settings)
    data.setup()
    return data


def first(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def break_clip(folder, key):
    ref = next(ref for ref in index_shards([folder]) if ref.key == key)
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + ref.media[1] // 2)
        file.write(b"\0" * 20)


class Task(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, _):
        self.seen.append((batch["key"], batch["rgb"].sum().item()))
        return (self.weight * batch["alpha"].mean() - 1) ** 2

    def validation_step(self, batch, _):
        self.validated += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(shards, tmp_path, steps, resume=None, trainer_settings=None, **settings):
    task, data = Task(), module(shards, **settings)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False, check_val_every_n_epoch=None, val_check_interval=2,
        default_root_dir=tmp_path,
        use_distributed_sampler=False, **(trainer_settings or {}),
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=resume)
    return task, data, trainer
