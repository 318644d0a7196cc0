"""Alpha on the latent grid: which latent cells see only opaque pixels, only empty ones, or anything else."""

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY, MIXED, OPAQUE = 0, 1, 2


def _pool(x: Tensor, time_stride: int, space_stride: int) -> Tensor:
    """Largest value per latent cell, (B, 1, T, H, W) -> (B, 1, F, h, w); cell 0 sees frame 0 only."""
    s = space_stride
    first = F.max_pool3d(x[:, :, :1], (1, s, s))
    if x.shape[2] == 1:
        return first
    return torch.cat([first, F.max_pool3d(x[:, :, 1:], (time_stride, s, s))], 2)


def check_clip_shape(frames: int, height: int, width: int, time_stride: int, space_stride: int) -> None:
    """Raises ValueError unless frames = time_stride * k + 1 and both sides are multiples of space_stride."""
    if frames < 1 or (frames - 1) % time_stride:
        lower = max(1, frames - (frames - 1) % time_stride)
        raise ValueError(
            f"{frames} frames; this VAE needs {time_stride}k+1 frames "
            f"({', '.join(str(1 + time_stride * k) for k in range(1, 4))}, ...). Use frames={lower}."
        )
    for name, side in (("height", height), ("width", width)):
        if side < space_stride or side % space_stride:
            raise ValueError(
                f"{name} {side}; this VAE needs multiples of {space_stride}. "
                f"Use {name}={max(space_stride, side - side % space_stride)}."
            )


def cells(alpha: Tensor, time_stride: int, space_stride: int, eps: float = 0.0) -> Tensor:
    """Region of every latent cell.

    alpha (B, 1, T, H, W) in [0, 1] -> int8 (B, 1, F, h, w): OPAQUE where all pixels that the cell sees are
    >= 1 - eps, EMPTY where all are <= eps, else MIXED. Raises ValueError for a shape the VAE cannot encode.
    """
    check_clip_shape(*alpha.shape[2:], time_stride, space_stride)
    lowest = -_pool(-alpha, time_stride, space_stride)
    highest = _pool(alpha, time_stride, space_stride)
    regions = torch.full_like(lowest, MIXED, dtype=torch.int8)
    regions[lowest >= 1 - eps] = OPAQUE
    regions[highest <= eps] = EMPTY
    return regions


def upstream_mask(alpha: Tensor, time_stride: int, space_stride: int) -> Tensor:
    """The released three-valued map, int8 (B, 1, F, h, w).

    1: the cell's mean alpha is 1; -1: its mean is 0, or (frame 0) it is not opaque, or (later frames) every
    pixel is strictly semi-transparent; 0: the rest. Equality is numpy's isclose on alpha in [-1, 1]
    (rtol 1e-5, atol 1e-8), so that one 254 in a cell makes it non-opaque.
    """
    check_clip_shape(*alpha.shape[2:], time_stride, space_stride)
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
    semi = _pool(torch.cat([at_end[:, :, :1], at_end], 2), time_stride, space_stride)[:, :, 1:] == 0
    rest = torch.zeros_like(average, dtype=torch.int8)
    rest[close_to(average, 1)] = 1
    rest[close_to(average, -1) | semi] = -1
    return torch.cat([mask, rest], 2)
