"""The look of a picture in a few bytes: perceptual hashes and mean colours."""

from collections.abc import Sequence
from typing import NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

TENTH = 26  # of 255
SIDE = 128  # pixels that a picture is reduced to, about, to compare it with its neighbours
# Of two pictures that follow each other in one animation, 82 to 100 % are within both in 18 real
# ones; of two different things, 2 % at most.
ALIKE_BITS, ALIKE_COLOR = 32, 48
Plane = NDArray[np.floating]


class Look(NamedTuple):
    """hashes: as `look`; shades: as `colors`."""

    hashes: str
    shades: Sequence[Sequence[int]]


def look_of(frame: NDArray[np.uint8]) -> Look:
    """Returns the look of a picture (H, W, 4), which is reduced first."""
    factor = max(1, min(frame.shape[:2]) // SIDE)
    small = np.asarray(Image.fromarray(frame).reduce(factor)) if factor > 1 else frame
    return Look(look(small), colors(small))


def alike(one: Look, other: Look) -> bool:
    """Returns whether they could be neighbours in one animation."""
    apart = int(one.hashes, 16) ^ int(other.hashes, 16)
    shades = np.array(one.shades, np.int64), np.array([other.shades], np.int64)
    return apart.bit_count() <= ALIKE_BITS and int(colors_apart(*shades)[0]) <= ALIKE_COLOR


def premultiplied(frame: NDArray[np.uint8]) -> Plane:
    """Returns (H, W, 4) in [0, 1]: what alpha hides does not count."""
    unit = frame.astype(np.float32) / 255
    unit[..., :3] *= unit[..., 3:]
    return unit


def over_grey(frame: NDArray[np.uint8]) -> Plane:
    """Returns luma (H, W) in [0, 1], Rec. 709."""
    unit = premultiplied(frame)
    return unit[..., :3] @ np.array([0.2126, 0.7152, 0.0722], np.float32) + 0.5 * (1 - unit[..., 3])


def look(frame: NDArray[np.uint8]) -> str:
    """Returns perceptual hashes of the frame over grey and of its alpha, 64 bits each."""
    planes = ((over_grey(frame) * 255).round().astype(np.uint8), frame[..., 3])
    return "".join(str(imagehash.phash(Image.fromarray(plane))) for plane in planes)


def colors(frame: NDArray[np.uint8]) -> list[list[int]]:
    """Returns mean red, green and blue of what is seen, and how much that is, 0..255 each: of the
    frame and of its quarters."""
    weight = frame[..., 3:].astype(np.float32)
    shown = weight * frame[..., :3]
    middle = [side // 2 for side in weight.shape[:2]]
    halves = [(slice(0, max(1, place)), slice(place, None)) for place in middle]
    found = []
    for rows, columns in [
        (slice(None), slice(None)),
        *((r, c) for r in halves[0] for c in halves[1]),
    ]:
        seen = float(weight[rows, columns].sum())
        mean = shown[rows, columns].sum(axis=(0, 1)) / max(seen, 1.0)
        found.append(
            [
                *(round(float(value)) for value in mean),
                round(255 * seen / max(float(weight.sum()), 1.0)),
            ]
        )
    return found


def colors_apart(one: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns, of `colors`, (5, 4) and (N, 5, 4), the largest difference of a mean, where both show
    a tenth of the thing."""
    both = np.minimum(one[..., 3], others[..., 3]) >= TENTH
    return (np.abs(one[..., :3] - others[..., :3]).max(axis=-1) * both).max(axis=-1)
