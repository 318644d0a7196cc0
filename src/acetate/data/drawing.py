"""Tools for drawing procedural clips: a canvas of coordinates, layers, random parameters, signed
distances.

Space: x right, y down, origin at the centre of the frame, the short side is 1. Time: seconds at 16
frames/s. Fields broadcast as (C, T, H, W), colour in [0, 1].
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

FPS = 16
COLORS = {  # in order of hue
    "crimson": "c8203c", "coral": "ff6f59", "orange": "f58a1f", "golden": "f2b632",
    "lime": "9ccc3c",
    "emerald": "1f9d6b", "teal": "159a9c", "sky blue": "4db5ee", "royal blue": "2f55d4",
    "violet": "7d4be0",
    "magenta": "d63bb0", "pink": "f78fb3",
}  # fmt: skip
CORNERS = {
    "disc": 0,
    "ring": 0,
    "heart": 0,
    "flower": 0,
    "triangle": 3,
    "square": 4,
    "hexagon": 6,
    "star": 5,
}
TEXTURES = ("plain", "plain", "striped", "dotted", "ringed")
WHITE = torch.ones(())


Item = TypeVar("Item")


class Canvas(NamedTuple):
    x: Tensor  # broadcasts with (1, T, 1, W)
    y: Tensor  # broadcasts with (1, T, H, 1)
    t: Tensor  # (1, T, 1, 1)
    px: float  # side of a pixel


class Layer(NamedTuple):
    rgb: Tensor  # broadcasts to (3, T, H, W), in [0, 1]
    alpha: Tensor  # (1, T, H, W)


class Dice:
    """Draws random parameters from a key; the number of draws never depends on the size of the
    clip."""

    def __init__(self, *key: object):
        digest = hashlib.sha256(repr(key).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def reals(self, count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def real(self, low: float, high: float) -> float:
        return float(self.reals(1, low, high))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def pick(self, options: Sequence[Item]) -> Item:
        return options[self.integer(0, len(options) - 1)]

    def colors(self) -> tuple[str, Tensor, Tensor, Tensor]:
        """Draws a colour by name and value, a neighbour in hue, and a contrasting one."""
        codes, i = list(COLORS.values()), self.integer(0, len(COLORS) - 1)
        near, far = (i + self.pick((-1, 1))) % len(codes), (i + self.integer(3, 9)) % len(codes)
        return list(COLORS)[i], color(codes[i]), color(codes[near]), color(codes[far])

    def noise(self, channels: int, slope: float = 1.6, cycles: int = 14, size: int = 128) -> Tensor:
        """Draws periodic noise, amplitude f^-slope up to `cycles` a side, about [0, 1]: (1, C, size
        + 1, size + 1)."""
        white = torch.randn(channels, size, size, generator=self.generator)
        f = torch.hypot(
            torch.fft.fftfreq(size, 1 / size)[:, None], torch.fft.rfftfreq(size, 1 / size)
        )
        amplitude = f.clamp(min=1) ** -slope * ((f > 0) & (f <= cycles))
        tile = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(size, size))
        tile = 0.5 + 0.2 * tile / tile.std(dim=(1, 2), keepdim=True)
        return F.pad(tile[None], (0, 1, 0, 1), mode="circular")


def canvas_of(frames: int, height: int, width: int) -> Canvas:
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name}={value}; a clip needs at least 1")
    px = 1 / min(height, width)
    x = (torch.arange(width) + 0.5 - width / 2) * px
    y = (torch.arange(height) + 0.5 - height / 2) * px
    t = torch.arange(frames) / FPS
    return Canvas(x.view(1, 1, 1, -1), y.view(1, 1, -1, 1), t.view(1, -1, 1, 1), px)


def color(code: str) -> Tensor:
    """Reads 'rrggbb' into (3, 1, 1, 1) in [0, 1]."""
    return torch.tensor(list(bytes.fromhex(code))).view(3, 1, 1, 1) / 255


def mix(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    return a + (b - a) * weight


def smoothstep(low: float, high: float, value: Tensor) -> Tensor:
    """Rises from exactly 0 below low to exactly 1 above high."""
    s = ((value - low) / (high - low)).clamp(0, 1)
    return s * s * (3 - 2 * s)


def inside(distance: Tensor, px: float) -> Tensor:
    """Returns the coverage of a pixel by a straight edge at a signed distance (negative inside)."""
    return (0.5 - distance / px).clamp(0, 1)


def stack(bottom: Layer, top: Layer) -> Layer:
    """Lays a layer over another (Porter and Duff 1984, straight alpha); the bottom's colour extends
    to where nothing is drawn."""
    alpha = top.alpha + bottom.alpha * (1 - top.alpha)
    share = torch.where(alpha > 0, top.alpha / alpha.clamp(min=1e-12), 0)
    return Layer(mix(bottom.rgb, top.rgb, share), alpha)


def look_up(tile: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Looks a tile up, periodic and bilinear, at u and v in tile sides: -> (C, T, H, W)."""
    u, v = torch.broadcast_tensors(u, v)
    grid = torch.stack((u, v), dim=-1).remainder(1) * 2 - 1
    flat = F.grid_sample(tile, grid.reshape(1, 1, -1, 2), align_corners=True)
    return flat.view(-1, *u.shape[1:])


def splat(canvas: Canvas, px: Tensor, py: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
    """Sums bumps cos^2 x cos^2 of compact support: (N, T) each, weight (C, N, T) -> (C, T, H,
    W)."""

    def bump(axis: Tensor, centre: Tensor) -> Tensor:
        d = (axis - centre[..., None]) / radius[..., None]
        return (d.clamp(-1, 1) * (math.pi / 2)).cos().square() * (d.abs() < 1)

    # (N, T, W), (N, T, H)
    columns, rows = bump(canvas.x.squeeze(2), px), bump(canvas.y.squeeze(3), py)
    return torch.einsum("cnt,nth,ntw->cthw", weight, rows, columns)


def rotate(x: Tensor, y: Tensor, angle: Tensor | float) -> tuple[Tensor, Tensor]:
    """Returns coordinates in a figure that is turned clockwise by `angle`."""
    c, s = torch.as_tensor(angle).cos(), torch.as_tensor(angle).sin()
    return c * x + s * y, c * y - s * x


def box(x: Tensor, y: Tensor, a: float, b: float, corner: float) -> Tensor:
    """Returns the signed distance to a rounded box with half sides a and b."""
    dx, dy = x.abs() - (a - corner), y.abs() - (b - corner)
    return (
        torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0) - corner
    )


def figure(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Returns the signed distance, to first order near the edge, to a figure of radius 1."""
    r, n = torch.hypot(x, y), CORNERS[shape]
    if shape == "disc":
        return r - 1
    if shape == "ring":
        return (r - 0.72).abs() - 0.28
    if shape == "heart":  # a square on its corner, a half disc on each upper side
        a, b = (x.abs() - y) / math.sqrt(2) + 0.12, (x.abs() + y) / math.sqrt(2) - 0.12
        return torch.minimum(torch.maximum(a.abs(), b.abs()), torch.hypot(a - 0.62, b)) - 0.62
    angle = torch.atan2(x, -y)
    if shape == "flower":
        return (r - 0.82 - 0.18 * (6 * angle).cos()) * 0.75
    # Fold to half a corner; the edge runs from the outer vertex (1, 0) to the inner one, (1 + ex,
    # ey).
    inner = 0.45 if shape == "star" else math.cos(math.pi / n)
    a = ((angle + math.pi / n).remainder(2 * math.pi / n) - math.pi / n).abs()
    ex, ey = inner * math.cos(math.pi / n) - 1, inner * math.sin(math.pi / n)
    return ((r * a.cos() - 1) * ey - r * a.sin() * ex) / math.hypot(ex, ey)


def lit(rgb: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Lights a figure of radius 1 from the upper left."""
    return (rgb * (1.15 - 0.28 * torch.hypot(x + 0.5, y + 0.6).clamp(max=2))).clamp(0, 1)


def textured(dice: Dice) -> tuple[str, Callable[[Tensor, Tensor, float], Tensor]]:
    """Returns a name, and a paint of figure coordinates and the pixel's side in them: -> (3, T, H,
    W)."""
    name, first, near, far = dice.colors()
    style = dice.pick(TEXTURES)

    def paint(x: Tensor, y: Tensor, px: float) -> Tensor:
        if style == "plain":
            return mix(first, near, (0.5 + 0.5 * y).clamp(0, 1))
        if style == "dotted":
            edge = torch.hypot((2 * x).remainder(1) - 0.5, (2 * y).remainder(1) - 0.5) - 0.27
        else:
            edge = (
                (2 * (x if style == "striped" else torch.hypot(x, y))).remainder(1) - 0.5
            ).abs() - 0.25
        return mix(first, far, inside(edge / 2, px))

    return name if style == "plain" else f"{style} {name}", paint
