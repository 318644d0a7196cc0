"""Small drawn clips for metrics: a disc that moves over the frame."""

import pytest
import torch
import torch.distributed as dist

from tests.processes import launch

HEIGHT, WIDTH = 64, 96
SHARES = ((0, 1, 2), (3,))  # batches of rank 0 and of rank 1; batch i holds 1 + i clips


def disc(frames=8, speed=3.0, soft=6.0, shift=0.0, radius=16.0):
    """Alpha (1, 1, T, 64, 96) of a disc whose edge is a ramp of `soft` pixels."""
    y, x = torch.arange(float(HEIGHT))[:, None], torch.arange(float(WIDTH))[None]
    t = torch.arange(float(frames))[:, None, None]
    distance = ((x - 28 - speed * t - shift) ** 2 + (y - 30) ** 2).sqrt()
    return ((radius - distance) / soft + 0.5).clamp(0, 1)[None, None]


def painted(alpha, speed=3.0):
    """rgb of a pattern that goes along, black where alpha is 0."""
    frames = alpha.shape[2]
    y, x = torch.arange(float(HEIGHT))[:, None], torch.arange(float(WIDTH))[None]
    t = torch.arange(float(frames))[:, None, None]
    wave = 0.6 + 0.4 * torch.sin((x - speed * t) / 2) * torch.sin(y / 3)
    unit = torch.stack([wave, 1 - 0.5 * wave, 0.8 * wave]) * (alpha[0] > 0)
    return unit[None] * 2 - 1


def plain(alpha, color):
    """rgb of one color in [0, 1] everywhere."""
    unit = torch.tensor(color)[None, :, None, None, None]
    return (unit * 2 - 1).expand(len(alpha), 3, *alpha.shape[2:])


def late(video, frames):
    """The video behind by so many frames; its first one stands still."""
    return torch.cat([video[:, :, :1]] * frames + [video[:, :, : video.shape[2] - frames]], 2)


def figures(metric, *videos, **settings):
    metric.update(*videos, **settings)
    return {name: float(value) for name, value in metric.compute().items()}


def of_batches(make, clips, batches):
    metric = make()
    for index in batches:
        metric.update(*clips(1 + index, index))
    return {name: float(value) for name, value in metric.compute().items()}


def of_rank(make, clips):
    return of_batches(make, clips, SHARES[dist.get_rank()])


def check_unequal_shares(make, clips):
    """Two ranks with unequal shares equal one process. clips(size, seed) draws a batch."""
    alone = of_batches(make, clips, range(4))
    for together in launch(2, of_rank, make, clips):
        assert together == pytest.approx(alone, rel=1e-6)
