"""What data_prep.cache_latents makes of each clip: buckets, windows, and the background and place of each variant."""

import math
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

MOST_ENLARGED = 32  # times a side
MOST_PIXELS = 2**29  # of all frames of a piece: 8 GiB of colour and alpha as floats


@dataclass(frozen=True)
class Settings:
    """What decides the content, beside the clips, the weights and the prompts' encoder."""

    seed: int
    variants: int  # backgrounds per clip
    frames: Sequence[int]  # lengths of buckets
    area: int  # pixels of a bucket, at most
    max_aspect: float
    sizes: Sequence[tuple[int, int]] | None  # (height, width) in place of area and max_aspect
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
        check_list("frames", self.frames, "[17,49,81]")
        if self.sizes is not None:
            check_list("sizes", self.sizes, "[[48,64],[64,48]] (height, width)", pairs=True)
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest={self.smallest}; a scale in (0, 1]. 1 leaves clips as they are")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect}; longer side over shorter, at least 1")

    def background(self, piece: Piece) -> str:
        return PALETTE_NAMES[background(self.seed, piece.ref.key, piece.variant)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def check_list(name: str, value: Any, example: str, pairs: bool = False) -> None:
    """ValueError unless it lists whole numbers of at least 1, or pairs of such."""

    def good(entry: Any) -> bool:
        return isinstance(entry, int) and not isinstance(entry, bool) and entry >= 1

    def good_pair(entry: Any) -> bool:
        return isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2 and all(map(good, entry))

    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not (listed and all(map(good_pair if pairs else good, value))):
        shown = list(value) if isinstance(value, tuple) else value
        what = "pairs of whole numbers" if pairs else "whole numbers"
        raise ValueError(f"{name}={shown}; a list of at least one of {what} from 1 on, as in {name}={example}")


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
    if not settings.sizes:
        check_area(refs, settings.area)
    sizes = settings.sizes or bucket_sizes(settings.area, settings.max_aspect, multiple)
    for size in sizes:
        for name, side in zip(("height", "width"), size, strict=True):
            check_side(f"sizes: {name}", side, multiple)
    pieces = plan(refs, settings.frames, sizes, settings.variants)
    check_pieces(pieces)
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
    larger = {piece.ref.key: factor for piece in pieces if (factor := piece.enlarged) > 1}
    return pieces, {
        "unused_frames": sum(n for n in spare if n > 0),
        "short_clips": sum(n < 0 for n in spare),
        **({"enlarged_clips": len(larger), "most_enlarged": round(max(larger.values()), 3)} if larger else {}),
        "geometry": {name: getattr(geometry, name) for name in ("channels", "time_stride", "space_stride")},
        "empty_buckets": empty,
    }


def check_area(refs: Sequence[ClipRef], area: float) -> None:
    """ValueError for buckets beyond the largest clip enlarged MOST_ENLARGED times a side."""
    largest = max(refs, key=lambda ref: ref.height * ref.width)
    most = MOST_ENLARGED**2 * largest.height * largest.width
    if area > most:
        raise ValueError(
            f"area={area:g} is {math.sqrt(area / largest.height / largest.width):,.0f} times a side of the largest "
            f"clip, {largest.key} ({largest.width}x{largest.height}); at most {MOST_ENLARGED} times, area={most}"
        )


def check_pieces(pieces: Sequence[Piece]) -> None:
    """ValueError for one that is enlarged too much, or too large for any memory."""
    for piece in pieces:
        if piece.enlarged > MOST_ENLARGED:
            raise ValueError(
                f"bucket {piece.bucket} (frames x height x width) enlarges {piece.ref.key} "
                f"({piece.ref.width}x{piece.ref.height}) {piece.enlarged:,.0f} times a side; at most {MOST_ENLARGED}. "
                "Give smaller sizes or a smaller area."
            )
        if (pixels := piece.frames * piece.height * piece.width) > MOST_PIXELS:
            raise ValueError(
                f"bucket {piece.bucket} (frames x height x width), which {piece.ref.key} falls into, holds "
                f"{pixels / 1e6:,.0f} megapixels over its frames; at most {MOST_PIXELS / 1e6:,.0f}. Give smaller "
                "frames, sizes or area."
            )


def background(seed: int, clip: str, variant: int) -> int:
    """Palette index; the variants of a clip differ."""
    order = torch.randperm(len(PALETTE_NAMES), generator=generator_for("background", seed, clip))
    return int(order[variant])


def placement(seed: int, smallest: float, piece: Piece) -> Placement:
    """Variants of a window show it smaller and somewhere else."""
    generator = generator_for("placement", seed, piece.ref.key, piece.window, piece.variant)
    scale, above, before = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return smallest + (1 - smallest) * scale, above, before
