"""Shows stored pixels as they are meant: cropped, with pixels that are not square stretched,
mirrored and turned."""

import struct
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acetate.media.clip import MediaError, Rect

# EXIF orientation -> counterclockwise quarter turns, after a mirror image where it says so.
TURNS = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (1, True),
    6: (3, False),
    7: (3, True),
    8: (1, False),
}
# The same by the signs of a display matrix' a, b, c, d: x' = a x + c y, y' = b x + d y
MATRICES = {
    (1, 0, 0, 1): (0, False), (-1, 0, 0, -1): (2, False), (-1, 0, 0, 1): (0, True),
    (1, 0, 0, -1): (2, True), (0, 1, -1, 0): (3, False), (0, -1, 1, 0): (1, False),
    (0, 1, 1, 0): (1, True), (0, -1, -1, 0): (3, True),
}  # fmt: skip
WIDEST_PIXEL = 8  # an aspect ratio beyond this is damage
SQUARE = 0.01  # ratios nearer to 1 come from rounded densities
Pixels = TypeVar("Pixels", NDArray[np.uint8], NDArray[np.float32])


class Placement(NamedTuple):
    """The steps from stored to shown pixels, in this order. crop: in stored pixels; aspect: width
    of a pixel by its height; turns: counterclockwise quarters."""

    crop: Rect | None = None
    aspect: float = 1.0
    mirrored: bool = False
    turns: int = 0

    def apply(self, picture: Pixels) -> Pixels:
        """Places (H, W) or (H, W, C). Pixels are stretched along their longer side, channel by
        channel."""
        if self.crop is not None:
            x, y, width, height = self.crop
            picture = picture[y : y + height, x : x + width]
        if self.aspect != 1:
            size = self._stretched(picture.shape[1], picture.shape[0])
            planes = [picture] if picture.ndim == 2 else list(np.moveaxis(picture, -1, 0))
            planes = [
                np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))
                for plane in planes
            ]
            picture = cast(Pixels, planes[0] if picture.ndim == 2 else np.stack(planes, axis=-1))
        return cast(Pixels, np.rot90(picture[:, ::-1] if self.mirrored else picture, self.turns))

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the size of the picture as it is shown."""
        if self.crop is not None:
            width, height = self.crop[2:]
        width, height = self._stretched(width, height)
        return (height, width) if self.turns % 2 else (width, height)

    def notes(self) -> list[str]:
        said = []
        if self.crop is not None:
            x, y, width, height = self.crop
            said.append(f"cropped to {width}x{height} at {x}, {y}, as the file says")
        if self.aspect != 1:
            said.append(f"pixels of {self.aspect:.4g}:1 made square")
        if self.mirrored:
            said.append("mirrored, as the file says")
        if self.turns:
            said.append(f"turned by {90 * self.turns} degrees, as the file says")
        return said

    def _stretched(self, width: int, height: int) -> tuple[int, int]:
        if self.aspect >= 1:
            return round(width * self.aspect), height
        return width, round(height / self.aspect)


def oriented(orientation: int, aspect: float = 1.0) -> Placement:
    """Returns the placement of EXIF's orientation."""
    turns, mirrored = TURNS.get(orientation, (0, False))
    return Placement(None, aspect, mirrored, turns)


def aspect_of(ratio: float | None) -> float:
    """Returns the ratio, or 1 for what is square but for rounding, and for damage."""
    if not ratio or not 1 / WIDEST_PIXEL <= ratio <= WIDEST_PIXEL or abs(ratio - 1) < SQUARE:
        return 1.0
    return float(ratio)


def turned_by(matrix: bytes | None) -> tuple[int, bool]:
    """Returns quarter turns and whether mirrored, of a display matrix: nine integers of 16.16.
    Raises MediaError for a matrix that does anything else."""
    if matrix is None or len(matrix) < 36:
        return 0, False
    a, b, _, c, d = struct.unpack("<5i", matrix[:20])
    most = max(map(abs, (a, b, c, d)))
    if not most:
        return 0, False
    signs = tuple(round(value / most) for value in (a, b, c, d))
    exact = all(
        abs(value / most - sign) < 0.01 for value, sign in zip((a, b, c, d), signs, strict=True)
    )
    if signs not in MATRICES or not exact:
        degrees = np.degrees(np.arctan2(b, a))
        raise MediaError(
            f"it is to be shown turned by {degrees:.0f} degrees; only quarter turns are read. Turn "
            "it with an editor, or take the rotation out of the file"
        )
    return MATRICES[signs]
