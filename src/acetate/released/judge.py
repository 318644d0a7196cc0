"""The released judge: a map of three values on the latent grid, and a clamp over all cells."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acetate import regions


def clamped_mean(error: Tensor, alpha: Tensor, time_stride: int, space_stride: int) -> Tensor:
    """Returns clamp(map * error, 0, 1).mean(), error (B, C, F, h, w) already weighted.

    The clamp makes it one-sided: only opaque cells, and only errors below 1, have a gradient.
    """
    return (error * three_valued_map(alpha, time_stride, space_stride)).clamp(0, 1).mean()


def three_valued_map(alpha: Tensor, time_stride: int, space_stride: int) -> Tensor:
    """Returns the released three-valued map, int8 (B, 1, F, h, w).

    1: the cell's mean alpha is 1; -1: its mean is 0, or (frame 0) it is not opaque, or (later
    frames) every pixel is strictly semi-transparent; 0: the rest. Equality is numpy's isclose on
    alpha in [-1, 1] (rtol 1e-5, atol 1e-8), so that one 254 in a cell makes it non-opaque.
    """
    regions.check_clip_shape(*alpha.shape[2:], time_stride, space_stride)
    signed = alpha.float() * 2 - 1

    def close_to(x: Tensor, end: float) -> Tensor:
        return (x - end).abs() <= 1e-8 + 1e-5 * abs(end)

    def mean(x: Tensor, frames: int) -> Tensor:
        return F.avg_pool3d(x, (frames, space_stride, space_stride))

    first, later = signed[:, :, :1], signed[:, :, 1:]
    opaque = close_to(mean(first, 1), 1)
    mask = opaque.to(torch.int8) * 2 - 1
    if later.shape[2] == 0:
        return mask
    average = mean(later, time_stride)
    at_end = (close_to(later, 1) | close_to(later, -1)).float()
    semi = (
        regions.largest_per_cell(
            torch.cat([at_end[:, :, :1], at_end], 2), time_stride, space_stride
        )[:, :, 1:]
        == 0
    )
    rest = torch.zeros_like(average, dtype=torch.int8)
    rest[close_to(average, 1)] = 1
    rest[close_to(average, -1) | semi] = -1
    return torch.cat([mask, rest], 2)
