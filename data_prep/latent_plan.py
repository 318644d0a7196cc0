"""Plans what data_prep.cache_latents makes of each clip: buckets, windows, and the background and
place of each variant."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acetate.alpha import PALETTE_NAMES
from acetate.data.keys import LONGEST_KEY, shortened
from acetate.data.shards import ClipRef
from acetate.data.transforms import (
    check_frames,
    check_side,
    covering_box,
    crop,
    resize,
    to_float,
    window,
)
from acetate.draws import generator_for, stable_hash
from acetate.models.wan import Geometry

# Scale of the picture on its canvas; shares of the slack above it and left of it
Placement = tuple[float, float, float]
MOST_ENLARGED = 32  # times a side
MOST_PIXELS = 2**29  # of all frames of a piece: 8 GiB of colour and alpha as floats


@dataclass(frozen=True)
class Piece:
    """A window of a clip over one background; frames, height and width in pixels."""

    ref: ClipRef
    window: int
    start: int
    frames: int
    height: int
    width: int
    variant: int

    @property
    def key(self) -> str:
        """Returns a key of at most LONGEST_KEY bytes; a clip's long key is cut and told apart by
        its hash."""
        clip, suffix = self.ref.key, f"-w{self.window:03d}-v{self.variant}"
        return shortened(clip, LONGEST_KEY - len(suffix), f"{stable_hash(clip):016x}") + suffix

    @property
    def enlarged(self) -> float:
        """Returns how many times a side of what is shown of the clip is enlarged; below 1 it is
        scaled down."""
        # 1 over the ratio of covering_box
        return max(self.height / self.ref.height, self.width / self.ref.width)

    @property
    def bucket(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def bucket_sizes(area: int, max_aspect: float, multiple: int) -> list[tuple[int, int]]:
    """Returns all (height, width) in multiples, within max_aspect, of which neither side can grow
    without passing `area`."""
    sizes = []
    tallest = min(area // multiple, int(math.sqrt(area * max_aspect)) + multiple)
    for height in range(multiple, tallest + 1, multiple):
        width = area // height // multiple * multiple
        fills = width > 0 and (height + multiple) * width > area
        if fills and max(height / width, width / height) <= max_aspect:
            sizes.append((height, width))
    if not sizes:
        raise ValueError(
            f"area={area}, max_aspect={max_aspect}: no bucket in multiples of {multiple}. Raise "
            f"area to {multiple**2} or more, or max_aspect."
        )
    return sizes


def plan(
    refs: Sequence[ClipRef], lengths: Sequence[int], sizes: Sequence[tuple[int, int]], variants: int
) -> list[Piece]:
    """Puts every clip in the size of nearest log aspect, cut into whole windows of the longest
    length that it fills."""
    pieces = []
    for ref in refs:
        # Of two that are equally near, the larger one
        height, width = min(
            sizes, key=lambda size: (round(_turn(ref, size), 9), -size[0] * size[1])
        )
        length = max((n for n in lengths if n <= ref.frames), default=min(lengths))
        for index, start in enumerate(window_starts(ref.frames, length)):
            pieces += [
                Piece(ref, index, start, length, height, width, variant)
                for variant in range(variants)
            ]
    return pieces


def _turn(ref: ClipRef, size: tuple[int, int]) -> float:
    return abs(math.log(size[0] / size[1] * ref.width / ref.height))


def window_starts(count: int, length: int) -> list[int]:
    """Returns the first frames of the whole windows, with what is left over spread evenly around
    them; [0] for a short clip."""
    windows = max(1, count // length)
    spare = max(0, count - windows * length)
    return [i * length + spare * (2 * i + 1) // (2 * windows) for i in range(windows)]


def placed(box: tuple[int, int, int, int], placement: Placement) -> tuple[int, int, int, int]:
    """Returns a larger box around it, which shows the picture smaller, somewhere on a transparent
    canvas."""
    top, left, height, width = box
    scale, above, before = placement
    tall, wide = round(height / scale), round(width / scale)
    return top - round(above * (tall - height)), left - round(before * (wide - width)), tall, wide


def cut(
    frames: Tensor, piece: Piece, placement: Placement = (1.0, 0.0, 0.0)
) -> tuple[Tensor, Tensor]:
    """Cuts uint8 (T, H, W, 4) into rgb (1, 3, frames, height, width) and alpha (1, 1, ...): one
    resample of a source box."""
    box = placed(covering_box(*frames.shape[1:3], piece.height, piece.width), placement)
    chosen = crop(frames, *box)[window(len(frames), piece.frames, piece.start)]
    # One at a time: floats of a whole clip can take gigabytes.
    clips = [resize(*to_float(frame[None]), piece.height, piece.width) for frame in chosen]
    rgb, alpha = (torch.cat(parts, dim=1)[None] for parts in zip(*clips, strict=True))
    return rgb, alpha


@dataclass(frozen=True)
class Settings:
    """The settings that decide the content, beside the clips, the weights and the prompts'
    encoder."""

    seed: int
    variants: int  # of a clip: backgrounds and places
    frames: Sequence[int]  # lengths of buckets
    area: int  # pixels of a bucket, at most
    max_aspect: float
    sizes: Sequence[tuple[int, int]] | None  # (height, width) in place of area and max_aspect
    space_multiple: int | None  # pixels; None: twice the VAE's stride
    dtype: str  # of what is stored
    ellipse: Mapping[str, Any]  # keywords of fit_ellipses
    per_tar: int
    # scale of a clip on its transparent canvas, drawn from here to 1 for each variant
    smallest: float = 1.0
    background: str | None = None  # of PALETTE_NAMES, behind every clip; None: another per variant
    condition: str = "none"  # or of models.condition.GIVEN: frames that are encoded alone, too

    def __post_init__(self) -> None:
        if self.background and self.variants > 1 and self.smallest == 1:
            raise ValueError(
                f"variants={self.variants} of a clip would be equal over background="
                f"{self.background}; set variants=1, or smallest below 1"
            )

    def behind(self, piece: Piece) -> str:
        """Returns the name of the colour that the encoder finds behind a piece."""
        drawn = PALETTE_NAMES[background(self.seed, piece.ref.key, piece.variant)]
        return self.background or drawn

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def plan_of(
    refs: Sequence[ClipRef], settings: Settings, geometry: Geometry, allow_empty: bool
) -> tuple[list[Piece], dict[str, Any]]:
    """Returns all pieces, sorted, and what the manifest says of clips that do not fill their
    bucket.

    Raises ValueError for lengths and sizes that the VAE and the DiT cannot take, and for an
    explicit size without clips.
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
    wanted = {
        f"{n}x{height}x{width}" for n in settings.frames for height, width in settings.sizes or ()
    }
    empty = sorted(wanted - {piece.bucket for piece in pieces})
    if empty and not allow_empty:
        raise ValueError(
            f"bucket without clips: {', '.join(empty)} (frames x height x width). Leave its size "
            "or its length out, add clips, or set allow_empty_buckets=true."
        )
    shown = Counter[str]()
    for piece in pieces:
        shown[piece.ref.key] += piece.frames if piece.variant == 0 else 0
    spare = [ref.frames - shown[ref.key] for ref in refs]
    larger = {piece.ref.key: factor for piece in pieces if (factor := piece.enlarged) > 1}
    return pieces, {
        "unused_frames": sum(n for n in spare if n > 0),
        "short_clips": sum(n < 0 for n in spare),
        **(
            {"enlarged_clips": len(larger), "most_enlarged": round(max(larger.values()), 3)}
            if larger
            else {}
        ),
        "geometry": {
            name: getattr(geometry, name) for name in ("channels", "time_stride", "space_stride")
        },
        "empty_buckets": empty,
    }


def check_area(refs: Sequence[ClipRef], area: float) -> None:
    """Raises ValueError for buckets beyond the largest clip enlarged MOST_ENLARGED times a side."""
    largest = max(refs, key=lambda ref: ref.height * ref.width)
    most = MOST_ENLARGED**2 * largest.height * largest.width
    if area > most:
        raise ValueError(
            f"area={area:g} is {math.sqrt(area / largest.height / largest.width):,.0f} times a "
            f"side of the largest clip, {largest.key} ({largest.width}x{largest.height}); at most "
            f"{MOST_ENLARGED} times, area={most}"
        )


def check_pieces(pieces: Sequence[Piece]) -> None:
    """Raises ValueError for one that is enlarged too much, or too large for any memory."""
    for piece in pieces:
        if piece.enlarged > MOST_ENLARGED:
            raise ValueError(
                f"bucket {piece.bucket} (frames x height x width) enlarges {piece.ref.key} "
                f"({piece.ref.width}x{piece.ref.height}) {piece.enlarged:,.0f} times a side; at "
                f"most {MOST_ENLARGED}. Give smaller sizes or a smaller area."
            )
        if (pixels := piece.frames * piece.height * piece.width) > MOST_PIXELS:
            raise ValueError(
                f"bucket {piece.bucket} (frames x height x width), which {piece.ref.key} falls "
                f"into, holds {pixels / 1e6:,.0f} megapixels over its frames; at most "
                f"{MOST_PIXELS / 1e6:,.0f}. Give smaller frames, sizes or area."
            )


def background(seed: int, clip: str, variant: int) -> int:
    """Returns the index of a palette colour; the variants of a clip differ."""
    order = torch.randperm(len(PALETTE_NAMES), generator=generator_for("background", seed, clip))
    return int(order[variant])


def placement(seed: int, smallest: float, piece: Piece) -> Placement:
    """Variants of a window show it smaller and somewhere else."""
    generator = generator_for("placement", seed, piece.ref.key, piece.window, piece.variant)
    scale, above, before = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return smallest + (1 - smallest) * scale, above, before
