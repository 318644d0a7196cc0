"""Losses and logged numbers of the whole batch, not of one rank's part."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric

from acetate.losses.ranks import sum_over_ranks
from acetate.steps import ends_step, logs_step


def clips_in(batch: Mapping[str, Any]) -> int:
    """Counts the clips of this rank's batch; 0 where a blank one, which has no key, stands in for
    clips that are all bad."""
    return sum(map(bool, batch["key"]))


def share_of(task: LightningModule, loss: Tensor, size: int, whole: Tensor | float = 0.0) -> Tensor:
    """Weights a loss of this rank's `size` clips so that its mean over the ranks, which must call
    this together, is that of all clips. whole: the part of it that is that of all clips on every
    rank."""
    if not size:
        loss = 0 * loss
    if task.trainer.world_size == 1:
        return loss
    # Lightning's reduce waits for the GPU
    total = sum_over_ranks(torch.full((), float(size), device=loss.device))
    weight = size * task.trainer.world_size / total.clamp_min(1)
    return loss + (weight - 1) * (loss - whole) if size else loss


def means_of(task: LightningModule, sums: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Turns sums over this rank's `size` clips into means over those of all ranks, which must call
    this together.

    Nothing where there are no clips. In float64, in which the mean of equal numbers is that number.
    """
    counted = {"device": task.device, "dtype": torch.float64}
    values = [value.detach().to(**counted) for value in sums.values()]
    local = torch.stack([*values, torch.full((), size, **counted)])
    *totals, count = task.trainer.strategy.reduce(local, reduce_op="sum")
    if not count:
        return {}
    return {name: (total / count).float() for name, total in zip(sums, totals, strict=True)}


class Means:
    """Averages scalars over all clips that were added, on all ranks, however these share them out.

    Lightning's own, sync_dist=True, divides by a rounded number of clips where ranks have unequal
    ones, and of the batches that are accumulated for a step it keeps the last.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.size = 0

    def add(self, values: Mapping[str, Tensor], size: int) -> None:
        """Adds means over a batch of `size` clips of this rank."""
        for name, value in values.items():
            value = value.detach().double()
            share = size * value if size else torch.zeros_like(value)  # a blank clip's may be NaN
            self.sums[name] = self.sums.get(name, 0.0) + share
        self.size += size

    def take(self, task: LightningModule) -> dict[str, Tensor]:
        """Returns the means and begins anew. All ranks call it, each with the same names."""
        means = means_of(task, self.sums, self.size)
        self.sums, self.size = {}, 0
        return means

    def log(self, task: LightningModule) -> None:
        """Logs the means of a validation, at its end."""
        for name, mean in self.take(task).items():
            task.log(name, mean, prog_bar=name == "val/loss")


def step_means(
    task: LightningModule, means: Means, values: Mapping[str, Tensor], size: int
) -> dict[str, Tensor]:
    """Adds a training batch's values; at the end of an optimizer step that is logged, returns their
    means over all its batches and ranks, in one collective; else nothing."""
    if not logs_step(task):
        return {}
    means.add(values, size)
    return means.take(task) if ends_step(task) else {}


def log_means(task: LightningModule, means: Means, values: Mapping[str, Tensor], size: int) -> None:
    """Logs the result of `step_means`."""
    for name, mean in step_means(task, means, values, size).items():
        task.log(name, mean, prog_bar=name == "train/loss", batch_size=max(1, size))


def log_quality(task: LightningModule, **metrics: Metric) -> None:
    """Logs what each metric measured in a validation, on all ranks, as val/NAME/..., and resets
    it."""
    for name, metric in metrics.items():
        task.log_dict(
            {f"val/{name}/{key}": value for key, value in metric.compute().items()}, sync_dist=True
        )
        metric.reset()
