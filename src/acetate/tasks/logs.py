"""What training logs: numbers of the whole batch, not of one rank's part."""

from collections.abc import Mapping

import torch
from lightning import LightningModule
from torch import Tensor


def logs_now(task: LightningModule) -> bool:
    """Whether loggers write what this training step logs."""
    return task.trainer._logger_connector.should_update_logs


def log_means(task: LightningModule, values: Mapping[str, Tensor], size: int) -> None:
    """Logs scalars of this rank's `size` clips, each as its mean over the ranks, which must call this together.

    Only at the steps that loggers write: one collective there, and none at the others.
    """
    if not logs_now(task):
        return
    local = torch.stack([value.detach().float() for value in values.values()])
    means = task.trainer.strategy.reduce(local, reduce_op="mean")
    for name, mean in zip(values, means, strict=True):  # pyright: ignore[reportArgumentType]  a tensor as it was given
        task.log(name, mean, prog_bar=name == "train/loss", batch_size=size)
