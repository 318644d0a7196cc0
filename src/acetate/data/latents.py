"""The latent datamodule: gives batches of one bucket each, and goes on where a run stopped."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from acetate.data.datamodule import ShardDataModule
from acetate.data.latent_shards import (
    LatentRef,
    Sample,
    index_latents,
    read_empty_prompt,
    read_latents,
)
from acetate.data.order import BucketWalk, Order
from acetate.data.read_ahead import ReadAhead
from acetate.data.shards import HOW_TO_MAKE, BadClip, ShardError, by_key, read_manifest
from acetate.data.splits import splits_of, validation_draw
from acetate.data.store import RemoteTar
from acetate.documents import FieldError, shown
from acetate.draws import stable_hash
from acetate.settings import several, whole

# What latents were made with: folders are mixed, and a run goes on, only where all of it is equal
MADE_WITH = (
    "vae_sha256", "base_sha256", "text_encoder_sha256", "prompt_length", "ellipse", "geometry",
)  # fmt: skip
WALK = several(several(whole(0, 2**40), 2, 2), 0)
log = logging.getLogger(__name__)

Step = tuple[int, int, int]  # epoch, window, and how far the walk through the order has come


class BucketBatches(Sampler[list[Step]]):
    """Yields this rank's part of every global batch: r, r + world, ... of it.

    `walk` is asked anew at every iteration: a loader that is iterated again goes on where training
    stands.
    """

    def __init__(self, walk: Callable[[], BucketWalk], batch_size: int, rank: int, world: int):
        self.walk, self.batch_size, self.rank, self.world = walk, batch_size, rank, world

    def __iter__(self) -> Iterator[list[Step]]:
        walk = self.walk()
        while True:
            batch = walk.batch(self.batch_size * self.world)[self.rank :: self.world]
            yield [(*place, walk.position) for place in batch]


class LatentDataset(Dataset[Sample | BadClip]):
    """Maps a step to its sample, or to the BadClip that it would have been; never to another clip.

    The variants of a window take turns from epoch to epoch, from one that its key and the seed
    choose. batches: those of training on this rank, from no later than the first step that is asked
    for. width: of prompt embeddings.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[LatentRef]],
        seed: int,
        batches: BucketBatches | None,
        width: int,
    ):
        self.windows, self.seed, self.batches, self.width = windows, seed, batches, width
        remote = batches and any(isinstance(window[0].tar, RemoteTar) for window in windows)
        self.ahead = ReadAhead(self._coming, len(windows)) if remote else None

    def __getitem__(self, step: Step) -> Sample | BadClip:
        epoch, index, position = step
        if self.ahead:
            self.ahead.reached(position)
        try:
            return read_latents(self._variant(epoch, index), self.width)
        except BadClip as bad:
            return bad

    def _variant(self, epoch: int, index: int) -> LatentRef:
        variants = self.windows[index]
        start = stable_hash("variant", self.seed, variants[0].window)
        return variants[(start + epoch) % len(variants)]

    def _coming(self, position: int) -> Iterator[tuple[int, Path | RemoteTar]]:
        assert self.batches is not None
        for epoch, index, place in chain.from_iterable(self.batches):
            if place >= position:
                yield place, self._variant(epoch, index).tar


def collate(
    samples: Sequence[Sample | BadClip], *, prompt_length: int, null_context: Tensor
) -> dict[str, Any]:
    """Pads and stacks the good samples of a batch, in fp32, and lists the bad as "key: reason"; see
    LatentDataModule."""
    good = [sample for sample in samples if not isinstance(sample, BadClip)]

    def stack(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([tensor.float() for tensor in tensors]) if good else torch.empty(0)

    covered = [sample["coverage"] for sample in good if "coverage" in sample]
    known = {}
    if good and len(covered) == len(good):
        known["coverage"] = stack(covered)[:, None] / 255
    for name, given in (("condition", "condition"), ("image_embeds", "image")):
        if good and getattr(good[0]["ref"], given) is not None:
            known[name] = stack(sample[name] for sample in good)
    return known | {
        "latents": stack(sample["latents"] for sample in good),
        "ellipses": stack(sample["ellipse"] for sample in good),
        "context": stack(pad(sample["prompt_embeds"], prompt_length) for sample in good),
        "null_context": null_context,
        "prompt": [sample["prompt"] for sample in good],
        "key": [sample["ref"].key for sample in good],
        "clip": [sample["ref"].clip for sample in good],
        "skipped": [str(sample) for sample in samples if isinstance(sample, BadClip)],
    }


def pad(embeds: Tensor, length: int) -> Tensor:
    """Pads (n, D) to (length, D) with zeros after the last token, as Wan's DiT was trained."""
    return F.pad(embeds, (0, 0, 0, length - len(embeds)))


class LatentDataModule(ShardDataModule):
    """Gives batches of one bucket: latents (B, C, F, h, w) normalised, ellipses (B, F, 5) in latent
    cells (fit_ellipses), context (B, prompt_length, D) and null_context (1, prompt_length, D)
    zero-padded, all fp32; prompt, key, clip (lists of B) and skipped; coverage (B, 1, F, h, w), the
    mean alpha of each cell, unless the cache is an older one without; condition, like latents, that
    of the given frames alone, and image_embeds (B, n, D), CLIP's of the first one, where the cache
    holds them.

    latents: folders or URLs; a mapping from them to weights mixes them as MixedOrder does. loading:
    as in ShardDataModule, and so are order, position and bad clips; the position counts samples,
    and resuming walks there again, also from a run with other ranks or another batch size.
    batch_size is per rank; val_clips counts windows. `manifest` is that of the first folder, after
    setup. Raises ShardError where folders cannot be used, or not together, and ValueError naming
    the sample whose prompt is longer than prompt_length.
    """

    def __init__(
        self,
        *,
        latents: str | Sequence[str] | Mapping[str, float],
        prompt_length: int,
        **loading: Any,
    ):
        super().__init__(folders=latents, **loading)
        self.prompt_length = prompt_length
        self.manifest: dict[str, Any] = {}
        self.train_windows: list[list[LatentRef]] = []
        self.val_windows: list[list[LatentRef]] = []
        # [global batch, batches] of the runs that this one goes on from
        self._past: list[list[int]] = []

    @property
    def vae_sha256(self) -> str:
        """The RGBAVAE.latents_sha256() of the VAE that made the latents; other hashes are in the
        manifest."""
        return self.manifest["vae_sha256"]

    def setup(self, stage: str | None = None) -> None:
        if self.manifest and (self.train_windows or stage == "validate"):
            return
        manifests = [read_manifest(folder, "latents") for folder in self.folders]
        self._check_alike(manifests)
        pairs = zip(self.folders, manifests, strict=True)
        refs = by_key(
            ref for folder, manifest in pairs for ref in index_latents(folder, manifest)
        ).values()
        refs = sorted(refs, key=lambda ref: (ref.window, ref.variant))
        longest = max(refs, key=lambda ref: ref.tokens, default=None)
        if longest and longest.tokens > self.prompt_length:
            raise ValueError(
                f"{longest.key}: a prompt of {longest.tokens} tokens; "
                f"prompt_length={self.prompt_length}. {self._where()}: made for "
                f"{manifests[0]['prompt_length']}; set that, or cache with shorter prompts."
            )
        self._count_bad([f"{ref.key}: {ref.problem}" for ref in refs if ref.problem])
        windows = [list(group) for _, group in groupby(refs, key=lambda ref: ref.window)]
        train, val = (
            [window for window in windows if window[0].split == split] for split in ("train", "val")
        )
        for split, found in (("train", train), ("val", val)):
            if not found and split in splits_of(stage):
                raise ShardError(
                    f"{self._where()}: none of {len(refs)} samples is in split {split!r}. Add "
                    "clips of that split to the clip shards and cache them anew. "
                    f"{HOW_TO_MAKE['latents']}"
                )
        val = validation_draw(
            val, self.val_clips, name=lambda w: w[0].window, key=lambda w: w[0].clip
        )
        self.null_context = pad(read_empty_prompt(self.folders[0]).float(), self.prompt_length)[
            None
        ]
        self.train_windows, self.val_windows = train, [window[:1] for window in val]
        self.manifest = manifests[0]

    def _check_alike(self, manifests: Sequence[dict[str, Any]]) -> None:
        for name in (*MADE_WITH, "condition", "image_encoder"):
            for folder, manifest in zip(self.folders, manifests, strict=True):
                if manifest.get(name) != manifests[0].get(name):
                    raise ShardError(
                        f"{folder} was made with {name} {manifest.get(name)}, {self.folders[0]} "
                        f"with {manifests[0].get(name)}; they cannot be mixed. Cache one of them "
                        "anew, with the settings of the other, or leave it out."
                    )

    def captions(self, count: int) -> list[str]:
        """Returns at most `count` different prompts of validation clips, of as many kinds as there
        are, after setup.

        Unreadable clips are passed over. One empty prompt where the clips have none.
        """
        return [one["prompt"][0] for one in self.examples(count)] or [""]

    def examples(self, count: int, alike: bool = False) -> list[dict[str, Any]]:
        """Returns batches of one clip each, whose prompts are those of `captions`, none of which is
        empty. alike: of clips of one size, that of the first."""
        found: dict[str, dict[str, Any]] = {}
        for ref, *_ in self.val_windows:
            if len(found) == count:
                break
            if alike and found and ref.shape != next(iter(found.values()))["latents"].shape[2:]:
                continue
            try:
                sample = read_latents(ref, self._width)
            except BadClip:  # validation counts it
                continue
            if sample["prompt"]:
                found.setdefault(sample["prompt"], self._collate()([sample]))
        return [*found.values()]

    def state_dict(self) -> dict[str, Any]:
        runs = groupby([*self._past, self._present()], itemgetter(0))
        walk = [[size, sum(batches for _, batches in of_size)] for size, of_size in runs]
        return super().state_dict() | {"walk": walk}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        walk: Any = state_dict.get("walk")
        known = sum(run[0] * run[1] for run in walk) if WALK.holds(walk) else -1
        if known != self._consumed:
            raise FieldError(
                f"{type(self).__name__}.walk={shown(walk)}: must be pairs of a global batch and "
                f"the number of such, {self._consumed} samples in all"
            )
        self._past = [list(run) for run in state_dict["walk"] if run[1]]

    def _present(self) -> list[int]:
        """Returns the global batch and the number of batches since the runs of `_past`."""
        size = self.batch_size * self._rank_and_world()[1]
        return [size, (self.consumed - sum(past * batches for past, batches in self._past)) // size]

    def _walk(self) -> BucketWalk:
        """Returns the walk over batches at the place where training stands."""
        walk = BucketWalk([window[0].shape for window in self.train_windows], self._order())
        for size, batches in [*self._past, self._present()]:
            for _ in range(batches):
                walk.batch(size)
        return walk

    def train_dataloader(self) -> DataLoader:
        rank, world = self._rank_and_world()
        self._start()
        walk = self._walk()
        self._check_buckets(walk.buckets, self.batch_size * world)
        batches = BucketBatches(walk.copy, self.batch_size, rank, world)
        dataset = LatentDataset(self.train_windows, self.seed, batches, self._width)
        return self._loader(
            dataset, BucketBatches(self._walk, self.batch_size, rank, world), self._collate()
        )

    def val_dataloader(self) -> DataLoader:
        rank, world = self._rank_and_world()
        parts = [self._val_batches(r, world) for r in range(world)]
        self._check_even(
            [len(part) for part in parts],
            len(self.val_windows),
            "windows in buckets",
            "val_batch_size=1 and ",
        )
        dataset = LatentDataset(self.val_windows, seed=0, batches=None, width=self._width)
        return self._loader(dataset, parts[rank], self._collate())

    @property
    def _width(self) -> int:
        return self.null_context.shape[-1]

    def _check_buckets(self, buckets: Sequence[Hashable], size: int) -> None:
        """Warns of buckets that are too rare for a batch of `size` different windows."""
        if rare := {bucket: count for bucket, count in Counter(buckets).items() if count < size}:
            log.warning(
                "%d of %d buckets have fewer windows than the %d of a batch, so that its batches "
                "repeat some; the smallest has %d. Cache latents in fewer buckets, or train with "
                "smaller batches.",
                len(rare), len(set(buckets)), size, min(rare.values()),
            )  # fmt: skip

    def _val_batches(self, rank: int, world: int) -> list[list[Step]]:
        """Returns batches of one bucket; over all ranks, each window comes exactly once."""
        by_bucket = sorted(range(len(self.val_windows)), key=lambda i: self.val_windows[i][0].shape)
        batches: list[list[Step]] = []
        for _, group in groupby(by_bucket[rank::world], key=lambda i: self.val_windows[i][0].shape):
            steps = [(0, index, 0) for index in group]
            batches += [
                steps[i : i + self.val_batch_size]
                for i in range(0, len(steps), self.val_batch_size)
            ]
        return batches

    def _training_refs(self) -> Iterator[LatentRef]:
        return chain.from_iterable(self.train_windows)

    def _epoch_clips(self) -> int:
        return len(self.train_windows)

    def _blank(self) -> dict[str, Any]:
        frames, height, width = min(window[0].shape for window in self.train_windows)
        latents = torch.zeros(1, self.manifest["geometry"]["channels"], frames, height, width)
        image = self.manifest.get("image_encoder")
        embeds = image and torch.zeros(1, image["tokens"], image["width"])
        return {
            **({} if embeds is None else {"image_embeds": embeds}),
            **({"condition": latents} if "condition" in self.manifest else {}),
            "latents": latents,
            "ellipses": torch.zeros(1, frames, 5),
            "coverage": torch.zeros(1, 1, frames, height, width),
            "context": self.null_context,
            "prompt": [""],
            "key": [""],
            "clip": [""],
        }

    def _fingerprint(self) -> int:
        facts = ((window[0].window, window[0].shape) for window in self.train_windows)
        return stable_hash(self.seed, *facts, *self._order().fingerprint)

    def _order(self) -> Order:
        """Orders windows; blocks go by the tar of a window's first variant, and the others lie
        beside it."""
        return self._order_of([window[0].tar for window in self.train_windows])

    def _collate(self) -> Callable:
        return partial(collate, prompt_length=self.prompt_length, null_context=self.null_context)
