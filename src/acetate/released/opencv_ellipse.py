"""Fills ellipses as OpenCV does on a batch of grids, to the pixel: this decides how far the
released fit grows its axes.

cv::ellipse draws a polygon of few corners whose rows and outline round differently from the ellipse
itself. Only reproducing the released masks needs this; `regions.fit_ellipses` by default asks the
ellipse.
"""

import torch
from torch import Tensor

ONE = 1 << 16  # OpenCV's fixed point
HALF = ONE >> 1
CORNERS = 72  # at most: one every 5 degrees


def inside(centre: Tensor, lengths: Tensor, angle: Tensor, height: int, width: int) -> Tensor:
    """Returns the pixels in ellipses at any place, (N, 2), (N, 2), (N,) -> bool (N, height, width),
    rounded as the released code does."""
    last = torch.tensor([width - 1, height - 1], device=centre.device)
    place = centre.round().long().clamp(torch.zeros_like(last), last)
    half = (lengths / 2).round().long().clamp_min(1)
    return filled(place, half, angle.round().long(), height, width)


def filled(centre: Tensor, half_axes: Tensor, angle: Tensor, height: int, width: int) -> Tensor:
    """Fills ellipses of (N, 2) integer centres (x, y) and half axes, (N,) integer degrees -> bool
    (N, height, width)."""
    x, y = _polygon(centre, half_axes, angle)
    return _rows(x, y, height, width) | _outline(x, y, height, width)


def _polygon(centre: Tensor, half_axes: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Returns corners in fixed point, (N, CORNERS + 1), the first again at the end; fewer are
    padded with the last."""
    longest = half_axes.amax(1)
    step = torch.where(
        longest < 3, 90, torch.where(longest < 10, 30, torch.where(longest < 15, 18, 5))
    )
    at = (torch.arange(CORNERS + 1, device=step.device) * step[:, None]).clamp_max(360)
    turn, at = torch.deg2rad(angle.double())[:, None], torch.deg2rad(at.double())
    # OpenCV reads sines from a table of seven digits
    cos_at, sin_at, cos, sin = (
        torch.round(f, decimals=7) for f in (at.cos(), at.sin(), turn.cos(), turn.sin())
    )
    u, v = half_axes[:, :1].double() * ONE * cos_at, half_axes[:, 1:].double() * ONE * sin_at
    x = centre[:, :1].double() * ONE + u * cos - v * sin
    y = centre[:, 1:].double() * ONE + u * sin + v * cos
    x[:, -1], y[:, -1] = x[:, 0], y[:, 0]
    return x.round().long(), y.round().long()


def _round(fixed: Tensor) -> Tensor:
    return (fixed + HALF) >> 16


def _rows(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Fills between the two edges of every row; corners lie on whole rows, and the last row is the
    outline's."""
    start, end = _round(y[:, :-1]), _round(y[:, 1:])
    downwards = start < end
    top, bottom = torch.where(downwards, start, end), torch.where(downwards, end, start)
    x_top = torch.where(downwards, x[:, :-1], x[:, 1:])
    x_bottom = torch.where(downwards, x[:, 1:], x[:, :-1])
    rows = bottom - top
    slope = torch.div((x_bottom - x_top) * 2 + rows, (2 * rows).clamp_min(1), rounding_mode="trunc")
    row = torch.arange(height, device=x.device)[:, None]  # (h, 1) against (N, 1, edges)
    crossed = (top[:, None] <= row) & (row < bottom[:, None])
    at = x_top[:, None] + (row - top[:, None]) * slope[:, None]
    left = _round(at.masked_fill(~crossed, width * 4 * ONE)).amin(2, keepdim=True)
    right = _round(at.masked_fill(~crossed, -width * 4 * ONE)).amax(2, keepdim=True)
    column = torch.arange(width, device=x.device)
    return (left <= column) & (column <= right)


def _outline(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Draws lines between corners, one pixel for every step along the longer side."""
    x1, y1, x2, y2 = x[:, :-1], y[:, :-1], x[:, 1:], y[:, 1:]
    x1, y1, x2, y2, seen = _clip(x1, y1, x2, y2, width * ONE - 1, height * ONE - 1)
    flat = (x2 - x1).abs() > (y2 - y1).abs()
    # (a, b): along the longer side and across it, from the smaller a to the larger
    a1, b1 = torch.where(flat, x1, y1), torch.where(flat, y1, x1)
    a2, b2 = torch.where(flat, x2, y2), torch.where(flat, y2, x2)
    swap = a2 < a1
    a1, a2 = torch.where(swap, a2, a1), torch.where(swap, a1, a2)
    b1, b2 = torch.where(swap, b2, b1), torch.where(swap, b1, b2)
    slope = torch.div((b2 - b1) << 16, (a2 - a1) | 1, rounding_mode="trunc")
    steps = torch.arange(max(height, width) + 1, device=x.device)
    drawn = (steps <= ((a2 - a1) >> 16)[..., None]) & seen[..., None]
    a = _round(a1)[..., None] + steps
    b = _round(b1[..., None] + steps * slope[..., None])
    # OpenCV draws the end of a line by itself: the larger a, since both were swapped
    a, b = torch.cat([a, _round(a2)[..., None]], 2), torch.cat([b, _round(b2)[..., None]], 2)
    drawn = torch.cat([drawn, seen[..., None]], 2)
    column, row = torch.where(flat[..., None], a, b), torch.where(flat[..., None], b, a)
    drawn &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    grid = torch.zeros(len(x), height * width, dtype=torch.bool, device=x.device)
    place = torch.where(drawn, row * width + column, 0).flatten(1)
    return grid.scatter_reduce(1, place, drawn.flatten(1), "amax").view(-1, height, width)


def _clip(
    x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, right: int, bottom: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Moves ends onto the picture's border and returns which lines are seen at all; Cohen and
    Sutherland."""
    seen = (torch.maximum(y1, y2) >= 0) & (torch.minimum(y1, y2) <= bottom)
    y1, x1 = _clip_end(y1, x1, y2, x2, bottom)
    y2, x2 = _clip_end(y2, x2, y1, x1, bottom)
    seen &= (torch.maximum(x1, x2) >= 0) & (torch.minimum(x1, x2) <= right)
    x1, y1 = _clip_end(x1, y1, x2, y2, right)
    x2, y2 = _clip_end(x2, y2, x1, y1, right)
    return x1, y1, x2, y2, seen


def _clip_end(
    a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor, last: int
) -> tuple[Tensor, Tensor]:
    """Moves the end (a, b) along its line to 0 <= a <= last where it lies outside."""
    border = a.clamp(0, last)
    run = torch.where(other_a == a, 1, other_a - a)
    shift = ((border - a).double() * (other_b - b).double() / run.double()).long()
    moved = (border != a) & (other_a != a)
    return torch.where(moved, border, a), torch.where(moved, b + shift, b)
