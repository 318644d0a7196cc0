"""What training minimises and logs: numbers of the whole batch, not of one rank's part."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from acetate.losses.ranks import sum_over_ranks


def logs_now(task: LightningModule) -> bool:
    """Whether loggers write what this training step logs."""
    return task.trainer._logger_connector.should_update_logs


def clips_in(batch: Mapping[str, Any]) -> int:
    """Clips of this rank's batch; 0 where a blank one, which has no key, stands in for clips that are all bad."""
    return sum(map(bool, batch["key"]))


def share_of(task: LightningModule, loss: Tensor, size: int, whole: Tensor | float = 0.0) -> Tensor:
    """A loss of this rank's `size` clips, so weighted that its mean over the ranks, which must call this together, is
    that of all clips. whole: the part of it that is that of all clips on every rank."""
    if not size:
        loss = 0 * loss
    if task.trainer.world_size == 1:
        return loss
    total = sum_over_ranks(torch.tensor(float(size), device=loss.device))  # Lightning's reduce waits for the GPU
    weight = size * task.trainer.world_size / total.clamp_min(1)
    return loss + (weight - 1) * (loss - whole) if size else loss


def means_of(task: LightningModule, sums: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Sums over this rank's `size` clips -> means over those of all ranks, which must call this together.

    Nothing where there are no clips. In float64, in which the mean of equal numbers is that number.
    """
    counted = {"device": task.device, "dtype": torch.float64}
    local = torch.stack([*(value.detach().to(**counted) for value in sums.values()), torch.tensor(size, **counted)])
    *totals, count = task.trainer.strategy.reduce(local, reduce_op="sum")
    return {name: (total / count).float() for name, total in zip(sums, totals, strict=True)} if count else {}


def log_means(task: LightningModule, values: Mapping[str, Tensor], size: int) -> None:
    """Logs scalars, means over this rank's `size` clips, as means over those of all ranks, which must call this
    together.

    Only at the steps that loggers write: one collective there, and none at the others.
    """
    if not logs_now(task):
        return
    for name, mean in means_of(task, {name: size * value.double() for name, value in values.items()}, size).items():
        task.log(name, mean, prog_bar=name == "train/loss", batch_size=size)


class ValidationMeans:
    """Of scalars over all clips of a validation, however they are shared out between ranks.

    Lightning's own, sync_dist=True, divides by a rounded number of clips where ranks have unequal ones.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.size = 0

    def add(self, values: Mapping[str, Tensor], size: int) -> None:
        """Means over a batch of `size` clips."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + size * value.detach().double()
        self.size += size

    def log(self, task: LightningModule) -> None:
        """All ranks call it at the end of the validation, each with the same names."""
        for name, mean in means_of(task, self.sums, self.size).items():
            task.log(name, mean, prog_bar=name == "val/loss")
        self.sums, self.size = {}, 0
