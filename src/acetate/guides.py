"""Guides for sampled clips, which say where the subject is: a given ellipse, that of a clip's
alpha, or a finished mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acetate import regions
from acetate.data.transforms import covering_box, crop, resize, to_float, window
from acetate.formats.gauss_mask import read_gauss_mask
from acetate.models.wan import Geometry
from acetate.sampling import EllipsePath
from acetate.video_io import read_rgba

HALF_AXIS = 0.61  # of a Gaussian, at the ends of its half axes


@dataclass(frozen=True)
class ClipGuide:
    """The ellipses of a clip's alpha, frame by frame, as training fits them."""

    path: Path


@dataclass(frozen=True)
class MaskGuide:
    """A Gaussian mask (latent frames, h, w) in a file, as the released code saves it."""

    path: Path


Guide = EllipsePath | ClipGuide | MaskGuide


def draw(
    guide: Guide, size: tuple[int, int, int], geometry: Geometry, fit: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Returns G (1, 1, F, h, w) in [0, 1] and its ellipses (1, F, 5) in cells; a mask has those
    around its inner part.

    size: frames, height, width of the clip in pixels. fit: arguments of `regions.fit_ellipses`, as
    the DoRA was trained with them. Raises ValueError for a mask of another shape.
    """
    grid = geometry.latent_shape(*size)[1:]
    if isinstance(guide, MaskGuide):
        mask = read_gauss_mask(guide.path.expanduser(), grid)
        return mask, regions.fit_ellipses((mask > HALF_AXIS).float(), 1, 1)
    if isinstance(guide, ClipGuide):
        ellipses = _fitted(guide.path.expanduser(), size, geometry, fit)
    else:
        ellipses = guide.ellipses(*grid)
    return regions.gaussian(ellipses, *grid[1:]), ellipses


def outline(ellipses: Tensor, grid: Sequence[int], frames: int) -> Tensor:
    """Returns points (T, N, 2), as previews draw them, of ellipses (1, F, 5) on a grid (F, h,
    w)."""
    _, height, width = grid
    return regions.outlines(ellipses[0], height, width, frames)


def _fitted(
    path: Path, size: tuple[int, int, int], geometry: Geometry, fit: Mapping[str, Any]
) -> Tensor:
    frames, height, width = size
    clip = torch.as_tensor(read_rgba(path).frames)
    clip = clip[window(len(clip), frames, 0)]
    rows, columns = clip.shape[1:3]
    rgb, alpha = to_float(crop(clip, *covering_box(rows, columns, height, width)))
    _, alpha = resize(rgb, alpha, height, width)
    return regions.fit_ellipses(alpha[None], geometry.time_stride, geometry.space_stride, **fit)
