"""Sums over the whole batch where each rank has a part of it; in training the ranks must call these
together."""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Returns the sum of values over the ranks, the same on each; the values themselves on one
    process.

    Its gradient reaches this rank's values times the number of ranks, so that the mean over the
    ranks, which DDP and FSDP take of gradients, is the gradient that one process has for the whole
    batch. Where no gradients are kept, in validation, ranks may have unequal numbers of batches:
    the values are this rank's alone, and what is no mean over clips has to be taken of each clip by
    itself.
    """
    if not (torch.is_grad_enabled() and dist.is_initialized()):
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (values - values.detach())


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance (unbiased) per row of (C, N), over those of all ranks, in fp32; 0
    where there are none."""
    values = values.float()
    count = values.new_full((len(values),), values.shape[1])
    count, total, squares = sum_over_ranks(
        torch.stack([count, values.sum(1), values.square().sum(1)])
    )
    mean = total / count.clamp_min(1)
    return mean, (squares - count * mean**2) / (count - 1).clamp_min(1)
