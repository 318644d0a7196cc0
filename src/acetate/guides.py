"""Guides for sampled clips, which say where the subject is: a given ellipse, that of a clip's
alpha, or a finished mask."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acetate import regions
from acetate.alpha import harden, over
from acetate.clips import background_of
from acetate.data.transforms import containing_box, covering_box, crop, resize, to_float, window
from acetate.formats.gauss_mask import read_gauss_mask
from acetate.media.clip import MediaError
from acetate.media.deep import NO_ALPHA
from acetate.models.condition import GIVEN, condition_latents, with_mask
from acetate.models.rgba_vae import RGBAVAE
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


@dataclass(frozen=True)
class AlphaGuide:
    """The ellipses of alpha (1, T, H, W) in [0, 1], T and size of the clip."""

    alpha: Tensor


Guide = EllipsePath | ClipGuide | MaskGuide | AlphaGuide
Pictures = str | Path | Sequence[str | Path]  # a file, or one for each clip


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
    if isinstance(guide, AlphaGuide):
        ellipses = regions.fit_ellipses(
            guide.alpha[None], geometry.time_stride, geometry.space_stride, **fit
        )
    elif isinstance(guide, ClipGuide):
        ellipses = _fitted(guide.path.expanduser(), size, geometry, fit)
    else:
        ellipses = guide.ellipses(*grid)
    return regions.gaussian(ellipses, *grid[1:]), ellipses


def outline(ellipses: Tensor, grid: Sequence[int], frames: int) -> Tensor:
    """Returns points (T, N, 2), as previews draw them, of ellipses (1, F, 5) on a grid (F, h,
    w)."""
    _, height, width = grid
    return regions.outlines(ellipses[0], height, width, frames)


def read_still(path: Path, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Reads rgb (3, 1, H, W) in [-1, 1] and alpha (1, 1, H, W) of a picture, or of the first frame
    of a clip: resized as a whole, with transparent margins where its aspect is another.

    Colour under alpha 0 counts for nothing, as in shards. Raises MediaError for a file that cannot
    be read as RGBA, and for a picture with nothing on it.
    """
    frame = _first_frame(path)
    box = containing_box(frame.shape[1], frame.shape[2], height, width)
    return resize(*to_float(crop(frame, *box)), height, width)


def check_pictures(image: Pictures | None, last_image: Pictures | None, count: int) -> None:
    """Raises what `for_each` and `read_still` do, by the name of the setting, and ValueError for a
    last picture alone; warns of one that is opaque throughout."""
    if image is None and last_image is not None:
        raise ValueError("last_image= without image=. Give the first frame, too.")
    for name, pictures in (("image", image), ("last_image", last_image)):
        for path in dict.fromkeys(for_each(pictures, count)):
            if path is None:
                continue
            try:
                frame = _first_frame(path)
            except MediaError as error:
                said = str(error).removesuffix(f"; {NO_ALPHA}")  # which is a way of ingest's
                raise MediaError(
                    f"{name}={said}. Give one file with alpha, such as an RGBA PNG."
                ) from error
            if frame[..., 3].min() == 255:
                warnings.warn(
                    f"{name}={path} is opaque throughout: all of it is the subject. Cut out what "
                    "shall move, where that is not meant.",
                    stacklevel=2,
                )


def for_each(picture: Pictures | None, count: int) -> list[Path | None]:
    """Returns the file, or none, of each of `count` clips. Raises ValueError for another number."""
    if picture is None or isinstance(picture, str | Path):
        return [None if picture is None else Path(picture)] * count
    if len(picture) not in (1, count):
        raise ValueError(f"{len(picture)} pictures for {count} prompts; give one, or one for each.")
    return [Path(path) for path in picture] * (count // len(picture))


@torch.no_grad()
def condition_of(
    vae: RGBAVAE, image: Path | None, last: Path | None, size: tuple[int, int, int], device: str
) -> tuple[Tensor, AlphaGuide]:
    """Returns the condition (1, K, F, h, w) of a first frame, and perhaps a last, over the colour
    that `key` latents have behind the subject; and the guide of their alpha.

    size: frames, height, width in pixels. The first counts for all frames of the guide but the
    last's own.
    """
    assert image is not None
    stills = [read_still(path, *size[1:]) for path in (image, last) if path is not None]
    counts = [size[0] - len(stills) + 1, 1][: len(stills)]
    rgb, alpha = (
        torch.cat([part.expand(-1, n, -1, -1) for part, n in zip(parts, counts, strict=True)], 1)
        for parts in zip(*stills, strict=True)
    )
    hard = over(rgb, harden(alpha), background_of("key"))[None].to(device)
    given = GIVEN[len(stills) - 1]
    latents = condition_latents(vae, hard, alpha[None].to(device), given)
    return with_mask(latents, given, vae.geometry.time_stride).cpu(), AlphaGuide(alpha)


def _first_frame(path: Path) -> Tensor:
    """Returns (1, H, W, 4) uint8 of a picture or a clip. Raises MediaError as `read_still`."""
    frame = torch.as_tensor(read_rgba(path.expanduser()).frames)[:1]
    if not frame[..., 3].any():
        raise MediaError(f"{path}: all of it is transparent")
    return frame


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
