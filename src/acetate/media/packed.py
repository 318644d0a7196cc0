"""Colour and alpha side by side in one opaque video: where they are, found from the pictures
themselves.

Alpha has the outlines of the colour, at the same or at half the size, somewhere else in the
picture. So the picture's edges, correlated with themselves, peak at the distance of the two; which
is alpha shows in its greyness.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from acetate.media.clip import Frames, MediaError, Rect, decoding

SCALES = (1.0, 0.5)  # of alpha against colour
SEARCH_SIDE = 768  # the peak is looked for in pictures no larger than this, and then refined
REFINED_ON = 2  # pictures, those with the most to see
PEAKS = 4  # per scale that are examined
NOISE = 24  # of 255: what codecs add to grey and to black
# shares of alpha without a hue: below the first it is none, above the second it may be
GREY = 0.97, 0.995
AREA = 0.4, 0.55  # shares of the picture that colour and alpha fill together
SURE = 0.6  # a packing below this confidence is not used

VAPC = "vapc.json"  # beside a video, what its vapc box says
LONGEST_BOX = 2**20  # bytes of a layout

Edges = NDArray[np.complex64]


@dataclass(frozen=True)
class Packing:
    """confidence in [0, 1], and what it rests on."""

    color: Rect
    alpha: Rect
    confidence: float
    reason: str


class Shift(NamedTuple):
    """Colour at (x, y) has its alpha at (scale * x + right, scale * y + down)."""

    scale: float
    right: int
    down: int


def stated_packing(path: Path, size: tuple[int, int]) -> tuple[Rect, Rect] | None:
    """Returns colour and alpha as Tencent's VAP states them: in the MP4's own `vapc` box, or in
    vapc.json or NAME.json beside it where that is for a picture of this size, width and height.

    None if neither is there. Raises MediaError for a layout that cannot be used.
    """
    with decoding(path):
        box = _vapc_box(path)
        if box is not None:
            return _stated(f"{path}: its vapc box", box, size)
    for beside in (path.with_suffix(".json"), path.with_name(VAPC)):
        if beside.is_file() and beside.stat().st_size <= LONGEST_BOX:
            with decoding(beside):
                text = beside.read_bytes().decode("utf-8-sig")
                content = json.loads(text) if '"aFrame"' in text else None
                info = content.get("info") if isinstance(content, dict) else None
                fits = isinstance(info, dict) and size == (info.get("videoW"), info.get("videoH"))
                if fits or (info is not None and beside.name != VAPC):
                    return _stated(str(beside), content, size)
    return None


def _vapc_box(path: Path) -> Any:
    """Returns the content of the box of that name at the top of an MP4; None without one."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        place = 0
        while place + 8 <= end:
            file.seek(place)
            head = file.read(16)
            length, start = int.from_bytes(head[:4], "big"), 8
            if length == 1:
                length, start = int.from_bytes(head[8:16], "big"), 16
            length = length or end - place
            if head[4:8] == b"vapc" and start < length <= LONGEST_BOX:
                file.seek(place + start)
                return json.loads(file.read(length - start))
            if length < start:
                return None
            place += length
    return None


def _stated(where: str, content: Any, size: tuple[int, int]) -> tuple[Rect, Rect]:
    """Reads rgbFrame and aFrame of VAP's JSON; they lie inside of the picture that it states."""
    info = content.get("info") if isinstance(content, dict) else None
    if not isinstance(info, dict):
        raise MediaError(f"{where} has no entry info; VAP's layout has one")
    stated = info.get("videoW"), info.get("videoH")
    if stated != size:
        raise MediaError(
            f"{where} is for {stated[0]}x{stated[1]} (videoW, videoH), the picture is "
            f"{size[0]}x{size[1]}; give the rectangles in a .json or a table"
        )
    rects = []
    for name in ("rgbFrame", "aFrame"):
        rect = info.get(name)
        whole = isinstance(rect, list) and len(rect) == 4 and all(type(n) is int for n in rect)
        if not whole or min(rect[:2]) < 0 or min(rect[2:]) < 1:
            raise MediaError(f"{where}: {name}={rect}; x, y, width, height in pixels")
        if rect[0] + rect[2] > size[0] or rect[1] + rect[3] > size[1]:
            raise MediaError(f"{where}: {name}={rect} is not inside {size[0]}x{size[1]}")
        rects.append((rect[0], rect[1], rect[2], rect[3]))
    return rects[0], rects[1]


def find_packing(pictures: list[Frames]) -> Packing | None:
    """Finds the packing of some pictures (H, W, 3) of one video, spread over its length. None:
    nothing repeats itself.

    Several pictures are needed because effects begin and end empty.
    """
    pictures = [
        picture for picture in pictures if int(picture.max()) - int(picture.min()) > 2 * NOISE
    ]
    if not pictures:
        return None
    height, width = pictures[0].shape[:2]
    factor = -(-max(height, width) // SEARCH_SIDE)
    small = [_reduced(picture, factor) for picture in pictures]
    best: tuple[float, str, Shift, int] | None = None
    for shift in _coarse_shifts(small):
        for i, (color, alpha) in enumerate(_rectangles(shift, *small[0].shape[1::-1])):
            confidence, reason = _judged(small, color, alpha)
            if best is None or confidence > best[0]:
                best = confidence, reason, shift, i
    if best is None or best[0] == 0:
        return None
    confidence, reason, shift, i = best
    telling = sorted(pictures, key=lambda picture: float(picture[::8, ::8].std()))[-REFINED_ON:]
    color, alpha = list(_rectangles(_refined(telling, shift, factor), width, height))[i]
    return Packing(color, alpha, confidence, reason)


def edges(luma: NDArray[np.float32]) -> Edges:
    """Computes direction and strength of the gradient, its angle doubled: an outline counts alike
    from dark to light and back.

    Granlund 1978. Strong edges are held down, so that a few of them do not decide alone.
    """
    down, right = np.gradient(luma)
    strength = np.hypot(right, down)
    flat = strength < 4
    doubled = (right + 1j * down) ** 2 / np.where(flat, 1, strength)
    return np.where(flat, 0, doubled * np.minimum(1, 32 / np.where(flat, 1, strength))).astype(
        np.complex64
    )


def _coarse_shifts(pictures: list[Frames]) -> Iterator[Shift]:
    """Peaks of the correlation over all pictures, in their pixels."""
    height, width = pictures[0].shape[:2]
    size = 2 * height, 2 * width  # room for shifts either way without wrapping round
    for scale in SCALES:
        power = np.zeros(size, np.complex64)
        for picture in pictures:
            whole = edges(_luma(picture))
            small = whole if scale == 1 else edges(_luma(_reduced(picture, round(1 / scale))))
            power += np.fft.fft2(whole, size) * np.conj(np.fft.fft2(small, size))
        correlation = np.fft.ifft2(power).real
        # Neighbours of every edge resemble it, so colour and alpha must not lie too close to be
        # apart.
        far = np.zeros(size, bool)
        rows = np.abs(np.fft.fftfreq(size[0], 1 / size[0]))
        columns = np.abs(np.fft.fftfreq(size[1], 1 / size[1]))
        far |= (rows[:, None] >= 0.25 * height) | (columns[None] >= 0.25 * width)
        correlation[~far] = 0
        for _ in range(PEAKS):
            down, right = np.unravel_index(int(correlation.argmax()), size)
            yield Shift(
                scale,
                int(right) - size[1] * bool(right > size[1] // 2),
                int(down) - size[0] * bool(down > size[0] // 2),
            )
            correlation[
                np.ix_(
                    np.arange(down - 3, down + 4) % size[0],
                    np.arange(right - 3, right + 4) % size[1],
                )
            ] = 0


def _refined(pictures: list[Frames], coarse: Shift, factor: int) -> Shift:
    """Returns the best of the shifts of whole pixels around it."""
    if factor == 1:
        return coarse
    whole = [edges(_luma(picture)) for picture in pictures]
    step = round(1 / coarse.scale)
    small = whole if step == 1 else [edges(_luma(_reduced(picture, step))) for picture in pictures]
    reach = range(-factor, factor + 1)
    shifts = [
        Shift(coarse.scale, coarse.right * factor + i, coarse.down * factor + j)
        for i in reach
        for j in reach
    ]
    return max(
        shifts,
        key=lambda shift: sum(_overlap(a, b, shift) for a, b in zip(whole, small, strict=True)),
    )


def _overlap(whole: Edges, small: Edges, shift: Shift) -> float:
    top, left = max(0, shift.down), max(0, shift.right)
    bottom = min(len(whole), shift.down + len(small))
    right = min(whole.shape[1], shift.right + small.shape[1])
    if bottom <= top or right <= left:
        return 0.0
    there = whole[top:bottom, left:right]
    here = small[top - shift.down : bottom - shift.down, left - shift.right : right - shift.right]
    return float(np.vdot(here, there).real)


def _rectangles(shift: Shift, width: int, height: int) -> Iterator[tuple[Rect, Rect]]:
    """Yields the largest colour and alpha that keep to the shift, inside the picture, apart along
    either axis."""
    scale = shift.scale
    for columns, rows in (
        (_apart(shift.right, scale, width), _free(shift.down, scale, height)),
        (_free(shift.right, scale, width), _apart(shift.down, scale, height)),
    ):
        (left, right), (top, bottom) = columns, rows
        if right - left < 16 or bottom - top < 16:
            continue
        color = left, top, right - left, bottom - top
        alpha = (
            round(left * scale) + shift.right,
            round(top * scale) + shift.down,
            int((right - left) * scale),
            int((bottom - top) * scale),
        )
        yield color, alpha
        if scale == 1:
            yield alpha, color


def _free(shift: int, scale: float, size: int) -> tuple[int, int]:
    """Returns first and end of the colour along an axis where it and alpha may overlap."""
    return max(0, round(-shift / scale)), min(size, int((size - shift) / scale))


def _apart(shift: int, scale: float, size: int) -> tuple[int, int]:
    """Divides along the axis where alpha stands after the colour, or before it."""
    if shift >= 0:
        return 0, min(shift, int((size - shift) / scale))
    first = round(-shift / scale)
    return first, min(size, round((first - shift) / scale))


def _judged(pictures: list[Frames], color_rect: Rect, alpha_rect: Rect) -> tuple[float, str]:
    """Returns the confidence in [0, 1] that the two are colour and alpha, and what it rests on.

    Alpha is grey, mostly at its ends, and has the colour's outlines; the colour's edges lie where
    alpha is not 0. Both together fill most of the picture. A grey colour could as well be a copy,
    or another eye's view: it is never sure.
    """
    alphas = [_cut(picture, alpha_rect) for picture in pictures]
    grey = float(np.mean([np.mean(np.ptp(alpha, axis=-1) <= NOISE) for alpha in alphas]))
    area = (color_rect[2] * color_rect[3] + alpha_rect[2] * alpha_rect[3]) / pictures[0][
        ..., 0
    ].size
    if grey < GREY[0] or area < AREA[0]:
        return (
            0.0,
            f"{100 * grey:.0f} % of alpha is grey, {100 * area:.0f} % of the picture is used",
        )
    colors = [_cut(picture, color_rect) for picture in pictures]
    hue = float(np.mean([np.mean(np.ptp(color, axis=-1) > NOISE) for color in colors]))
    luma = np.stack([_luma(color) for color in colors])
    alpha = np.stack(
        [_luma(np.asarray(Image.fromarray(alpha).resize(color_rect[2:]))) for alpha in alphas]
    )
    pairs = [(edges(c), edges(a)) for c, a in zip(luma, alpha, strict=True)]
    theirs, mine = (sum(float((np.abs(pair[i]) ** 2).sum()) for pair in pairs) for i in (0, 1))
    outlines = sum(float(np.vdot(*pair).real) for pair in pairs) / max(theirs * mine, 1e-9) ** 0.5
    strength = np.stack([np.abs(c) for c, _ in pairs])
    # The gradient of an outline, and what a codec makes of it, reaches two pixels beyond.
    shown = np.stack(
        [Image.fromarray(a > NOISE).convert("L").filter(ImageFilter.MaxFilter(5)) for a in alpha]
    )
    inside = float(strength[shown > 0].sum() / max(strength.sum(), 1e-9))
    ends = float(np.mean((alpha <= NOISE) | (alpha >= 255 - NOISE)))
    seen = np.maximum(luma, alpha) > NOISE
    same = float(np.abs(luma - alpha)[seen].mean()) if seen.any() else 0.0
    confidence = (
        _ramp(outlines, 0.1, 0.4) * _ramp(grey, *GREY) * _ramp(area, *AREA) * _ramp(inside, 0.5,
        0.8)
        * _ramp(ends, 0.05, 0.25) * _ramp(same, 3, 10) * (1 if hue > 0.005 else SURE / 2)
    )  # fmt: skip
    reason = (
        f"outlines agree by {outlines:.2f}, {100 * grey:.0f} % of alpha is grey and "
        f"{100 * ends:.0f} % empty or full, {100 * inside:.0f} % of the colour's edges lie inside, "
        f"{100 * area:.0f} % of the picture is used"
    )
    return round(confidence, 3), reason


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _luma(picture: Frames) -> NDArray[np.float32]:
    """Returns luma by BT.601's weights, as the edges of colours of one brightness do not matter
    here."""
    return picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def _reduced(picture: Frames, factor: int) -> Frames:
    """Reduces by a whole number, each pixel the mean of a block; what does not fill a block is left
    out."""
    return np.asarray(Image.fromarray(picture).reduce(factor)) if factor > 1 else picture


def _cut(picture: Frames, rect: Rect) -> Frames:
    x, y, width, height = rect
    return picture[y : y + height, x : x + width]
