"""The base of both datamodules: batches without end, the position that a resumed run goes on from,
bad clips."""

import logging
import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, Dataset

from acetate.data.keys import first_reasons
from acetate.data.order import ClipOrder, MixedOrder, Order
from acetate.data.shards import ShardError, TarRef
from acetate.data.store import Remote, RemoteTar, listed, open_folder
from acetate.documents import Schema
from acetate.lightning_seams import batches_done, replaces_samplers
from acetate.redaction import redacted
from acetate.settings import whole
from acetate.steps import reader

STATE = Schema({"consumed": whole(0, 2**60), "order": whole(-(2**63), 2**63)})
log = logging.getLogger(__name__)


def apart_from_signals(worker: int) -> None:
    """Keeps signals to a job's processes from ending a data worker before the trainer has saved a
    checkpoint.

    Those to the process group no longer reach it; of those to itself, the trainer's own SIGTERM
    ends it.
    """
    os.setpgid(0, 0)
    for name in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_at_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _end_at_sigterm_of(trainer: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != trainer:
        pass
    os._exit(0)


class BadDataError(RuntimeError):
    """There are more bad clips than the budget allows, or none that is good."""


def weights_of(folders: Mapping[str, Any]) -> list[float]:
    """Returns the weights of folders. Raises ValueError for one that is no number, negative or not
    finite, or if all are 0."""
    for folder, weight in folders.items():
        if not isinstance(weight, int | float):
            raise ValueError(
                f"{redacted(folder)}: weight {weight!r} is no number. On a command line, a colon "
                "in a URL needs a backslash: "
                r"data.shards='{data/mine: 1, s3\://bucket/clips: 3}'"
            )
    weights = [float(weight) for weight in folders.values()]
    if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        raise ValueError(f"weights {weights}; none may be negative and one must be above 0")
    return weights


class ShardDataModule(LightningDataModule):
    """Reads training batches without end or length: the trainer's max_steps ends them. Their order
    depends on (seed, epoch) alone; where it goes on is the number of clips that training has
    consumed, on all ranks. A bad clip leaves its batch, which gets smaller, or is a blank that
    counts for nothing; past `bad_clip_budget` distinct ones in a process, training stops with
    BadDataError.

    Folders may be URLs, which `remote` reads: every machine fetches every tar of the training split
    once an epoch, unless its cache holds them all; the next ones while clips are read (ReadAhead).
    If any is one, clips are shuffled within blocks of `shuffle_tars` tars (block_shuffle), which
    the cache must hold; else fully. A mapping gives each folder a weight (MixedOrder).
    """

    def __init__(
        self,
        *,
        folders: str | Sequence[str] | Mapping[str, float],
        batch_size: int,
        seed: int,
        num_workers: int,
        val_batch_size: int,
        val_clips: int,
        bad_clip_budget: int = 0,
        remote: Remote | None = None,
        shuffle_tars: int = 8,
    ):
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1), ("val_batch_size", val_batch_size, 1),
            ("val_clips", val_clips, 1), ("num_workers", num_workers, 0),
            ("bad_clip_budget", bad_clip_budget, 0), ("shuffle_tars", shuffle_tars, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value}; must be at least {least}")
        self.folders = [open_folder(folder, remote) for folder in listed(folders)]
        if not self.folders:
            raise ShardError("shards=[]; name at least one folder of shards")
        self.weights = weights_of(folders) if isinstance(folders, Mapping) else None
        self.remote, self.shuffle_tars = remote, shuffle_tars
        self.batch_size, self.val_batch_size, self.val_clips = batch_size, val_batch_size, val_clips
        self.seed, self.num_workers, self.bad_clip_budget = seed, num_workers, bad_clip_budget
        self.bad: dict[str, str] = {}
        self._seen: dict[str, Counter[str]] = defaultdict(Counter)  # by stage: clips good and bad
        self._consumed = 0  # clips, on all ranks, when the training loader was made
        self._batches: int | None = None  # the trainer's count of finished batches then

    def _fingerprint(self) -> int:
        """Returns a hash of the seed and the training data: a position means the same where it is
        equal."""
        raise NotImplementedError

    def _training_refs(self) -> Iterable[TarRef]:
        """Returns the references of all training samples."""
        raise NotImplementedError

    def _epoch_clips(self) -> int:
        """Returns how many clips make one pass over all of them."""
        raise NotImplementedError

    def _blank(self) -> dict[str, Any]:
        """Returns a batch of one clip that stands for none."""
        raise NotImplementedError

    def _order_of(self, tars: Sequence[Path | RemoteTar]) -> Order:
        """Returns the order of the training clips, from the tar of each."""
        names = (
            [str(tar) for tar in tars] if any(isinstance(tar, RemoteTar) for tar in tars) else None
        )
        if self.weights is None:
            self._check_window([tars])
            return ClipOrder(len(tars), self.seed, tars=names, shuffle_tars=self.shuffle_tars)
        sets = [
            [i for i, tar in enumerate(tars) if tar.parent == folder] for folder in self.folders
        ]
        for folder, weight, clips in zip(self.folders, self.weights, sets, strict=True):
            if weight and not clips:
                raise ShardError(
                    f"{folder} has weight {weight:g} and no training clip; leave it out."
                )
        used = [clips for clips, weight in zip(sets, self.weights, strict=True) if weight]
        self._check_window([[tars[clip] for clip in clips] for clips in used])
        order = MixedOrder(
            sets, self.weights, self.seed, tars=names, shuffle_tars=self.shuffle_tars
        )
        for folder, weight, quota in zip(self.folders, self.weights, order.quotas, strict=True):
            if weight and not quota:
                raise ShardError(
                    f"{folder} has weight {weight:g} of {sum(self.weights):g}, which is none of "
                    f"the {order.count} places of an epoch. Give it a larger one, or 0."
                )
        return order

    def _check_window(self, sets: Sequence[Sequence[Path | RemoteTar]]) -> None:
        """Raises ShardError where the cache cannot hold the tars that training reads at a time."""
        needed = 0
        for tars in sets:
            sizes = {str(tar): tar.size for tar in tars if isinstance(tar, RemoteTar)}
            needed += sum(sorted(sizes.values())[-self.shuffle_tars :])
        if self.remote and needed > self.remote.max_bytes:
            raise ShardError(
                f"shuffle_tars={self.shuffle_tars} needs {needed / 2**30:.3g} GiB of tars at a "
                f"time, the cache holds {self.remote.max_bytes / 2**30:.3g}. Raise remote.cache_gb "
                "or lower shuffle_tars."
            )

    @property
    def consumed(self) -> int:
        """Clips of all ranks in finished training batches; those that a loader has fetched ahead do
        not count."""
        if self.trainer is None or self._batches is None:
            return self._consumed
        _, world = self._rank_and_world()
        return self._consumed + (self._finished_batches() - self._batches) * self.batch_size * world

    @property
    def passes(self) -> float:
        """Passes over the training clips, by all ranks together."""
        return self.consumed / max(1, self._epoch_clips())  # of a held-out set no clip trains

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "order": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position. Other ranks or another batch size go on at the same clip; other
        clips or another seed cannot. Raises FieldError for a state of another form."""
        STATE.check(state_dict, type(self).__name__)
        self._consumed, self._batches = state_dict["consumed"], None
        if state_dict["order"] != self._fingerprint():
            log.warning(
                "the checkpoint knows other clips or another seed; position %d is taken in a new "
                "order",
                self._consumed,
            )

    def _start(self) -> None:
        """Counts later batches from now, when a training loader is made."""
        self._consumed = self.consumed
        self._batches = self._finished_batches() if self.trainer else None

    def on_before_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Counts the bad clips of a batch; BadDataError past the budget, or if no clip is good.

        In the place of a batch whose clips are all bad comes one blank clip without a key: other
        ranks wait for this one's step, which must count for nothing.
        """
        if self.trainer is not None and self.trainer.state.stage is not None:
            seen = self._seen[self.trainer.state.stage.value]
            seen.update(good=len(batch["key"]), bad=len(batch["skipped"]))
        self._count_bad(batch["skipped"])
        if batch["key"]:
            return batch
        refs = self._training_refs()
        if refs and all(ref.key in self.bad for ref in refs):
            raise BadDataError(
                f"none of {len(self.bad)} clips is usable: {batch['skipped'][0]}. Repair or "
                f"re-make the shards in {self._where()}."
            )
        return batch | self._blank()

    def _count_bad(self, skipped: Sequence[str]) -> None:
        for text in skipped:
            key, _, reason = text.partition(": ")
            if key not in self.bad:
                self.bad[key] = reason
                log.warning("skipped clip %s: %s", key, reason)
        if len(self.bad) > self.bad_clip_budget:
            raise BadDataError(
                f"{len(self.bad)} bad clips, bad_clip_budget={self.bad_clip_budget}: "
                f"{first_reasons(self.bad)}. Repair or re-make the shards in {self._where()}, or "
                "raise bad_clip_budget."
            )

    def check_read(self, stage: Literal["train", "validate"]) -> None:
        """Raises BadDataError where none of the clips that came was good, on any rank; all ranks
        call it."""
        assert self.trainer is not None
        seen = self._seen[stage]
        counts = torch.tensor([seen["good"], seen["bad"]], device=self.trainer.strategy.root_device)
        good, bad = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if bad and not good:
            reasons = first_reasons(self.bad) or "another rank says why"
            raise BadDataError(
                f"no clip of {self._where()} could be read, {bad:g} failed: {reasons}. Nothing was "
                "learnt or measured; repair the shards, or what serves them."
            )

    def _where(self) -> str:
        return ", ".join(map(str, self.folders))

    def _finished_batches(self) -> int:
        assert self.trainer is not None
        return batches_done(self.trainer)  # not fetched: an interrupted step counts as not done

    def _rank_and_world(self) -> tuple[int, int]:
        """Returns rank and size of the data-parallel group: under context parallelism several
        processes share their clips."""
        if self.trainer is None or self.trainer.world_size == 1:
            return 0, 1
        if replaces_samplers(self.trainer):
            raise ValueError(
                "use_distributed_sampler=True lets Lightning replace the order of the clips, "
                "which ends "
                "exact resume. Set trainer.use_distributed_sampler=false."
            )
        return reader(self.trainer)

    def _check_even(self, batches: Sequence[int], count: int, kind: str, advice: str = "") -> None:
        """Checks the numbers of validation batches that `count` clips or windows make on each rank.

        ValueError where a rank has none, which would leave out what the others do together, and
        where they differ on a sharded model, which would wait for ever; other models only pay for
        the slowest rank.
        """
        ranks, what = len(batches), f"{count} validation {kind}"
        even = (
            f"val_clips={count // ranks * ranks}"
            if count >= ranks
            else f"at most {count} GPUs, or more clips"
        )
        remedy = advice + even
        if not min(batches):
            raise ValueError(f"{what} leave some of {ranks} ranks without one. Use {remedy}.")
        if len(set(batches)) == 1:
            return
        said = (
            f"{what} make unequal numbers of batches on {ranks} ranks, {min(batches)} to "
            f"{max(batches)}"
        )
        if self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError(f"{said}; a sharded model needs equal ones. Use {remedy}.")
        log.warning("%s; a sharded model (trainer=fsdp) could not run it. Use %s.", said, remedy)

    def _loader(
        self, dataset: Dataset, batches: Iterable[list[Any]], collate: Callable
    ) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]  torch's stub wants a Sampler
            collate_fn=collate,
            num_workers=self.num_workers,
            worker_init_fn=apart_from_signals,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
