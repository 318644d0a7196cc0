"""Alpha on the latent grid: opaque, empty and mixed cells, and the Gaussian ellipse around the
subject."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY, MIXED, OPAQUE = 0, 1, 2
# Of the ellipse around the subject, as published
SHAPE_COVERAGE, ORIENTATION_COVERAGE = 0.2, 0.9  # share of a cell's pixels
FEWEST_CELLS, SHORTEST_AXIS = 5, 2.0
GROWTH, INSIDE = 1.12, 0.98


def largest_per_cell(x: Tensor, time_stride: int, space_stride: int) -> Tensor:
    """Returns the largest value per latent cell, (B, 1, T, H, W) -> (B, 1, F, h, w); cell 0 sees
    frame 0 only."""
    return _pooled(F.max_pool3d, x, time_stride, space_stride)


def check_clip_shape(
    frames: int, height: int, width: int, time_stride: int, space_stride: int
) -> None:
    """Raises ValueError unless frames = time_stride * k + 1 and both sides are multiples of
    space_stride."""
    if frames < 1 or (frames - 1) % time_stride:
        lower = max(1, frames - (frames - 1) % time_stride)
        raise ValueError(
            f"{frames} frames; this VAE needs {time_stride}k+1 frames "
            f"({', '.join(str(1 + time_stride * k) for k in range(1, 4))}, ...). Use "
            f"frames={lower}."
        )
    for name, side in (("height", height), ("width", width)):
        if side < space_stride or side % space_stride:
            raise ValueError(
                f"{name} {side}; this VAE needs multiples of {space_stride}. Use "
                f"{name}={max(space_stride, side - side % space_stride)}."
            )


def cells(alpha: Tensor, time_stride: int, space_stride: int, eps: float = 0.0) -> Tensor:
    """Returns the region of every latent cell.

    alpha (B, 1, T, H, W) in [0, 1] -> int8 (B, 1, F, h, w): OPAQUE where all pixels that the cell
    sees are >= 1 - eps, EMPTY where all are <= eps, else MIXED. Raises ValueError for a shape the
    VAE cannot encode.
    """
    frames, height, width = alpha.shape[2:]
    check_clip_shape(frames, height, width, time_stride, space_stride)
    lowest = -largest_per_cell(-alpha, time_stride, space_stride)
    highest = largest_per_cell(alpha, time_stride, space_stride)
    regions = torch.full_like(lowest, MIXED, dtype=torch.int8)
    regions[lowest >= 1 - eps] = OPAQUE
    regions[highest <= eps] = EMPTY
    return regions


def coverage(alpha: Tensor, time_stride: int, space_stride: int) -> Tensor:
    """Returns the mean alpha of every latent cell, (B, 1, T, H, W) -> (B, 1, F, h, w)."""
    return _pooled(F.avg_pool3d, alpha, time_stride, space_stride)


def by_coverage(covered: Tensor, floor: float) -> Tensor:
    """Returns what the errors of cells count, like covered (B, 1, F, h, w) in [0, 1]: an empty cell
    `floor` of a full one, and all of a clip 1 on average.

    Masked training of other trainers (OneTrainer's unmasked weight, with its normalisation), with
    soft alpha as the mask.
    """
    weights = floor + (1 - floor) * covered
    return weights / weights.flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)


def fit_ellipses(
    alpha: Tensor,
    time_stride: int,
    space_stride: int,
    *,
    threshold: float = 0.1,
    aligned: bool = False,
    raster: str = "exact",
    enlargements: int = 64,
) -> Tensor:
    """Fits the ellipse around the subject, per latent frame (Wan-Alpha, section 3.3).

    alpha (B, 1, T, H, W) in [0, 1] -> float64 (B, F, 5): centre x, y, full major and minor length
    in latent cells, angle in degrees from x towards y; zeros where nothing is covered. A pixel
    counts from alpha > threshold on, a cell from 0.2 of its pixels on: their mean is the centre,
    their extents along their principal components are the lengths, at least 2, grown by 1.12 until
    98 % of them lie inside. The angle is that of the cells from 0.9 on, where there are 5. Fewer
    than 5 cells: their box. aligned: centre and lengths are measured along the drawn angle. raster:
    `exact`, or `opencv` as in the released code, which enlarges 8 times at most in training and 10
    times at inference, and never aligns. Raises ValueError for a shape the VAE cannot encode.
    """
    frames, height, width = alpha.shape[2:]
    check_clip_shape(frames, height, width, time_stride, space_stride)
    inside = _raster(raster)
    # (B, F, h, w)
    covered = coverage((alpha > threshold).double(), time_stride, space_stride)[:, 0]
    pooled = covered.flatten(0, 1)
    shape = pooled > SHAPE_COVERAGE
    x, y = _grid(pooled.shape[1], pooled.shape[2], pooled.device)
    count = shape.sum((1, 2))
    mean, axes = _principal(shape, x, y)
    oriented = pooled > ORIENTATION_COVERAGE
    _, oriented_axes = _principal(oriented, x, y)
    drawn = torch.where((oriented.sum((1, 2)) >= FEWEST_CELLS)[:, None, None], oriented_axes, axes)
    measured = drawn if aligned else axes
    (u_low, u_high), (v_low, v_high) = (
        _extent(shape, mean, measured[:, :, i], x, y) for i in (0, 1)
    )
    centre = mean
    if aligned:
        middle = torch.stack([u_low + u_high, v_low + v_high], 1) / 2
        centre = mean + (measured @ middle[:, :, None])[:, :, 0]
    lengths = torch.stack([u_high - u_low, v_high - v_low], 1)
    angle = torch.rad2deg(torch.atan2(drawn[:, 1, 0], drawn[:, 0, 0]))
    x_low, x_high, y_low, y_high = _box(shape, x, y)
    few = (count < FEWEST_CELLS)[:, None]
    centre = torch.where(few, torch.stack([x_low + x_high, y_low + y_high], 1) / 2, centre)
    lengths = torch.where(few, torch.stack([x_high - x_low, y_high - y_low], 1), lengths).clamp_min(
        SHORTEST_AXIS
    )
    angle = torch.where(few[:, 0], 0, angle)
    lengths = _grow(shape, centre, lengths, angle, inside, enlargements)
    ellipses = torch.cat([centre, lengths, angle[:, None]], 1) * (count > 0)[:, None]
    return ellipses.reshape(*covered.shape[:2], 5)


def gaussian(ellipses: Tensor, height: int, width: int) -> Tensor:
    """Returns exp(-(u/a)^2/2 - (v/b)^2/2) with half axes a and b, stretched to [0, 1] on the grid
    of every latent frame.

    ellipses (B, F, 5) as of `fit_ellipses` -> (B, 1, F, height, width) in float32; 0 where the
    lengths are 0.
    """
    u, v = _within(ellipses.double().flatten(0, 1), height, width)
    g = torch.exp((-0.5 * (u**2 + v**2)).clamp_min(-50))
    low, high = g.amin((1, 2), keepdim=True), g.amax((1, 2), keepdim=True)
    valid = (high - low >= 1e-9) & (ellipses.flatten(0, 1)[:, 2] > 0)[:, None, None]
    g = torch.where(valid, (g - low) / (high - low).clamp_min(1e-9), 0)
    batch, frames = ellipses.shape[:2]
    return g.float().reshape(batch, 1, frames, height, width)


def outlines(ellipses: Tensor, height: int, width: int, frames: int) -> Tensor:
    """Returns points around the ellipses, to draw them over a clip of so many frames: (frames, 64,
    2), each x and y as shares of the picture's width and height; NaN where the lengths are 0.

    ellipses (F, 5) as of `fit_ellipses`, in cells of a grid of `height` x `width`.
    """
    turns = torch.arange(64, dtype=torch.float64) * (torch.pi / 32)
    x, y, major, minor, angle = (value[:, None] for value in ellipses.double().unbind(1))
    u, v, turn = major / 2 * turns.cos(), minor / 2 * turns.sin(), torch.deg2rad(angle)
    x, y = x + u * turn.cos() - v * turn.sin(), y + u * turn.sin() + v * turn.cos()
    points = torch.stack([(x + 0.5) / width, (y + 0.5) / height], 2)
    points[ellipses[:, 2] <= 0] = torch.nan
    stride = max(1, (frames - 1) // max(1, len(ellipses) - 1))
    cells = (torch.arange(frames) + stride - 1) // stride  # cell 0 sees frame 0 only
    return points[cells.clamp_max(len(ellipses) - 1)]


def inside(ellipses: Tensor, height: int, width: int) -> Tensor:
    """Tells which cells of a grid have their centres in ellipses: (N, 5), as of `fit_ellipses`, ->
    bool (N, height, width); none where the lengths are 0."""
    centre, lengths, angle = ellipses[:, :2], ellipses[:, 2:4], ellipses[:, 4]
    return _inside(centre, lengths, angle, height, width) & (lengths[:, :1, None] > 0)


def _pooled(pool: Callable[..., Tensor], x: Tensor, time_stride: int, space_stride: int) -> Tensor:
    s = space_stride
    first = pool(x[:, :, :1], (1, s, s))
    if x.shape[2] == 1:
        return first
    return torch.cat([first, pool(x[:, :, 1:], (time_stride, s, s))], 2)


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns columns x (1, w) and rows y (h, 1), float64."""
    x = torch.arange(width, dtype=torch.float64, device=device)
    return x[None], torch.arange(height, dtype=torch.float64, device=device)[:, None]


def _principal(cells: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean (N, 2) and principal axes (N, 2, 2), columns from the longest, of the cells (N,
    h, w)."""
    weights = cells.double()
    count = weights.sum((1, 2)).clamp_min(1)
    mean = torch.stack([(weights * x).sum((1, 2)), (weights * y).sum((1, 2))], 1) / count[:, None]
    dx, dy = x - mean[:, 0, None, None], y - mean[:, 1, None, None]
    moments = torch.stack([(weights * a * b).sum((1, 2)) for a in (dx, dy) for b in (dx, dy)], 1)
    covariance = (moments / (count - 1).clamp_min(1)[:, None]).reshape(len(moments), 2, 2)
    axes = cast(Tensor, torch.linalg.eigh(covariance).eigenvectors)  # pyright: ignore[reportUnknownMemberType]
    return mean, axes.flip(-1)


def _extent(
    cells: Tensor, mean: Tensor, axis: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns lowest and highest coordinate of the cells along an axis (N, 2) through the mean."""
    dx, dy = x - mean[:, 0, None, None], y - mean[:, 1, None, None]
    along = dx * axis[:, 0, None, None] + dy * axis[:, 1, None, None]
    infinity = float("inf")
    low = along.masked_fill(~cells, infinity).amin((1, 2))
    high = along.masked_fill(~cells, -infinity).amax((1, 2))
    empty = ~cells.any(2).any(1)
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _box(cells: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ends: list[Tensor] = []
    for at in (x.expand(cells.shape[1:]), y.expand(cells.shape[1:])):
        ends.append(torch.where(cells, at, float("inf")).amin((1, 2)))
        ends.append(torch.where(cells, at, -float("inf")).amax((1, 2)))
    empty = ~cells.any(2).any(1)
    x_low, x_high, y_low, y_high = (end.masked_fill(empty, 0) for end in ends)
    return x_low, x_high, y_low, y_high


def _within(ellipses: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns coordinates (N, h, w) of the grid along both axes of ellipses (N, 5), 1 at their
    ends."""
    x, y = _grid(height, width, ellipses.device)
    cx, cy, major, minor, angle = (c[:, None, None] for c in ellipses.unbind(1))
    turn = torch.deg2rad(angle)
    u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
    v = (y - cy) * turn.cos() - (x - cx) * turn.sin()
    return u / (major / 2).clamp_min(1e-2), v / (minor / 2).clamp_min(1e-2)


def _inside(centre: Tensor, lengths: Tensor, angle: Tensor, height: int, width: int) -> Tensor:
    """Returns the cells whose centres lie in the ellipses: (N, 2), (N, 2), (N,) -> bool (N, height,
    width)."""
    u, v = _within(torch.cat([centre, lengths, angle[:, None]], 1), height, width)
    return u**2 + v**2 <= 1 + 1e-9


def _raster(name: str) -> Callable[..., Tensor]:
    """Returns a function like `_inside` by name."""
    if name == "exact":
        return _inside
    if name == "opencv":
        from acetate.released.opencv_ellipse import inside

        return inside
    raise ValueError(f"raster {name!r}; known: exact, opencv.")


def _grow(
    cells: Tensor,
    centre: Tensor,
    lengths: Tensor,
    angle: Tensor,
    raster: Callable[..., Tensor],
    enlargements: int,
) -> Tensor:
    """Returns lengths (N, 2) times the power of GROWTH that first has INSIDE of the cells inside,
    or the most of them."""
    height, width = cells.shape[1:]
    count = cells.sum((1, 2)).clamp_min(1)
    best, best_lengths = torch.zeros_like(angle), lengths
    done = torch.zeros_like(angle, dtype=torch.bool)
    for _ in range(enlargements):
        share = (raster(centre, lengths, angle, height, width) & cells).sum((1, 2)) / count
        better = ~done & (share > best)
        best = torch.where(better, share.double(), best)
        best_lengths = torch.where(better[:, None], lengths, best_lengths)
        done |= share >= INSIDE
        if done.all():
            break
        lengths = lengths * GROWTH
    return best_lengths
