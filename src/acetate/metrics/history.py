"""Holds the last frames of a piece, for metrics that compare frames of long clips in pieces."""

from collections.abc import Sequence

import torch
from torch import Tensor


class History:
    """Frames that the update before ended with, at most `keep` of them."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.held: tuple[Tensor, ...] = ()

    def joined(self, videos: Sequence[Tensor], goes_on: bool) -> tuple[list[Tensor], int]:
        """Returns the videos (B, C, T, H, W) with the held frames before theirs where the clip goes
        on, and how many those are. Raises ValueError where nothing that fits came before.
        """
        before = self.held if goes_on else ()
        if goes_on and [_still(video) for video in before] != [_still(video) for video in videos]:
            raise ValueError("goes_on=true, but no piece of the same clips and size came before.")
        whole = [
            torch.cat([held, video], 2)
            for held, video in zip(before or [video[:, :, :0] for video in videos], videos,
                                   strict=True)
        ]  # fmt: skip
        self.held = tuple(video[:, :, -self.keep :].clone() for video in whole)
        return whole, before[0].shape[2] if before else 0

    def clear(self) -> None:
        self.held = ()


def _still(video: Tensor) -> tuple[int, ...]:
    """Returns the shape of a video without its length."""
    return (*video.shape[:2], *video.shape[3:])
