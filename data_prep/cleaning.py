"""Applies what was decided about a clip to its frames: uint8 (T, H, W, 4) in and out, straight
colour out."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from acetate.data.transforms import resize, to_float, to_uint8
from acetate.media.clip import LIMITS
from acetate.video_io import Rect
from data_prep.decisions import AUTO, Decisions, check_choices

Frames = NDArray[np.uint8]
Indices = NDArray[np.int64]
Verdict = Literal["refuse", "keep"]
NEAR = 8  # pixels
MULTI_LEVEL = "pymatting.foreground.estimate_foreground_ml"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of what is done to a clip. Alpha is in 0..255 throughout."""

    choices: Mapping[str, str]  # of Decisions.overridden, for every clip
    min_alpha: int  # colour is divided by no less than this: below, the quotient is rounding noise
    trim: bool  # margins that are empty through the whole clip go
    max_side: int | None  # longer sides are scaled down to this
    # pixels that colour goes on under alpha 0; 0: black; None: over the whole frame
    bleed: int | None
    fps: float | None  # frames a second after resampling; None: as they are
    default_fps: float  # of sequences, which carry no rate
    max_frames: int  # longer shots are cut into pieces of equal length
    empty: Verdict
    full: Verdict
    flickers: Verdict

    def __post_init__(self) -> None:
        check_choices(self.choices)

    def apply(self, decisions: Decisions) -> Decisions:
        """Returns the decisions with what the command line decides for every clip."""
        return decisions.overridden("the command line", self.choices)

    def refusal(self, decisions: Decisions) -> str | None:
        """Returns why the clip is left out; None if it is not."""
        if decisions.matte == "normal" or getattr(self, decisions.matte) == "keep":
            return None
        why = decisions.reasons.get("matte", "")
        return f"alpha is {decisions.matte}: {why}. {decisions.matte}=keep takes it in".replace(
            "is flickers", "flickers"
        )


def done(decisions: Decisions, settings: Settings) -> dict[str, str]:
    """Returns step -> what was done to a clip and why, in the order of the steps."""
    why = decisions.reasons
    steps = {}
    if decisions.crop:
        steps["crop"] = f"cut to {list(decisions.crop)}: {why.get('crop', '')}"
    if decisions.still:
        steps["still"] = f"one frame kept: {why.get('still', '')}"
    if decisions.cuts and not decisions.still:
        steps["cuts"] = f"{len(decisions.cuts) + 1} shots: {why.get('cuts', '')}"
    if decisions.alpha_range:
        floor, ceiling = decisions.alpha_range
        steps["range"] = f"{floor}..{ceiling} to 0..255: {why.get('alpha_range', '')}"
    if decisions.alpha_low > 0 or decisions.alpha_high < 255:
        steps["alpha"] = (
            f"up to {decisions.alpha_low} to 0, from {decisions.alpha_high} to 255: "
            f"{why.get('alpha_low', '')}"
        )
    if decisions.color == "matte":
        steps["color"] = f"foreground estimated: {why.get('color', '')}"
    elif decisions.color != "straight":
        steps["color"] = f"{decisions.color} taken out ({why.get('color', '')})"
    if decisions.matte != "normal":
        steps["matte"] = f"kept although alpha is {decisions.matte}: {why.get('matte', '')}"
    if settings.trim and decisions.visible:
        steps["trim"] = f"margins around {list(decisions.visible)} cut off: empty in every frame"
    return steps


def shots(frames: int, fps: float, decisions: Decisions, settings: Settings) -> list[Indices]:
    """Returns which frames each piece of a clip takes: shots, resampled in time, in pieces of at
    most max_frames."""
    if decisions.still:
        return [np.zeros(1, np.int64)]
    ends = [0, *(cut for cut in decisions.cuts if cut < frames), frames]
    taken = []
    for start, end in pairwise(ends):
        shot = start + resample(end - start, fps, settings.fps)
        count = -(-len(shot) // settings.max_frames)
        taken += [shot[i * len(shot) // count : (i + 1) * len(shot) // count] for i in range(count)]
    return taken


def too_many(frames: int, fps: float, settings: Settings) -> str | None:
    """Returns why a clip is refused that the wanted rate would repeat without end."""
    most = max(LIMITS.max_frames, frames)
    count = frames * (settings.fps or fps) / fps
    if count <= most:
        return None
    return (
        f"fps={settings.fps:g} would make {count:,.0f} frames of its {frames} at {fps:g} frames a "
        f"second; at most {most:,}. Give a lower fps, or fps=null"
    )


def resample(frames: int, fps: float, target: float | None) -> Indices:
    """Returns the frame that is shown at each multiple of 1 / target; nothing is blended."""
    if target is None or frames == 1:
        return np.arange(frames)
    times = np.arange(max(1, round(frames * target / fps))) / target
    return np.minimum((times * fps + 1e-6).astype(np.int64), frames - 1)


def clean(frames: Frames, decisions: Decisions, settings: Settings) -> Frames:
    """Returns the frames of a piece as a shard holds them."""
    frames, visible = inside(frames, decisions)
    frames = stretch(frames, decisions.alpha_range)
    frames = snap(frames, decisions.alpha_low, decisions.alpha_high)
    backdrop = decisions.backdrop
    if backdrop is not None:
        frames = unmix(frames, backdrop, settings.min_alpha)
    if decisions.color == "matte":
        frames = foreground(frames)
    if settings.trim and visible:
        frames = cut(frames, visible)
    if settings.max_side is not None:
        frames = limit_side(frames, settings.max_side)
    # A quotient by a tiny alpha is noise: there, too, colour comes from around.
    return bleed(frames, settings.bleed, settings.min_alpha if backdrop is not None else 1)


def pieces(
    clip: Iterable[Frames], taken: Sequence[Indices], decisions: Decisions, settings: Settings
) -> Iterator[Iterator[Frames]]:
    """Yields the cleaned pictures of each piece, (H, W, 4), while the clip is read once, a picture
    at a time; each piece is to be read to its end before the next. Raises ValueError where the clip
    is too short.

    taken: which frames each takes, none before one of an earlier piece.
    """
    pictures = enumerate(clip)
    place, cleaned = -1, np.empty(0, np.uint8)

    def piece(indices: Indices) -> Iterator[Frames]:
        nonlocal place, cleaned
        for index in indices:
            if place < index:
                try:
                    while place < index:
                        place, frame = next(pictures)
                except StopIteration:
                    raise ValueError(
                        f"has {place + 1} frames, fewer than the manifest says; ingest the folder "
                        "again"
                    ) from None
                cleaned = clean(frame[None], decisions, settings)[0]
            yield cleaned

    yield from map(piece, taken)


def inside(frames: Frames, decisions: Decisions) -> tuple[Frames, Rect | None]:
    """Returns the frames between the bars, and where in them something is visible."""
    if decisions.crop is None:
        return frames, decisions.visible
    x, y, width, height = decisions.crop
    if decisions.visible is None:
        return cut(frames, decisions.crop), None
    left, top = max(decisions.visible[0], x), max(decisions.visible[1], y)
    right = min(decisions.visible[0] + decisions.visible[2], x + width)
    bottom = min(decisions.visible[1] + decisions.visible[3], y + height)
    visible = (
        (left - x, top - y, right - left, bottom - top) if left < right and top < bottom else None
    )
    return cut(frames, decisions.crop), visible


def cut(frames: Frames, rect: Rect) -> Frames:
    """Cuts a rectangle out. Raises ValueError for one that is not inside of the frames."""
    x, y, width, height = rect
    if x + width > frames.shape[2] or y + height > frames.shape[1]:
        raise ValueError(
            f"rectangle {list(rect)} is not inside of {frames.shape[2]}x{frames.shape[1]}; correct "
            "it"
        )
    return frames[:, y : y + height, x : x + width]


def snap(frames: Frames, low: int, high: int) -> Frames:
    """Sets alpha up to low to 0, from high on to 255: a hard threshold at 0 would paint all of a
    codec's noise."""
    if low == 0 and high == 255:
        return frames
    alpha = frames[..., 3:]
    alpha = np.where(alpha <= low, 0, np.where(alpha >= high, 255, alpha)).astype(np.uint8)
    return np.concatenate((frames[..., :3], alpha), axis=-1)


def stretch(frames: Frames, ends: tuple[int, int] | None) -> Frames:
    """Stretches alpha from one level to another to 0..255."""
    if ends is None:
        return frames
    alpha = stretched_levels(ends)[frames[..., 3:]]
    return np.concatenate((frames[..., :3], alpha), axis=-1)


def stretched_levels(ends: tuple[int, int]) -> NDArray[np.uint8]:
    """Returns what each level of alpha becomes, (256,)."""
    floor, ceiling = ends
    levels = (np.arange(256) - floor) * (255 / (ceiling - floor))
    return levels.clip(0, 255).round().astype(np.uint8)


def unmix(frames: Frames, backdrop: tuple[int, ...], min_alpha: int) -> Frames:
    """Returns the straight colour of colour over a backdrop (red, green, blue), 8 bit."""
    alpha = frames[..., 3:]
    behind = np.array(backdrop, np.int16)
    off = frames[..., :3].astype(np.int16) - behind
    scale = 255 / np.maximum(alpha, min_alpha).astype(np.float32)
    far = np.minimum(np.abs(off).astype(np.float32) * scale + 0.5, 255).astype(np.int16)
    straight = (behind + np.sign(off) * far).clip(0, 255).astype(np.uint8)
    return np.concatenate((straight, alpha), axis=-1)


def foreground(frames: Frames) -> Frames:
    """Estimates the colour of the thing alone, where a picture shows it mixed with a scene. Germer
    et al. 2020, multi-level."""
    import numba

    estimate = multi_level()
    numba.set_num_threads(1)  # its threads race, and the result would change from run to run
    done = []
    for frame in frames:
        picture, alpha = frame[..., :3] / 255.0, frame[..., 3] / 255.0
        color = estimate(picture, alpha).clip(0, 1)
        done.append(np.concatenate(((color * 255 + 0.5).astype(np.uint8), frame[..., 3:]), axis=-1))
    return np.stack(done)


def multi_level() -> Callable[..., NDArray[np.float32]]:
    """Returns pymatting's estimate_foreground_ml without importing the package, which compiles all
    that it has when it is first imported: a minute in place of seconds."""
    module = sys.modules.get(MULTI_LEVEL)
    if module is None:
        package = find_spec(MULTI_LEVEL.partition(".")[0])
        assert package is not None and package.submodule_search_locations is not None
        file = Path(*package.submodule_search_locations, *MULTI_LEVEL.split(".")[1:])
        spec = spec_from_file_location(MULTI_LEVEL, file.with_suffix(".py"))
        assert spec is not None and spec.loader is not None
        # under its own name, by which numba finds what it has compiled before
        module = sys.modules[MULTI_LEVEL] = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.estimate_foreground_ml


def limit_side(frames: Frames, max_side: int) -> Frames:
    """Scales clips down, premultiplied and antialiased; those that fit stay as they are."""
    height, width = frames.shape[1:3]
    scale = max_side / max(height, width)
    if scale >= 1:
        return frames
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = []
    for frame in frames:  # one at a time: floats of a whole clip can take gigabytes
        rgb, alpha = resize(*to_float(torch.from_numpy(frame[None].copy())), *size)
        small.append(to_uint8(rgb, alpha))
    return torch.cat(small).numpy()


def bleed(frames: Frames, radius: int | None, trusted: int = 1) -> Frames:
    """Carries visible colour on under alpha 0 for `radius` pixels, None: everywhere; beyond it is
    black.

    So that a filter which mixes straight colours finds no foreign one at an edge. Where alpha is
    below `trusted`, colour comes from around, too, if there is any within NEAR pixels. Alpha stays.
    Push-pull (Gortler et al. 1996): averages over ever larger squares, weighted by alpha, fill what
    the smaller ones leave open.
    """
    return np.stack([_bleed(frame, radius, trusted) for frame in frames])


def _bleed(frame: Frames, radius: int | None, trusted: int) -> Frames:
    alpha = frame[..., 3:]
    if (radius == 0 and trusted <= 1) or not (alpha >= trusted).any():
        return frame * (alpha > 0)
    weight = torch.from_numpy(alpha[..., 0].astype(np.float32))[None, None]
    hidden = weight == 0
    weight *= weight >= trusted
    from_around = hidden if radius is None else hidden & _within(weight > 0, radius)
    if trusted > 1:
        from_around = from_around | (~hidden & _within(weight > 0, NEAR) & (weight == 0))
    done = frame.copy()
    for channel in range(3):  # one at a time: floats of all are much memory
        done[..., channel] = _filled(done[..., channel], weight, hidden, from_around)
    return done


def _filled(
    channel: Frames, weight: torch.Tensor, hidden: torch.Tensor, from_around: torch.Tensor
) -> Frames:
    """Returns a channel (H, W) that is its surroundings' where `from_around` says so, and black
    where else it is hidden."""
    plane = torch.from_numpy(channel.astype(np.float32))[None, None]
    color = _push_pull(plane, weight).where(from_around, plane.masked_fill_(hidden, 0))
    return color[0, 0].add_(0.5).clamp_(0, 255).to(torch.uint8).numpy()


def _within(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Returns (1, 1, H, W): whether a True lies in the square of 2 radius + 1 pixels around."""
    for axis in (2, 3):
        lines = mask.movedim(axis, -1)
        places = torch.arange(side := lines.shape[-1])
        sums = F.pad(
            lines.cumsum(-1, dtype=torch.int32), (1, 0)
        )  # so that the cost does not grow with the radius
        last = (places + min(radius, side) + 1).clamp_max(side)
        first = (places - min(radius, side)).clamp_min(0)
        mask = (sums[..., last] > sums[..., first]).movedim(-1, axis)
    return mask


def _push_pull(color: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns, of (1, 1, H, W) each, colour where weight is above 0, and what lies around it
    elsewhere."""
    if max(color.shape[-2:]) == 1:
        return color * (weight > 0)
    sums = F.avg_pool2d(color * weight, 2, ceil_mode=True)
    weights = F.avg_pool2d(weight, 2, ceil_mode=True)
    coarse = _push_pull(sums.div_(weights.clamp_min(1e-6)), weights)
    coarse = F.interpolate(coarse, scale_factor=2.0, mode="nearest")[
        ..., : color.shape[-2], : color.shape[-1]
    ]
    return torch.where(weight > 0, color, coarse)


def overrides(**choices: object) -> dict[str, str]:
    """Settings of the command line as choices; what is left at auto is none."""
    texts = {name: str(value).lower() for name, value in choices.items()}
    return {name: text for name, text in texts.items() if text != AUTO}
