"""What data_prep.cache_latents makes of each clip: buckets, windows, and the background and place of each variant."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acetate.alpha import PALETTE_NAMES
from acetate.data.latents import Piece, Placement, bucket_sizes, plan
from acetate.data.shards import ClipRef
from acetate.data.transforms import check_frames, check_side
from acetate.draws import generator_for
from acetate.models.wan import Geometry


@dataclass(frozen=True)
class Settings:
    """What decides the content, beside the clips, the weights and the prompts' encoder."""

    seed: int
    variants: int  # backgrounds per clip
    frames: tuple[int, ...]  # lengths of buckets
    area: int  # pixels of a bucket, at most
    max_aspect: float
    sizes: tuple[tuple[int, int], ...] | None  # (height, width) in place of area and max_aspect
    space_multiple: int | None  # pixels; None: twice the VAE's stride
    dtype: str  # of what is stored
    ellipse: Mapping[str, Any]  # keywords of fit_ellipses
    per_tar: int
    smallest: float = 1.0  # scale of a clip on its transparent canvas, drawn from here to 1 for each variant

    def __post_init__(self) -> None:
        if not 1 <= self.variants <= len(PALETTE_NAMES):
            raise ValueError(f"variants={self.variants}; 1 to {len(PALETTE_NAMES)}, the number of background colours")
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype={self.dtype}; choose float16 or bfloat16")
        if self.per_tar < 1:
            raise ValueError(f"per_tar={self.per_tar}; must be at least 1")
        if not self.frames or self.sizes == ():
            raise ValueError("frames=[] or sizes=[]; name at least one")
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest={self.smallest}; a scale in (0, 1]. 1 leaves clips as they are")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect}; longer side over shorter, at least 1")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def plan_of(
    refs: Sequence[ClipRef], settings: Settings, geometry: Geometry, allow_empty: bool
) -> tuple[list[Piece], dict[str, Any]]:
    """All pieces, sorted, and what the manifest says of clips that do not fill their bucket.

    ValueError for lengths and sizes that the VAE and the DiT cannot take, and for an explicit size without clips.
    """
    multiple = settings.space_multiple or 2 * geometry.space_stride
    check_side("space_multiple", multiple, geometry.space_stride)
    for length in settings.frames:
        check_frames("frames", length, geometry.time_stride)
    sizes = settings.sizes or bucket_sizes(settings.area, settings.max_aspect, multiple)
    for size in sizes:
        for name, side in zip(("height", "width"), size, strict=True):
            check_side(f"sizes: {name}", side, multiple)
    pieces = plan(refs, settings.frames, sizes, settings.variants)
    wanted = {f"{n}x{height}x{width}" for n in settings.frames for height, width in settings.sizes or ()}
    empty = sorted(wanted - {piece.bucket for piece in pieces})
    if empty and not allow_empty:
        raise ValueError(
            f"bucket without clips: {', '.join(empty)} (frames x height x width). Leave its size or its length out, "
            "add clips, or set allow_empty_buckets=true."
        )
    shown = Counter[str]()
    for piece in pieces:
        shown[piece.ref.key] += piece.frames if piece.variant == 0 else 0
    spare = [ref.frames - shown[ref.key] for ref in refs]
    return pieces, {
        "unused_frames": sum(n for n in spare if n > 0),
        "short_clips": sum(n < 0 for n in spare),
        "geometry": {name: getattr(geometry, name) for name in ("channels", "time_stride", "space_stride")},
        "empty_buckets": empty,
    }


def background(seed: int, clip: str, variant: int) -> int:
    """Palette index; the variants of a clip differ."""
    order = torch.randperm(len(PALETTE_NAMES), generator=generator_for("background", seed, clip))
    return int(order[variant])


def placement(seed: int, smallest: float, piece: Piece) -> Placement:
    """Variants of a window show it smaller and somewhere else."""
    generator = generator_for("placement", seed, piece.ref.key, piece.window, piece.variant)
    scale, above, before = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return smallest + (1 - smallest) * scale, above, before
