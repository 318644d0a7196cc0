"""Draws endless synthetic clips over moving backgrounds on the fly, to train the tiny base
model."""

import math
import sys
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from acetate.alpha import PALETTE, PALETTE_NAMES, harden, over
from acetate.data import drawing, synthetic
from acetate.data.clips import TrainBatches
from acetate.data.datamodule import apart_from_signals
from acetate.data.drawing import COLORS, Dice, canvas_of, inside, look_up, mix, rotate, splat
from acetate.data.transforms import resize
from acetate.draws import generator_for
from acetate.lightning_seams import batches_done

VIEWS = {"pictures": 5, "hard": 2, "soft": 1, "mattes": 2}  # shares; what an RGB model sees later
STYLES = {
    "plain": "Plain", "gradient": "Shaded", "stripes": "Striped", "noise": "Mottled",
    "blobs": "Blurred", "checker": "Checkered",
}  # fmt: skip
GREYS = {"black": "000000", "grey": "808080", "white": "ffffff"}


class EndlessClips(Dataset):
    """Makes clip i from (seed, i) alone, so that order and resume need no state; this one has every
    step-th. Prompts name what is behind the subject, too, and where it is on a larger canvas: what
    no word foretells, a DiT cannot learn to read."""

    def __init__(
        self,
        *,
        seed: int,
        start: int,
        length: int,
        step: int,
        frames: int,
        height: int,
        width: int,
        smallest: float,
        views: Mapping[str, int],
    ) -> None:
        self.seed, self.start, self.length, self.step = seed, start, length, step
        self.frames, self.height, self.width = frames, height, width
        self.smallest, self.views = smallest, dict(views)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """Returns {video (3, T, H, W) in [-1, 1], prompt, key}."""
        number = self.start + index * self.step
        generator = generator_for("endless", self.seed, number)
        kind_draw, view_draw, color_draw, seed_draw = torch.randint(
            2**31, (4,), generator=generator
        ).tolist()
        kind = synthetic.KINDS[kind_draw % len(synthetic.KINDS)]
        size = (self.frames, self.height, self.width)
        clip = synthetic.render(kind, seed_draw, *size)
        rgb, alpha, where = clip.rgb, clip.alpha, ""
        if self.smallest < 1:
            draws = torch.rand(3, generator=generator).tolist()
            place = (self.smallest + (1 - self.smallest) * draws[0], *draws[1:])
            rgb, alpha = placed(rgb, alpha, *place)
            where = named_place(*place)
        video, behind = self._view(rgb, alpha, view_draw, color_draw, size)
        subject = clip.prompt.removeprefix("Transparent background").removesuffix(".")
        return {
            "video": video,
            "prompt": f"{behind}{subject}{where}.",
            "key": f"{kind}-{seed_draw}",
        }

    def _view(
        self, rgb: Tensor, alpha: Tensor, draw: int, color: int, size: tuple[int, int, int]
    ) -> tuple[Tensor, str]:
        """Renders one of the views that an RGB model is shown later, and names what is behind."""
        ends = list(accumulate(self.views.values()))
        draw %= ends[-1]
        view = next(name for name, end in zip(self.views, ends, strict=True) if draw < end)
        if view == "pictures":
            behind, words = background(color, *size)
            return over(rgb, alpha, behind), words
        if view == "mattes":
            return (alpha * 2 - 1).expand(3, *size), "Alpha"
        plain, name = PALETTE[color % 8].view(3, 1, 1, 1), PALETTE_NAMES[color % 8]
        words = f"Plain {name.replace('key', 'black')} background"
        return over(rgb, harden(alpha) if view == "hard" else alpha, plain), words


class EndlessDataModule(LightningDataModule):
    """Gives clips of frames = time_stride * k + 1; validation clips come from another part of the
    seed space.

    Rank r of n draws the clips r, r + n, ...; batch_size is per rank, val_clips are of all ranks
    together. smallest: scale of the subject, drawn from here to 1 with a place for it. views:
    shares of clips over pictures, hard and soft renders over a plain colour, and mattes: clips that
    are their own alpha, as a grey picture.
    """

    def __init__(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        batch_size: int,
        val_clips: int,
        seed: int,
        num_workers: int,
        smallest: float = 1.0,
        views: Mapping[str, int] = VIEWS,
    ) -> None:
        super().__init__()
        if not 0 < smallest <= 1:
            raise ValueError(
                f"data.smallest={smallest}; a scale in (0, 1]. 1 leaves clips as drawn."
            )
        if set(views) - set(VIEWS) or min(views.values()) < 0 or not sum(views.values()):
            raise ValueError(
                f"data.views={dict(views)}; whole shares, at least one above 0, of"
                f" {', '.join(VIEWS)}."
            )
        self.smallest, self.views = smallest, dict(views)
        self.frames, self.height, self.width = frames, height, width
        self.batch_size, self.val_clips = batch_size, val_clips
        self.seed, self.num_workers = seed, num_workers

    def train_dataloader(self) -> DataLoader:
        rank, world, finished = 0, 1, 0
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            finished = batches_done(self.trainer)
        batches = TrainBatches(
            lambda: finished * self.batch_size * world, self.batch_size, rank, world
        )
        clips = self.numbered(start=0, length=sys.maxsize, step=1)
        return DataLoader(
            clips,
            batch_sampler=batches,
            num_workers=self.num_workers,
            worker_init_fn=apart_from_signals,
        )

    def val_dataloader(self) -> DataLoader:
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        share = max(1, self.val_clips // world)
        clips = self.numbered(start=2**31 + rank, length=share, step=world)
        return DataLoader(
            clips,
            batch_size=min(self.batch_size, share),
            num_workers=self.num_workers,
            worker_init_fn=apart_from_signals,
        )

    def identity(self) -> list[object]:
        """Returns all that decides which pictures the clips are."""
        size = [self.frames, self.height, self.width]
        drawings = [
            Path(str(module.__file__)).read_text()
            for module in (synthetic, drawing, sys.modules[__name__])
        ]
        return [self.seed, *size, self.smallest, self.views, *drawings]

    def numbered(self, *, start: int, length: int, step: int) -> EndlessClips:
        """Makes the clips of the numbers start, start + step, ..."""
        return EndlessClips(
            seed=self.seed,
            start=start,
            length=length,
            step=step,
            frames=self.frames,
            height=self.height,
            width=self.width,
            smallest=self.smallest,
            views=self.views,
        )


def placed(
    rgb: Tensor, alpha: Tensor, scale: float, above: float, before: float
) -> tuple[Tensor, Tensor]:
    """Shows a clip smaller on its transparent canvas; above and before: shares of the slack."""
    height, width = alpha.shape[-2:]
    rows, columns = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = round(above * (height - rows)), round(before * (width - columns))
    small = resize(rgb, alpha, rows, columns)
    pad = (left, width - columns - left, top, height - rows - top)
    return F.pad(small[0], pad, value=-1), F.pad(small[1], pad)


def named_place(scale: float, above: float, before: float) -> str:
    """Returns the size and the place, in words, of a subject on a larger canvas; "" where it fills
    it."""
    if scale > 0.8:
        return ""
    row = "top" if above < 1 / 3 else "bottom" if above > 2 / 3 else ""
    column = "left" if before < 1 / 3 else "right" if before > 2 / 3 else ""
    size = "small, " if scale < 0.6 else ""
    return f", {size}at the {f'{row} {column}'.strip() or 'centre'}"


def named_color(rgb: Tensor) -> str:
    """Finds the name of the nearest of the drawings' colours and greys to (3,) in [0, 1]."""
    names = COLORS | GREYS
    values = torch.stack([drawing.color(code).view(3) for code in names.values()])
    return list(names)[int((values - rgb).square().sum(1).argmin())]


def background(seed: int, frames: int, height: int, width: int) -> tuple[Tensor, str]:
    """Draws an opaque moving background with a natural spread of scales, (3, T, H, W) in [-1, 1],
    and names it."""
    canvas, dice = canvas_of(frames, height, width), Dice("background", seed)
    style = dice.pick(
        ("plain", "gradient", "stripes", "noise", "noise", "noise", "blobs", "blobs", "checker")
    )
    first, second, third = dice.reals(9, 0, 1).view(3, 3, 1, 1, 1)
    vivid = dice.real(0.1, 1)
    first, second, third = (mix(color.mean(), color, vivid) for color in (first, second, third))
    step, drift, tile = (
        dice.real(0.1, 0.4),
        dice.real(-0.5, 0.5),
        dice.noise(4, dice.real(1.1, 1.8), cycles=32),
    )
    u, v = rotate(canvas.x, canvas.y, dice.real(0, 6))
    u, clock = u + drift * canvas.t, canvas.t.view(1, -1)
    if style == "plain":
        rgb = first
    elif style == "gradient":
        rgb = mix(first, second, 0.5 + 0.5 * (2 * u).sin())
    elif style == "stripes":
        rgb = mix(
            first, second, inside((((u / step).remainder(1) - 0.5).abs() - 0.25) * step, canvas.px)
        )
    elif style == "checker":
        edge = (math.pi * u / step).sin() * (math.pi * v / step).sin() * step / math.pi
        rgb = mix(first, second, inside(edge, canvas.px))
    elif style == "blobs":
        cx, cy, radius = dice.reals(36, -0.7, 0.7).view(3, 12, 1)
        px, py = cx + 0.15 * (3 * clock + 9 * cy).sin(), cy + 0.15 * (2 * clock + 9 * cx).cos()
        weight = dice.reals(36, -0.8, 0.8).view(3, 12, 1).expand(3, 12, frames)
        rgb = first + splat(canvas, px, py, (radius.abs() + 0.1).expand(12, frames), weight)
    else:
        field = look_up(tile, 0.5 * u, 0.5 * v + 0.1 * canvas.t)
        rgb = mix(
            mix(first, second, 1.8 * field[:1] - 0.4), third, (2.5 * field[1:2] - 1).clamp(0, 1)
        )
    grain = look_up(tile[:, 2:], u, v) - 0.5
    rgb = rgb + dice.real(0, 0.3) * grain[:1] + dice.real(0, 0.1) * (first - second) * grain[1:]
    rgb = rgb.clamp(0, 1).expand(3, frames, height, width)
    words = f"{STYLES[style]} {named_color(rgb.mean((1, 2, 3)))} background"
    return (rgb * 2 - 1).contiguous(), words
