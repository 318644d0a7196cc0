"""Scores by which data_prep.filter judges a clip: a few numbers, and a hash of how it looks."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from acetate.data.shards import Clip
from acetate.regions import MIXED, cells
from data_prep.looks import Plane, colors, colors_apart, look, over_grey, premultiplied

# Frames and pixels that a latent cell of Wan2.1 sees; one grid for all bases, so that scores
# compare.
TIME_STRIDE, SPACE_STRIDE = 4, 8
SCORES = {
    "frames": "how many",
    "short_side": "pixels",
    "long_side": "pixels",
    "coverage": "mean alpha",
    "semi": "share of latent cells (8x8 pixels, 4 frames) that are neither all opaque nor all "
    "empty",
    "motion": "mean change per frame of premultiplied colour and alpha, where anything is seen; 0 "
    "for a still",
    "flicker": "mean alpha that goes from one frame to the next and back again, where anything is "
    "seen",
    "sharpness": "95th percentile of the Laplacian of the middle frame over grey, where anything "
    "is seen",
}


def score(clip: Clip) -> tuple[dict[str, float], str, list[list[int]]]:
    """Returns the SCORES, all but frames and sides in [0, 1]; `look` as 32 hexadecimal digits; and
    `colors`."""
    frames = clip.frames
    change, flicker = over_time(frames)
    middle = frames[len(frames) // 2]
    values = {
        "frames": len(frames),
        "short_side": min(frames.shape[1:3]),
        "long_side": max(frames.shape[1:3]),
        "coverage": float(frames[..., 3].mean()) / 255,
        "semi": semi(frames[..., 3]),
        "motion": change,
        "flicker": flicker,
        "sharpness": sharpness(middle),
    }
    return {name: round(value, 6) for name, value in values.items()}, look(middle), colors(middle)


def semi(alpha: NDArray[np.uint8]) -> float:
    """Returns the share of cells of alpha (T, H, W) that are mixed; the last frame, row and column
    are repeated to fill the grid."""
    frames, height, width = alpha.shape
    pad = (
        (0, -(frames - 1) % TIME_STRIDE),
        (0, -height % SPACE_STRIDE),
        (0, -width % SPACE_STRIDE),
    )
    full = torch.from_numpy(np.pad(alpha, pad, mode="edge"))[None, None].float() / 255
    return float((cells(full, TIME_STRIDE, SPACE_STRIDE) == MIXED).float().mean())


def over_time(frames: NDArray[np.uint8]) -> tuple[float, float]:
    """Returns motion and flicker. Frame by frame: floats of a whole clip can take gigabytes."""
    change = back = 0.0
    seen = seen_twice = 0
    before: Plane | None = None
    step: Plane | None = None
    for frame in map(premultiplied, frames):
        if before is not None:
            difference = frame - before
            visible = np.maximum(frame[..., 3], before[..., 3]) > 0
            change += float(np.abs(difference).mean(axis=-1)[visible].sum())
            seen += int(visible.sum())
            new = difference[..., 3]
            if step is not None:
                turned = np.where(new * step < 0, np.minimum(np.abs(new), np.abs(step)), 0)
                back += float(turned.sum())
                seen_twice += int(visible.sum())
            step = new
        before = frame
    return change / max(1, seen), back / max(1, seen_twice)


def sharpness(frame: NDArray[np.uint8]) -> float:
    visible = frame[..., 3] > 0
    if not visible.any():
        return 0.0
    luma = np.pad(over_grey(frame), 1, mode="edge")
    middle = luma[1:-1, 1:-1]
    around = (luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]) / 4
    return float(np.percentile(np.abs(middle - around)[visible], 95))


def repeats(
    looks: Sequence[str], shades: Sequence[Sequence[Sequence[int]]], distance: int, color: int
) -> list[tuple[int, int] | None]:
    """Returns for each look (an earlier one that repeats none, bits that differ), where that is
    within `distance` and the `colors` (shades) are within `color`: the hashes see brightness alone.

    The bits are cut into distance + 1 parts: looks that differ in so few agree in at least one of
    them. Each part mixes bits of colour and alpha, since many clips share one of the two.
    """
    if not looks:
        return []
    tints = np.array(shades, np.int64)
    packed = np.frombuffer(bytes.fromhex("".join(looks)), np.uint8).reshape(len(looks), -1)
    bits = np.unpackbits(packed, axis=1)
    mixed = np.arange(bits.shape[1]).reshape(2, -1).T.reshape(-1)
    parts = [
        np.packbits(bits[:, columns], axis=1) for columns in np.array_split(mixed, distance + 1)
    ]
    tables = [defaultdict[bytes, list[int]](list) for _ in parts]
    found: list[tuple[int, int] | None] = []
    for i in range(len(looks)):
        names = [part[i].tobytes() for part in parts]
        near = sorted(
            {j for table, name in zip(tables, names, strict=True) for j in table.get(name, ())}
        )
        near = [
            j
            for j, far in zip(near, colors_apart(tints[i], tints[near]), strict=True)
            if far <= color
        ]
        apart = (bits[near] != bits[i]).sum(axis=1)
        if len(near) and apart.min() <= distance:
            found.append((near[int(apart.argmin())], int(apart.min())))
        else:
            found.append(None)
            for table, name in zip(tables, names, strict=True):
                table[name].append(i)
    return found
