"""Measures a decoded clip and decides what it is. Nothing is changed here; data_prep.cleaning
applies decisions."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from acetate.video_io import Rect, RGBAClip
from data_prep.colour import confidence, mixtures
from data_prep.decisions import Colour, Decisions, Matte

Frames = NDArray[np.uint8]

NOISE = 12  # steps of alpha that a codec's noise reaches at most, beside 0 and 255
THUMB = 32  # pixels, side of the pictures that shots are compared by
SHOT = 4  # frames of the shortest shot
SEEN = 5e-4  # mean alpha of its fullest frame under which a clip is empty


def analyse(clip: RGBAClip, *, premultiplied: bool | None = None, matte: bool = False) -> Decisions:
    """What the clip is, how sure that is, and why.

    premultiplied: what a person says, if anything; else the colour is measured, and what the format
    defines (`clip.premultiplied`) counts as a strong belief. matte: colour is a whole picture and
    alpha its matte.
    """
    totals = _totals(clip.frames)
    reasons: dict[str, str] = {}
    low, high = noise_bounds(totals.histogram) if clip.lossy else (0, 255)
    reasons["alpha_low"] = (
        f"lossy: the peaks of the histogram of alpha at 0 and 255 end at {low} and {high}"
        if clip.lossy
        else "lossless"
    )
    state, reasons["matte"] = _matte(totals, low, high)
    crop, reasons["crop"] = bars(totals, low, high)
    still, reasons["still"] = _still(clip)
    thumbs = thumbnails(clip.frames) if len(clip.frames) > 2 and not still else None
    shots: tuple[int, ...] = ()
    if thumbs is not None:
        shots, reasons["cuts"] = cuts(thumbs)
        if state == "normal" and (share := flicker(thumbs, shots)) > 0.1:
            state, reasons["matte"] = (
                "flickers",
                f"coverage jumps to and fro in {share:.0%} of the frames",
            )
    colour, sure, reasons["colour"], figures = _colour(clip, low, high, premultiplied, matte)
    return Decisions(
        colour=colour,
        confidence=round(sure, 3),
        alpha_low=low,
        alpha_high=high,
        matte=state,
        crop=crop,
        visible=_box(totals.most_alpha > low),
        still=still,
        cuts=shots,
        reasons={name: reason for name, reason in reasons.items() if reason},
        figures=figures,
    )


def _colour(
    clip: RGBAClip, low: int, high: int, premultiplied: bool | None, matte: bool
) -> tuple[Colour, float, str, dict[str, float]]:
    """What colour is, how sure that is, in words, and the figures behind it."""
    if matte:
        return "matte", 1.0, "a picture with a matte: its foreground is estimated", {}
    if premultiplied is not None:
        return ("black" if premultiplied else "straight"), 1.0, "declared", {}
    found = mixtures(clip.frames, low, high, clip.lossy, clip.premultiplied is False)
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
        name = "premultiplied" if backdrop == "black" else "mixed with white"
        although = ", although the format says straight" if clip.premultiplied is False else ""
        return (
            ("white" if backdrop == "white" else "black"),
            sure,
            f"{name}: {how_sure(sure)}{although}",
            figures,
        )
    # With no block that tells, straight and mixed look alike: dark things, or hardly a soft pixel.
    told = evidence.informative / (evidence.informative + 8) if evidence.log_odds > -3 else 1.0
    sure = told * confidence(evidence.log_odds)
    return "straight", sure, f"straight: {how_sure(sure)}", figures


def how_sure(confidence: float) -> str:
    """In a word; data_prep.shard lists what is below fairly sure."""
    return "sure" if confidence >= 0.9 else "fairly sure" if confidence >= 0.5 else "unsure"


@dataclass(frozen=True)
class Totals:
    """Over all frames. histogram: pixels by alpha (256,); the rest: (H, W), 0..255."""

    histogram: NDArray[np.int64]
    most_colour: Frames  # of the brightest channel
    most_alpha: Frames
    least_alpha: Frames
    coverage: NDArray[np.float64]  # mean alpha of every frame, in [0, 1]


def _totals(frames: Frames) -> Totals:
    histogram = np.zeros(256, np.int64)
    most_colour, most_alpha = (
        np.zeros(frames.shape[1:3], np.uint8),
        np.zeros(frames.shape[1:3], np.uint8),
    )
    least_alpha = np.full(frames.shape[1:3], 255, np.uint8)
    coverage = np.zeros(len(frames))
    levels = np.arange(256)
    for i, frame in enumerate(frames):
        alpha = np.ascontiguousarray(frame[..., 3])
        counts = np.bincount(alpha.ravel(), minlength=256)
        histogram += counts
        coverage[i] = counts @ levels / (255 * alpha.size)
        for channel in range(3):
            np.maximum(most_colour, frame[..., channel], out=most_colour)
        np.maximum(most_alpha, alpha, out=most_alpha)
        np.minimum(least_alpha, alpha, out=least_alpha)
    return Totals(histogram, most_colour, most_alpha, least_alpha, coverage)


def noise_bounds(histogram: NDArray[np.int64]) -> tuple[int, int]:
    """Up to where alpha is noise around 0, and from where around 255: the feet of the histogram's
    end peaks.

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
    if totals.coverage.max() < SEEN or not (totals.most_alpha > low).any():
        return "empty", f"alpha covers {totals.coverage.max():.3%} of the fullest frame"
    opaque = totals.histogram[high:].sum() / totals.histogram.sum()
    if opaque > 0.999:
        return "full", f"{opaque:.2%} of the pixels are opaque"
    return "normal", ""


def _box(seen: NDArray[np.bool_]) -> Rect | None:
    """The smallest rectangle that holds every True."""
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def bars(totals: Totals, low: int, high: int) -> tuple[Rect | None, str]:
    """The picture between equal black bars at two opposite sides, through the whole clip; None
    without bars.

    Opaque ones are black in colour and alpha is full. Transparent ones must cut a film's picture
    off: beyond an edge that is merely empty there is no bar, and `visible` trims it.
    """
    height, width = totals.most_alpha.shape
    black = totals.most_colour <= 24
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
    """Whether what is shown reaches both other sides, and ends at both lines as if cut."""
    alpha = totals.most_alpha if axis == 1 else totals.most_alpha.T
    reaches = (alpha[:, 0] >= 128).any() and (alpha[:, -1] >= 128).any()
    return bool(reaches and all((alpha[line] >= 128).mean() > 0.25 for line in (first, last)))


def _still(clip: RGBAClip) -> tuple[bool, str]:
    """Whether all of several frames are the first one; after a lossy codec, whether all 4 x 4 means
    are within 3."""
    if len(clip.frames) == 1:
        return False, ""
    if not clip.lossy:
        same = all(np.array_equal(clip.frames[0], frame) for frame in clip.frames[1:])
        return same, f"all {len(clip.frames)} frames are equal" if same else ""
    first = _means(clip.frames[0])
    same = all(
        bool(((_means(frame) - first).abs() <= 3 / 255).all()) for frame in clip.frames[:0:-1]
    )
    return (
        same,
        f"all {len(clip.frames)} frames are equal but for the codec's noise" if same else "",
    )


def _means(frame: Frames) -> Tensor:
    return F.avg_pool2d(weighted(frame)[None], 4, ceil_mode=True)


def weighted(frame: Frames) -> Tensor:
    """(H, W, 4) -> colour times alpha, and alpha: (4, H, W) in [0, 1]."""
    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float() / 255
    return torch.cat((picture[:3] * picture[3:], picture[3:]))


def thumbnails(frames: Frames) -> Tensor:
    """(T, 4, h, w), h and w at most THUMB: means of colour times alpha, and of alpha, in [0, 1]."""
    size = [min(THUMB, side) for side in frames.shape[1:3]]
    return torch.stack([F.adaptive_avg_pool2d(weighted(frame), size) for frame in frames])


def change(first: Tensor, second: Tensor) -> float:
    """How much of two thumbnails was exchanged, in [0, 1]: the smaller of the shares of alpha that
    go and that come.

    What stays has the same straight colour, at the same brightness or at another one that all
    share. So what fades, flashes, appears or leaves changes little: nothing else goes, or nothing
    else comes.
    """
    alphas = first[3], second[3]
    colours = [picture[:3] / picture[3].clamp_min(1e-3) for picture in (first, second)]
    means = [
        (colour * alpha).sum() / alpha.sum().clamp_min(1e-6)
        for colour, alpha in zip(colours, alphas, strict=True)
    ]
    shares = []
    for gain in (1.0, float(means[0] / means[1].clamp_min(1e-6))):
        apart = (colours[0] - gain * colours[1]).abs().amax(dim=0)
        stays = (torch.minimum(*alphas) * (1 - 4 * apart).clamp_min(0)).sum()
        shares.append(
            1 - float(stays / torch.minimum(alphas[0].sum(), alphas[1].sum()).clamp_min(1e-6))
        )
    return min(shares)


def cuts(thumbs: Tensor) -> tuple[tuple[int, ...], str]:
    """First frames of new shots. thumbs: (T, 4, h, w).

    A cut exchanges half of the picture, and by a third of it more than any of the frames around do,
    and for good: the four frames before differ as much from the four after. Fast motion changes all
    frames alike, a flash comes back. A shot has at least SHOT frames, and shows something.
    """
    count = len(thumbs)
    steps = [0.0, *(change(thumbs[i - 1], thumbs[i]) for i in range(1, count))]
    coverage = thumbs[:, 3].mean(dim=(1, 2))
    shows = coverage > 0.02 * coverage.max()
    found: list[int] = []
    told = []
    for i in range(SHOT, count - SHOT + 1):
        around = max(steps[j] for j in range(max(1, i - 2), min(count, i + 3)) if j != i)
        if (
            steps[i] < max(0.5, around + 0.3)
            or not (shows[i - 1] and shows[i])
            or i - (found or [0])[-1] < SHOT
        ):
            continue
        before, after = range(max(0, i - 4), i), range(i, min(count, i + 4))
        if min(change(thumbs[a], thumbs[b]) for a in before for b in after) >= 0.8 * steps[i]:
            found.append(i)
            told.append(
                f"{i} ({steps[i]:.0%} of the picture is exchanged, at most {around:.0%} around it)"
            )
    return tuple(found), f"new shots at frame {', '.join(told)}" if told else ""


def flicker(thumbs: Tensor, shots: tuple[int, ...] = ()) -> float:
    """Share of the frames whose mean alpha is off that of its two neighbours by more than a
    quarter.

    A single flash sets three frames off, and is no flicker.
    """
    coverage = thumbs[:, 3].mean(dim=(1, 2))
    middle, around = coverage[1:-1], (coverage[:-2] + coverage[2:]) / 2
    most = torch.maximum(middle, torch.maximum(coverage[:-2], coverage[2:])).clamp_min(SEEN)
    jumps = (middle - around).abs() > most / 4
    beside = [i - 1 for shot in shots for i in (shot - 1, shot) if 0 <= i - 1 < len(jumps)]
    jumps[beside] = False
    return float(jumps.float().mean()) if jumps.sum() > 3 else 0.0
