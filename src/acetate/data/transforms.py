"""Turns stored frames into a training clip: rgb (3, T, H, W) straight in [-1, 1], alpha (1, T, H,
W) in [0, 1].

Filtering happens on premultiplied colour, so the colour that a transparent pixel hides never shows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from acetate.alpha import premultiply, unpremultiply

# a filter's weights add up to 1 only within rounding; closer than this to 0 or 1 is exact
SNAP = 1e-4
CROP_TRIES = 8
SPACES = ("premultiplied", "straight")  # what filters see; straight is the released choice


def check_frames(name: str, frames: int, time_stride: int) -> None:
    """Raises ValueError unless frames is 1 + a multiple of the VAE's temporal stride."""
    if frames < 1 or (frames - 1) % time_stride:
        examples = ", ".join(str(1 + time_stride * k) for k in (1, 2, 3))
        nearest = max(1, frames - (frames - 1) % time_stride)
        raise ValueError(
            f"{name}: {frames} frames; Wan needs {time_stride}k+1 ({examples}, ...). Use "
            f"frames={nearest}."
        )


def check_side(name: str, side: int, space_multiple: int) -> None:
    """Raises ValueError unless a side is a positive multiple of what the model's grid needs."""
    if side < 1 or side % space_multiple:
        nearest = max(space_multiple, round(side / space_multiple) * space_multiple)
        raise ValueError(
            f"{name}={side}; sides are multiples of {space_multiple}. Use {name}={nearest}."
        )


def window(count: int, frames: int, start: int) -> Tensor:
    """Returns indices (frames,) of a window into `count` frames that plays forth and back past the
    last one."""
    period = max(1, 2 * (count - 1))
    phase = torch.arange(start, start + frames) % period
    return torch.where(phase < count, phase, period - phase)


def to_float(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Turns uint8 (T, H, W, 4) into rgb (3, T, H, W) and alpha (1, T, H, W); colour under alpha 0
    becomes black."""
    rgb, alpha = frames.permute(3, 0, 1, 2).float().div(255).split((3, 1))
    return (rgb * 2 - 1).masked_fill(alpha == 0, -1), alpha


def to_uint8(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Turns rgb (3, T, H, W) and alpha (1, T, H, W) into uint8 (T, H, W, 4), rounded: the inverse
    of `to_float`."""
    frames = torch.cat(((rgb + 1) / 2, alpha)).permute(1, 2, 3, 0)
    return (frames * 255).round().to(torch.uint8).contiguous()


def pack(rgb: Tensor, alpha: Tensor, space: str = "premultiplied") -> Tensor:
    """Packs colour, premultiplied unless space is `straight`, and alpha into (T, 4, H, W) in [0,
    1]; zeros are transparent."""
    color = rgb if space == "straight" else premultiply(rgb, alpha)
    return torch.cat(((color + 1) / 2, alpha)).transpose(0, 1)


def unpack(packed: Tensor, space: str = "premultiplied") -> tuple[Tensor, Tensor]:
    """Inverts `pack`; alpha within SNAP of 0 or 1 becomes exact."""
    color, alpha = packed.transpose(0, 1).split((3, 1))
    alpha = torch.where(alpha > 1 - SNAP, 1.0, torch.where(alpha < SNAP, 0.0, alpha))
    if space == "straight":
        return color * 2 - 1, alpha
    return unpremultiply(color * 2 - 1, alpha, min_alpha=SNAP), alpha


def resize(
    rgb: Tensor, alpha: Tensor, height: int, width: int, space: str = "premultiplied"
) -> tuple[Tensor, Tensor]:
    """Resizes without aliasing; opaque stays exactly 1 and empty exactly 0.

    A triangle filter: its weights are never negative, so no colour can ring past what its alpha
    allows.
    """
    if rgb.shape[-2:] == (height, width):
        return rgb, alpha
    packed = pack(rgb, alpha, space)
    packed = F.interpolate(
        packed, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return unpack(packed, space)


def crop(frames: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Cuts a box out of (T, H, W, C) frames; outside of them it is transparent (0)."""
    box = frames[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    pad_top, pad_left = min(max(-top, 0), height), min(max(-left, 0), width)
    pad_bottom, pad_right = height - pad_top - box.shape[1], width - pad_left - box.shape[2]
    if not (pad_top or pad_left or pad_bottom or pad_right):
        return box
    return F.pad(box, (0, 0, pad_left, pad_right, pad_top, pad_bottom))


def covering_box(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of the largest centred box with the target's aspect, to
    half a source pixel."""
    ratio = min(rows / height, columns / width)
    box_height, box_width = (max(1, round(side * ratio)) for side in (height, width))
    return (rows - box_height) // 2, (columns - box_width) // 2, box_height, box_width


def containing_box(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of the smallest centred box with the target's aspect that
    holds the whole picture, to half a source pixel; it may reach beyond it."""
    ratio = max(rows / height, columns / width)
    box_height, box_width = (max(1, round(side * ratio)) for side in (height, width))
    return (rows - box_height) // 2, (columns - box_width) // 2, box_height, box_width


def pan(
    rgb: Tensor,
    alpha: Tensor,
    start: Tensor,
    step: Tensor,
    frames: int,
    height: int,
    width: int,
    space: str = "premultiplied",
) -> tuple[Tensor, Tensor]:
    """Moves a window over a still: (3, 1, H, W), (1, 1, H, W) -> (3, T, h, w), (1, T, h, w).

    start: (y, x) of the window's corner in the first frame; step: (y, x) pixels a frame. Both may
    be fractions: bilinear. Outside of the still is transparent.
    """
    packed = pack(rgb, alpha, space)
    rows, columns = packed.shape[-2:]
    corner = start + step * torch.arange(frames)[:, None]  # (T, 2)
    y = (corner[:, :1] + torch.arange(height) + 0.5) / rows * 2 - 1  # (T, h)
    x = (corner[:, 1:] + torch.arange(width) + 0.5) / columns * 2 - 1  # (T, w)
    grid = torch.stack(
        (x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1
    )
    still = packed.expand(frames, -1, -1, -1)
    return unpack(
        F.grid_sample(still, grid, mode="bilinear", padding_mode="zeros", align_corners=False),
        space,
    )


class ClipTransform:
    """Turns frames of any length and size into rgb (3, frames, height, width) and alpha (1, frames,
    height, width).

    train: random window, scale, crop and mirror image; otherwise the centre of all. A clip that is
    shorter plays forth and back, a smaller one is surrounded by transparency, a still becomes a
    slow pan. Nothing is enlarged, and nothing is stretched: the crop is at most half a source pixel
    off the target's aspect.
    """

    def __init__(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        time_stride: int,
        space_multiple: int,
        # side of the crop over that of the largest that fits, log-uniform
        scale_range: tuple[float, float],
        min_coverage: float,  # mean alpha that a random crop should reach
        flip: float,  # probability of a mirror image
        pan_speed: float,  # pixels a frame that the window moves over a still, at most
        train: bool,
        # or straight, as the released code, which bleeds hidden colour
        resize: str = "premultiplied",
    ):
        check_frames("clip", frames, time_stride)
        check_side("height", height, space_multiple)
        check_side("width", width, space_multiple)
        low, high = scale_range
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale_range=({low}, {high}); needs 0 < low <= high <= 1")
        for name, share in (("min_coverage", min_coverage), ("flip", flip)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}; must be in [0, 1]")
        if resize not in SPACES:
            raise ValueError(f"resize={resize!r}; known: {', '.join(SPACES)}")
        if pan_speed < 0:
            raise ValueError(f"pan_speed={pan_speed}; pixels a frame, at least 0")
        self.frames, self.height, self.width, self.train = frames, height, width, train
        self.scale_range, self.min_coverage, self.flip = (low, high), min_coverage, flip
        self.pan_speed, self.space = pan_speed, resize

    def __call__(self, frames: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Transforms frames, uint8 (T, H, W, 4) of straight colour. The result depends on frames
        and generator alone."""
        return self.shown(frames[self.window(len(frames), generator)], generator)

    def window(self, count: int, generator: Generator) -> Tensor:
        """Draws which of a clip's `count` frames are shown: indices (frames,), or (1,) of a still
        that is panned over."""
        if count == 1 < self.frames:
            return torch.zeros(1, dtype=torch.long)
        spare = count - self.frames
        if not self.train:
            return window(count, self.frames, max(spare, 0) // 2)
        # A short clip may start at any phase of its way forth and back.
        starts = spare + 1 if spare >= 0 else max(1, 2 * (count - 1))
        return window(count, self.frames, int(torch.randint(starts, (), generator=generator)))

    def shown(self, frames: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Transforms the frames of a `window`."""
        if len(frames) == self.frames:
            clip = to_float(crop(frames, *self._box(frames, generator)))
            rgb, alpha = resize(*clip, self.height, self.width, self.space)
        else:
            rgb, alpha = self._pan(frames, generator)
        if self.train and _uniform(generator, 0, 1) < self.flip:
            rgb, alpha = rgb.flip(-1), alpha.flip(-1)
        return rgb.contiguous(), alpha.contiguous()

    def _box(self, frames: Tensor, generator: Generator) -> tuple[int, int, int, int]:
        """Returns top, left, height, width in source pixels: the first of CROP_TRIES boxes that
        shows enough."""
        rows, columns = frames.shape[1:3]
        best, best_coverage = (0, 0, 0, 0), -1.0
        for _ in range(CROP_TRIES if self.train else 1):
            share = 1.0
            if self.train:
                share = math.exp(_uniform(generator, *map(math.log, self.scale_range)))
            shrink = max(1.0, share * min(rows / self.height, columns / self.width))
            height, width = round(self.height * shrink), round(self.width * shrink)
            top = self._place(rows - height, generator)
            box = (top, self._place(columns - width, generator), height, width)
            # Padding counts as empty. Every fourth row and column is plenty for a mean.
            coverage = crop(frames[..., 3:], *box)[::2, ::4, ::4].float().mean().item() / 255
            if coverage > best_coverage:
                best, best_coverage = box, coverage
            if coverage >= self.min_coverage:
                break
        return best

    def _place(self, spare: int, generator: Generator) -> int:
        """Draws the offset of a box along a side with `spare` pixels left; negative where the box
        is the larger one."""
        if not self.train:
            return spare // 2
        return int(torch.randint(min(spare, 0), max(spare, 0) + 1, (), generator=generator))

    def _pan(self, frames: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Moves a window evenly over a still through the box, in any direction with equal odds."""
        top, left, height, width = self._box(frames, generator)
        # (y, x) source pixels per pixel
        shrink = torch.tensor([height / self.height, width / self.width])
        rows, columns = (
            (torch.tensor(frames.shape[1:3]) / shrink).round().clamp_min(1).int().tolist()
        )
        rgb, alpha = resize(*to_float(frames), rows, columns, self.space)
        spare = torch.tensor([rows - self.height, columns - self.width])
        angle, speed = _uniform(generator, 0, 2 * math.pi), _uniform(generator, 0, self.pan_speed)
        # The same bound for both signs, and only then the place, so that borders favour no
        # direction.
        path = torch.tensor([math.sin(angle), math.cos(angle)]) * speed * (self.frames - 1)
        path = path.clamp(-spare.abs(), spare.abs())
        reach = path.abs() / 2
        middle = torch.tensor([top, left]) / shrink
        middle = middle.clamp(spare.clamp_max(0) + reach, spare.clamp_min(0) - reach)
        start, step = middle - path / 2, path / (self.frames - 1)
        return pan(rgb, alpha, start, step, self.frames, self.height, self.width, self.space)


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
