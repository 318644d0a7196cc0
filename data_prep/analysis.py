"""Measures a decoded clip and decides what it is. Nothing is changed here; data_prep.cleaning
applies decisions."""

import math
from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from acetate.media.clip import MediaError, Stream, stream_of
from acetate.video_io import Rect, RGBAClip
from data_prep.cleaning import stretch, stretched_levels
from data_prep.color import confidence, mixtures, sampled
from data_prep.decisions import Decisions, Matte
from data_prep.film_cuts import SEEN, Shots, flicker, thumbnail, weighted

Frames = NDArray[np.uint8]

NOISE = 12  # steps of alpha that a codec's noise reaches at most, beside 0 and 255
# Alpha that should be 0 and 255 after a conversion to a limited range lies within these
FLOOR, CEILING = 64, 192


def analyse(
    clip: RGBAClip | Stream, *, premultiplied: bool | None = None, matte: bool = False
) -> Decisions:
    """Returns what the clip is, how sure that is, and why. A stream is read to its end, a picture
    at a time.

    premultiplied: what a person says, if anything; else the colour is measured, and what the format
    defines (`clip.premultiplied`) counts as a strong belief. matte: colour is a whole picture and
    alpha its matte.
    """
    stream = clip if isinstance(clip, Stream) else stream_of(clip)
    totals, still, shots, sample = _measured(stream)
    reasons: dict[str, str] = {}
    ends, reasons["alpha_range"] = alpha_range(totals.histogram, stream.lossy)
    if ends:
        totals, sample = totals.stretched(ends), [stretch(frame, ends) for frame in sample]
    low, high = noise_bounds(totals.histogram) if stream.lossy else (0, 255)
    reasons["alpha_low"] = (
        f"lossy: the peaks of the histogram of alpha at 0 and 255 end at {low} and {high}"
        if stream.lossy
        else "lossless"
    )
    state, reasons["matte"] = _matte(totals, low, high)
    crop, reasons["crop"] = bars(totals, low, high)
    same, reasons["still"] = still.found()
    cuts: tuple[int, ...] = ()
    if stream.held > 2 and not same:
        cuts, reasons["cuts"] = shots.found()
        if state == "normal" and (share := flicker(shots.coverage, cuts)) > 0.1:
            state, reasons["matte"] = (
                "flickers",
                f"coverage jumps to and fro in {share:.0%} of the frames",
            )
    color, sure, reasons["color"], figures = _color(stream, sample, low, high, premultiplied, matte)
    return Decisions(
        color=color,
        confidence=round(sure, 3),
        alpha_range=ends,
        alpha_low=low,
        alpha_high=high,
        matte=state,
        crop=crop,
        visible=_box(totals.most_alpha > low),
        still=same,
        cuts=cuts,
        reasons={name: reason for name, reason in reasons.items() if reason},
        figures=figures,
    )


def _measured(stream: Stream) -> tuple["Totals", "Stillness", "Shots", list[Frames]]:
    """Passes over the pictures once; returns what was measured, and some of them, spread over the
    clip's length."""
    wanted = set(sampled(stream.frames).tolist())
    totals: Totals | None = None
    still, shots, sample = Stillness(stream.lossy), Shots(), []
    for number, frame in enumerate(stream):
        if totals is None:
            totals = Totals.of(frame)
        elif frame.shape[:2] != totals.most_alpha.shape:
            raise MediaError("the size changes between frames; split the file where it does")
        planes = np.ascontiguousarray(frame.transpose(2, 0, 1))
        totals.add(planes)
        still.add(frame)
        if stream.frames > 2:
            shots.add(thumbnail(planes))
        if number in wanted:
            sample.append(frame)
        last = frame
    if totals is None:
        raise MediaError("no frame could be decoded; the file is empty or damaged")
    return totals, still, shots, sample or [last]


def _color(
    stream: Stream,
    sample: list[Frames],
    low: int,
    high: int,
    premultiplied: bool | None,
    matte: bool,
) -> tuple[str, float, str, dict[str, float]]:
    """Returns what colour is, how sure that is, in words, and the figures behind it."""
    if matte:
        return "matte", 1.0, "a picture with a matte: its foreground is estimated", {}
    if premultiplied is not None:
        return ("black" if premultiplied else "straight"), 1.0, "declared", {}
    found = mixtures(sample, low, high, stream.lossy, stream.premultiplied is False)
    if found is None:
        return "straight", 0.0, "no soft pixel, so that it does not matter", {}
    backdrop = max(found, key=lambda name: found[name].log_odds)
    evidence = found[backdrop]
    figures = {
        f"log_odds_of_{backdrop}": round(evidence.log_odds, 3),
        "fits_times_as_well": round(math.exp(evidence.fit), 4),
        "beyond_a_mixture": round(evidence.broken, 4),
        **(
            {}
            if math.isnan(evidence.uncovered)
            else {"hidden_shows_another": round(evidence.uncovered, 4)}
        ),
    }
    if evidence.log_odds > 0:
        sure = confidence(evidence.log_odds)
        name = "premultiplied" if backdrop == "black" else f"mixed with {backdrop}"
        although = ", although the format says straight" if stream.premultiplied is False else ""
        return backdrop, sure, f"{name}: {how_sure(sure)}{although}", figures
    # With no block that tells, straight and mixed look alike: dark things, or hardly a soft pixel.
    told = evidence.informative / (evidence.informative + 8) if evidence.log_odds > -3 else 1.0
    sure = told * confidence(evidence.log_odds)
    return "straight", sure, f"straight: {how_sure(sure)}", figures


def how_sure(confidence: float) -> str:
    """Returns a confidence in a word; data_prep.shard lists what is below fairly sure."""
    return "sure" if confidence >= 0.9 else "fairly sure" if confidence >= 0.5 else "unsure"


@dataclass(frozen=True)
class Totals:
    """The sums over all frames. histogram: pixels by alpha (256,); the rest: (H, W), 0..255."""

    histogram: NDArray[np.int64]
    most_color: Frames  # of the brightest channel
    most_alpha: Frames
    least_alpha: Frames
    coverage: MutableSequence[float]  # mean alpha of every frame, in [0, 1]

    @classmethod
    def of(cls, frame: Frames) -> "Totals":
        """Makes empty totals for frames of that size."""
        size = frame.shape[:2]
        none, most = np.zeros(size, np.uint8), np.full(size, 255, np.uint8)
        return cls(np.zeros(256, np.int64), none, none.copy(), most, array("d"))

    def add(self, planes: Frames) -> None:
        """Adds a picture. planes: (4, H, W) of a picture."""
        *colors, alpha = planes
        counts = np.bincount(alpha.ravel(), minlength=256)
        np.add(self.histogram, counts, out=self.histogram)
        self.coverage.append(float(counts @ np.arange(256)) / (255 * alpha.size))
        for color in colors:
            np.maximum(self.most_color, color, out=self.most_color)
        np.maximum(self.most_alpha, alpha, out=self.most_alpha)
        np.minimum(self.least_alpha, alpha, out=self.least_alpha)

    def stretched(self, ends: tuple[int, int]) -> "Totals":
        """Returns the totals as if alpha had been stretched."""
        levels = stretched_levels(ends)
        histogram = np.bincount(levels, weights=self.histogram, minlength=256).astype(np.int64)
        floor, ceiling = ends
        coverage = (255 * np.array(self.coverage) - floor) / (ceiling - floor)
        return Totals(
            histogram, self.most_color, levels[self.most_alpha], levels[self.least_alpha],
            array("d", coverage.clip(0, 1)),
        )  # fmt: skip


def _means(frame: Frames) -> Tensor:
    return F.avg_pool2d(weighted(frame)[None], 4, ceil_mode=True)


class Stillness:
    """A test of whether all of several frames are the first one; after a lossy codec, whether all 4
    x 4 means are within 3."""

    def __init__(self, lossy: bool):
        self.lossy, self.same, self.frames = lossy, True, 0
        self.first: Frames | Tensor | None = None

    def add(self, frame: Frames) -> None:
        self.frames += 1
        if not self.same:
            return
        seen = _means(frame) if self.lossy else frame
        if self.first is None:
            self.first = seen
        elif isinstance(seen, Tensor):
            self.same = bool(((seen - self.first).abs() <= 3 / 255).all())
        else:
            self.same = np.array_equal(self.first, seen)

    def found(self) -> tuple[bool, str]:
        if self.frames == 1 or not self.same:
            return False, ""
        noise = " but for the codec's noise" if self.lossy else ""
        return True, f"all {self.frames} frames are equal{noise}"


def alpha_range(histogram: NDArray[np.int64], lossy: bool) -> tuple[tuple[int, int] | None, str]:
    """Returns the levels that stand for 0 and 255 where alpha reaches neither of them, as after a
    conversion to a limited range; and in words what alpha's ends are, if not 0 and 255.

    None unless a fifth of all pixels lie on one level at most FLOOR, with nothing below, and a
    fiftieth on one of at least CEILING, with nothing above: a veil has no such peaks.
    """
    margin = NOISE // 2 if lossy else 0
    seen = np.flatnonzero(histogram > histogram.sum() * 1e-5)
    least, most = int(seen[0]), int(seen[-1])
    if least <= margin and most >= 255 - margin:
        return None, ""
    floor = least + int(histogram[least : least + margin + 1].argmax())
    ceiling = most - int(histogram[: most + 1][::-1][: margin + 1].argmax())
    said = (
        f"alpha lies between {least} and {most}" if least < most else f"alpha is {least} throughout"
    )
    share = histogram / histogram.sum()
    at_floor = share[least : floor + margin + 1].sum()
    at_ceiling = share[ceiling - margin : most + 1].sum()
    if least <= margin and at_ceiling < 0.02:
        return None, ""  # a glow
    if not 0 < floor <= FLOOR or ceiling < CEILING or at_floor < 0.2 or at_ceiling < 0.02:
        return None, f"{said}; it is left so, for want of flat ends"
    return (floor, ceiling), (
        f"{said}, {at_floor:.0%} of the pixels at {floor} and {at_ceiling:.0%} at {ceiling}: "
        "shrunken, stretched to 0 and 255"
    )


def noise_bounds(histogram: NDArray[np.int64]) -> tuple[int, int]:
    """Returns up to where alpha is noise around 0, and from where around 255: the feet of the
    histogram's end peaks.

    From its highest value within NOISE steps of the end, a peak goes on while the count falls by
    more than a quarter a step. Soft alpha that fades evenly, as smoke does, is no peak and stays.
    """

    def foot(counts: NDArray[np.int64]) -> int:
        # Stretching limited-range luma leaves every seventh level empty: such a gap takes the next
        # level's count.
        level = np.maximum(counts[:-1], counts[1:]) * np.where(counts[:-1] == 0, 1, 0) + counts[:-1]
        k = start = int(level[: NOISE + 1].argmax())
        while k < NOISE and level[k + 1] < 0.75 * level[k]:
            k += 1
        is_peak = level[start] > 4 * np.median(level[2 * NOISE : 6 * NOISE])
        return k if is_peak and k > start else 0

    return foot(histogram), 255 - foot(histogram[::-1])


def _matte(totals: Totals, low: int, high: int) -> tuple[Matte, str]:
    if max(totals.coverage) < SEEN or not (totals.most_alpha > low).any():
        return "empty", f"alpha covers {max(totals.coverage):.3%} of the fullest frame"
    opaque = totals.histogram[high:].sum() / totals.histogram.sum()
    if opaque > 0.999:
        return "full", f"{opaque:.2%} of the pixels are opaque"
    return "normal", ""


def _box(seen: NDArray[np.bool_]) -> Rect | None:
    """Returns the smallest rectangle that holds every True."""
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def bars(totals: Totals, low: int, high: int) -> tuple[Rect | None, str]:
    """Returns the picture between equal black bars at two opposite sides, through the whole clip;
    None without bars.

    Opaque ones are black in colour and alpha is full. Transparent ones must cut a film's picture
    off: beyond an edge that is merely empty there is no bar, and `visible` trims it.
    """
    height, width = totals.most_alpha.shape
    black = totals.most_color <= 24
    kinds = {
        "opaque": black & (totals.least_alpha >= high),
        "transparent": black & (totals.most_alpha <= low),
    }
    for kind, dark in kinds.items():
        for axis, side in ((1, height), (0, width)):
            lines = dark.all(axis=axis)
            if lines.all() or not (lines[0] and lines[-1]):
                continue
            inside = np.flatnonzero(~lines)
            first, last = int(inside[0]), side - 1 - int(inside[-1])
            if abs(first - last) > max(2, side // 50) or min(first, last) < 2:
                continue
            film = len(totals.coverage) > 1
            if kind == "transparent" and not (
                film and _cut_off(totals, axis, first, side - 1 - last)
            ):
                continue
            length = side - first - last
            rect = (0, first, width, length) if axis == 1 else (first, 0, length, height)
            where = "above and below" if axis == 1 else "left and right"
            return rect, f"{kind} black bars of {first} and {last} pixels {where}"
    return None, ""


def _cut_off(totals: Totals, axis: int, first: int, last: int) -> bool:
    """Returns whether what is shown reaches both other sides, and ends at both lines as if cut."""
    alpha = totals.most_alpha if axis == 1 else totals.most_alpha.T
    reaches = (alpha[:, 0] >= 128).any() and (alpha[:, -1] >= 128).any()
    return bool(reaches and all((alpha[line] >= 128).mean() > 0.25 for line in (first, last)))
