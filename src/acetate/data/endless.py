"""Endless synthetic clips over moving backgrounds, drawn on the fly: what the tiny base model is trained on."""

import sys

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from acetate.alpha import PALETTE, harden, over
from acetate.data import synthetic
from acetate.data.clips import TrainBatches
from acetate.data.datamodule import apart_from_signals
from acetate.draws import generator_for
from acetate.lightning_seams import batches_done


class EndlessClips(Dataset):
    """Clip i is a function of (seed, i) alone, so that order and resume need no state; this one has every step-th."""

    def __init__(self, *, seed: int, start: int, length: int, step: int, frames: int, height: int, width: int) -> None:
        self.seed, self.start, self.length, self.step = seed, start, length, step
        self.frames, self.height, self.width = frames, height, width

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """{video (3, T, H, W) in [-1, 1], prompt, key}."""
        number = self.start + index * self.step
        generator = generator_for("endless", self.seed, number)
        kind_draw, view_draw, color_draw, seed_draw = torch.randint(2**31, (4,), generator=generator).tolist()
        kind = synthetic.KINDS[kind_draw % len(synthetic.KINDS)]
        size = (self.frames, self.height, self.width)
        clip = synthetic.render(kind, seed_draw, *size)
        return {
            "video": self._view(clip, view_draw % 10, color_draw, size),
            "prompt": clip.prompt,
            "key": f"{kind}-{seed_draw}",
        }

    @staticmethod
    def _view(clip: synthetic.SyntheticClip, view: int, color: int, size: tuple[int, int, int]) -> Tensor:
        """What an RGB model is shown later: pictures (5 of 10), hard (2) and soft (1) renders, mattes (2)."""
        plain = PALETTE[color % 8].view(3, 1, 1, 1)
        if view < 5:
            return over(clip.rgb, clip.alpha, synthetic.background(color, *size))
        if view < 7:
            return over(clip.rgb, harden(clip.alpha), plain)
        if view < 8:
            return over(clip.rgb, clip.alpha, plain)
        return (clip.alpha * 2 - 1).expand(3, *size)


class EndlessDataModule(LightningDataModule):
    """frames = time_stride * k + 1; validation clips come from another part of the seed space.

    Rank r of n draws the clips r, r + n, ...; batch_size is per rank, val_clips are of all ranks together.
    """

    def __init__(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        batch_size: int,
        val_clips: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.frames, self.height, self.width = frames, height, width
        self.batch_size, self.val_clips = batch_size, val_clips
        self.seed, self.num_workers = seed, num_workers

    def train_dataloader(self) -> DataLoader:
        rank, world, finished = 0, 1, 0
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            finished = batches_done(self.trainer)
        batches = TrainBatches(lambda: finished * self.batch_size * world, self.batch_size, rank, world)
        clips = self._clips(start=0, length=sys.maxsize, step=1)
        return DataLoader(clips, batch_sampler=batches, num_workers=self.num_workers, worker_init_fn=apart_from_signals)

    def val_dataloader(self) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        share = max(1, self.val_clips // world)
        clips = self._clips(start=2**31 + rank, length=share, step=world)
        return DataLoader(
            clips,
            batch_size=min(self.batch_size, share),
            num_workers=self.num_workers,
            worker_init_fn=apart_from_signals,
        )

    def _clips(self, *, start: int, length: int, step: int) -> EndlessClips:
        return EndlessClips(
            seed=self.seed,
            start=start,
            length=length,
            step=step,
            frames=self.frames,
            height=self.height,
            width=self.width,
        )
