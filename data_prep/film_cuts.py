"""Finds where a film is cut from one shot to another, and whether its coverage flickers: by
thumbnails, as its pictures come."""

from array import array
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Frames = NDArray[np.uint8]
Thumbnail = NDArray[np.float32]

THUMB = 32  # pixels, side of the pictures that shots are compared by
SHOT = 4  # frames of the shortest shot
SEEN = 5e-4  # mean alpha of its fullest frame under which a clip is empty


def weighted(frame: Frames) -> Tensor:
    """Turns (H, W, 4) into colour times alpha, and alpha: (4, H, W) in [0, 1]."""
    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float() / 255
    return torch.cat((picture[:3] * picture[3:], picture[3:]))


def thumbnail(planes: Frames) -> Thumbnail:
    """Shrinks (4, H, W) of a picture to (4, h, w), h and w at most THUMB: means of colour times
    alpha, and of alpha, in [0, 1]."""
    height, width = planes.shape[1:]
    picture = torch.from_numpy(planes).float()
    picture[:3] *= picture[3] / 255
    return (_pooling(height) @ picture @ _pooling(width).T).div_(255).numpy()


@lru_cache(maxsize=16)
def _pooling(side: int) -> Tensor:
    """Returns a matrix (at most THUMB, side) that takes the means of its parts, which share their
    border pixels, as adaptive pooling does."""
    count = min(THUMB, side)
    places, parts = torch.arange(side), torch.arange(count)[:, None]
    first, last = parts * side // count, -(-(parts + 1) * side // count)
    inside = ((places >= first) & (places < last)).float()
    return inside / inside.sum(dim=1, keepdim=True)


def change(first: Thumbnail, second: Thumbnail) -> float:
    """Returns how much of two thumbnails was exchanged, in [0, 1]: the smaller of the shares of
    alpha that go and that come.

    What stays has the same straight colour, at the same brightness or at another one that all
    share. So what fades, flashes, appears or leaves changes little: nothing else goes, or nothing
    else comes.
    """
    alphas = first[3], second[3]
    colors = [picture[:3] / np.maximum(picture[3], 1e-3) for picture in (first, second)]
    means = [
        float((color * alpha).sum()) / max(float(alpha.sum()), 1e-6)
        for color, alpha in zip(colors, alphas, strict=True)
    ]
    both = np.minimum(*alphas)
    least = max(min(float(alpha.sum()) for alpha in alphas), 1e-6)
    shares = []
    for gain in (1.0, means[0] / max(means[1], 1e-6)):
        apart = np.abs(colors[0] - np.float32(gain) * colors[1]).max(axis=0)
        shares.append(1 - float((both * np.maximum(1 - 4 * apart, 0)).sum()) / least)
    return min(shares)


class Shots:
    """First frames of new shots.

    A cut exchanges half of the picture, and by a third of it more than any of the frames around do,
    and for good: the four frames before differ as much from the four after. Fast motion changes all
    frames alike, a flash comes back. A shot has at least SHOT frames, and shows something.
    """

    def __init__(self) -> None:
        self.coverage = array("d")  # mean alpha of each frame
        self._steps = array("d")  # how much each exchanges of the one before
        self._near = deque[Thumbnail](maxlen=2 * SHOT)
        self._candidates: list[tuple[int, float]] = []  # frame, and the most around it

    def add(self, thumb: Thumbnail) -> None:
        """Adds a frame. thumb: the next frame's, (4, h, w)."""
        self._steps.append(change(self._near[-1], thumb) if self._near else 0.0)
        self.coverage.append(float(thumb[3].mean()))
        self._near.append(thumb)
        place = len(self._steps) - SHOT
        if place < SHOT:
            return
        step = self._steps[place]
        around = max(self._steps[i] for i in range(max(1, place - 2), place + 3) if i != place)
        if step < max(0.5, around + 0.3):
            return
        before, after = [*self._near][:SHOT], [*self._near][SHOT:]
        if min(change(first, second) for first in before for second in after) >= 0.8 * step:
            self._candidates.append((place, around))

    def found(self) -> tuple[tuple[int, ...], str]:
        """Returns the cuts, and why."""
        least = 0.02 * max(self.coverage, default=0)
        found: list[int] = []
        told = []
        for place, around in self._candidates:
            shows = self.coverage[place - 1] > least and self.coverage[place] > least
            if shows and place - (found or [0])[-1] >= SHOT:
                found.append(place)
                told.append(
                    f"{place} ({self._steps[place]:.0%} of the picture is exchanged, at most "
                    f"{around:.0%} around it)"
                )
        return tuple(found), f"new shots at frame {', '.join(told)}" if told else ""


def flicker(coverages: Sequence[float], shots: tuple[int, ...] = ()) -> float:
    """Returns the share of the frames whose mean alpha is off that of its two neighbours by more
    than a quarter.

    A single flash sets three frames off, and is no flicker.
    """
    coverage = np.asarray(coverages)
    middle, around = coverage[1:-1], (coverage[:-2] + coverage[2:]) / 2
    most = np.maximum(middle, np.maximum(coverage[:-2], coverage[2:])).clip(SEEN)
    jumps = np.abs(middle - around) > most / 4
    beside = [i - 1 for shot in shots for i in (shot - 1, shot) if 0 <= i - 1 < len(jumps)]
    jumps[beside] = False
    return float(jumps.mean()) if jumps.sum() > 3 else 0.0
