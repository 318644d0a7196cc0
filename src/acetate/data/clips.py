"""The clip datamodule: chooses which clip comes when, treats bad ones, and goes on where a run
stopped."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from acetate.data.datamodule import ShardDataModule
from acetate.data.order import Order
from acetate.data.read_ahead import ReadAhead
from acetate.data.shards import BadClip, Clip, ClipRef, ShardError, blame, index_shards, read_clip
from acetate.data.splits import splits_of, validation_draw
from acetate.data.store import RemoteTar
from acetate.data.transforms import ClipTransform
from acetate.draws import generator_for, stable_hash

log = logging.getLogger(__name__)

Sample = dict[str, Any]  # rgb (3, T, H, W), alpha (1, T, H, W), prompt, key


class TrainBatches(Sampler[list[int]]):
    """Yields positions of this rank, a batch at a time, without end.

    A global batch is `batch_size * world` consecutive positions; rank r takes r, r + world, ... of
    them. `start` is asked anew at every iteration: a loader that is iterated again goes on where
    training stands.
    """

    def __init__(self, start: Callable[[], int], batch_size: int, rank: int, world: int):
        self.start, self.batch_size, self.rank, self.world = start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start()
        while True:
            yield [first + self.rank + i * self.world for i in range(self.batch_size)]
            first += self.batch_size * self.world


class ValBatches(Sampler[list[int]]):
    """Yields this rank's part of `count` clips, each exactly once over all ranks."""

    def __init__(self, count: int, batch_size: int, rank: int, world: int):
        # One piece each, so that the first clips, of which rank 0 draws pictures, are of as many
        # kinds as there are
        own = torch.arange(count).tensor_split(world)[rank]
        self.batches = list(own.split(batch_size)) if len(own) else []

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ClipReader:
    """Reads frames of clips. Where all of `refs` decoded are no more than `max_bytes`, whole clips
    are kept in memory; else of each the wanted frames alone are decoded, every time."""

    def __init__(self, refs: Sequence[ClipRef], max_bytes: float):
        whole = sum(4 * ref.frames * ref.height * ref.width for ref in refs)
        self.keeps, self.clips = whole <= max_bytes, dict[str, Clip]()

    def read(self, ref: ClipRef, frames: Tensor) -> tuple[Tensor, str]:
        """Returns the frames of these numbers, uint8 (T, H, W, 4), and the prompt."""
        first, last = (0, ref.frames) if self.keeps else (int(frames.min()), int(frames.max()) + 1)
        clip = self.clips.get(ref.key) or read_clip(ref, (first, last))
        if self.keeps:
            self.clips[ref.key] = clip
        return torch.from_numpy(clip.frames)[frames - first], clip.prompt


class ClipDataset(Dataset[Sample | BadClip]):
    """Maps a position to its sample, or to the BadClip that it would have been; never to another
    clip.

    Without an order, clip after clip. step: between the positions of this rank.
    """

    def __init__(
        self,
        refs: Sequence[ClipRef],
        transform: ClipTransform,
        seed: int,
        cache_bytes: float,
        order: Order | None,
        step: int = 1,
    ):
        self.refs, self.transform, self.seed, self.order = refs, transform, seed, order
        self.reader, self.step = ClipReader(refs, cache_bytes), step
        remote = order and any(isinstance(ref.tar, RemoteTar) for ref in refs)
        self.ahead = ReadAhead(self._coming, len(refs)) if remote else None

    def __getitem__(self, position: int) -> Sample | BadClip:
        if self.ahead:
            self.ahead.reached(position)
        epoch, index = self.order[position] if self.order else (0, position)
        ref = self.refs[index]
        generator = generator_for("clip", self.seed, epoch, ref.key)
        try:
            with blame(ref):
                places = self.transform.window(ref.frames, generator)
                frames, prompt = self.reader.read(ref, places)
                rgb, alpha = self.transform.shown(frames, generator)
                if not (rgb.isfinite().all() and alpha.isfinite().all()):
                    raise ValueError("values that are not finite")
        except BadClip as bad:
            return bad
        return {"rgb": rgb, "alpha": alpha, "prompt": prompt, "key": ref.key}

    def _coming(self, position: int) -> Iterator[tuple[int, Path | RemoteTar]]:
        assert self.order is not None
        for place in count(position, self.step):
            yield place, self.refs[self.order[place][1]].tar


def collate(samples: Sequence[Sample | BadClip]) -> dict[str, Any]:
    """Stacks the good samples into rgb (B, 3, T, H, W), alpha (B, 1, T, H, W), prompt and key, and
    lists the bad as "key: reason"."""
    good = [sample for sample in samples if not isinstance(sample, BadClip)]
    return {
        "rgb": torch.stack([sample["rgb"] for sample in good]) if good else torch.empty(0),
        "alpha": torch.stack([sample["alpha"] for sample in good]) if good else torch.empty(0),
        "prompt": [sample["prompt"] for sample in good],
        "key": [sample["key"] for sample in good],
        "skipped": [str(sample) for sample in samples if isinstance(sample, BadClip)],
    }


class ClipDataModule(ShardDataModule):
    """Gives batches of rgb (B, 3, T, H, W) in [-1, 1], alpha (B, 1, T, H, W) in [0, 1], prompt,
    key, skipped.

    shards: folders or URLs; a mapping from them to weights mixes them as MixedOrder does. loading:
    as in ShardDataModule, and so are order, position and bad clips. resize `straight` bleeds hidden
    colour, random_validation draws other crops each time: both only to reproduce the released code.
    Raises ShardError where the shards cannot be used.
    """

    def __init__(
        self,
        *,
        shards: str | Sequence[str] | Mapping[str, float],
        frames: int,
        height: int,
        width: int,
        num_workers: int,
        time_stride: int = 4,
        space_multiple: int = 16,
        scale_range: tuple[float, float] = (0.5, 1.0),
        min_coverage: float = 0.03,
        flip: float = 0.5,
        pan_speed: float = 2.0,
        cache_mb: float = 512,
        resize: str = "premultiplied",
        random_validation: bool = False,
        **loading: Any,
    ):
        super().__init__(folders=shards, num_workers=num_workers, **loading)
        self.random_validation = random_validation
        self.cache_bytes = cache_mb * 2**20 / max(1, num_workers)
        self.train_transform, self.val_transform = (
            ClipTransform(
                frames=frames,
                height=height,
                width=width,
                time_stride=time_stride,
                space_multiple=space_multiple,
                scale_range=(scale_range[0], scale_range[1]),
                min_coverage=min_coverage,
                flip=flip,
                pan_speed=pan_speed,
                train=train,
                resize=resize,
            )
            for train in (True, random_validation)
        )
        self.train_refs: list[ClipRef] = []
        self.val_refs: list[ClipRef] = []

    def setup(self, stage: str | None = None) -> None:
        if self.val_refs and (self.train_refs or stage == "validate"):
            return
        refs = index_shards(self.folders)
        self._count_bad([f"{ref.key}: {ref.problem}" for ref in refs if ref.problem])
        self.train_refs = [ref for ref in refs if ref.split == "train"]
        val = [ref for ref in refs if ref.split == "val"]
        self.val_refs = validation_draw(
            val, self.val_clips, name=attrgetter("key"), key=attrgetter("key")
        )
        for split, found in (("train", self.train_refs), ("val", self.val_refs)):
            if not found and split in splits_of(stage):
                raise ShardError(
                    f"{self._where()}: none of {len(refs)} clips is in split {split!r}. Re-shard "
                    "with another val_fraction, or add clips; those of one group, which a table's "
                    "column `group` names, are never divided."
                )

    def train_dataloader(self) -> DataLoader:
        rank, world = self._rank_and_world()
        self._start()
        dataset = ClipDataset(
            self.train_refs, self.train_transform, self.seed, self.cache_bytes, self._order(), world
        )
        return self._loader(
            dataset, TrainBatches(lambda: self.consumed, self.batch_size, rank, world), collate
        )

    def val_dataloader(self) -> DataLoader:
        rank, world = self._rank_and_world()
        # Seed 0: runs of different seeds are measured on the same pictures.
        seed = self._finished_batches() if self.random_validation else 0
        dataset = ClipDataset(self.val_refs, self.val_transform, seed, self.cache_bytes, order=None)
        parts = [
            ValBatches(len(self.val_refs), self.val_batch_size, r, world) for r in range(world)
        ]
        self._check_even([len(part) for part in parts], len(self.val_refs), "clips")
        return self._loader(dataset, parts[rank], collate)

    def _training_refs(self) -> list[ClipRef]:
        return self.train_refs

    def _epoch_clips(self) -> int:
        return len(self.train_refs)

    def _blank(self) -> dict[str, Any]:
        transform = self.train_transform
        shape = (transform.frames, transform.height, transform.width)
        return {
            "rgb": torch.zeros(1, 3, *shape),
            "alpha": torch.zeros(1, 1, *shape),
            "prompt": [""],
            "key": [""],
        }

    def _fingerprint(self) -> int:
        return stable_hash(
            self.seed, *(ref.key for ref in self.train_refs), *self._order().fingerprint
        )

    def _order(self) -> Order:
        return self._order_of([ref.tar for ref in self.train_refs])
