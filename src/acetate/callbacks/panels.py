"""Draws the first validation clips: source, reconstruction, and where alpha is wrong."""

import math
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from acetate.alpha import PALETTE, PALETTE_NAMES, checkerboard, over, palette
from acetate.pages import of_run
from acetate.pages.clips import Shown, shown
from acetate.video_io import write_video
from acetate.video_out import draw_guide

COLUMNS = ("source", "reconstruction", "alpha", "alpha_hat", "|alpha_hat - alpha|")
BACKGROUNDS = (*PALETTE_NAMES, "checker")
# A light fringe shows on key (black), a dark one on white.
VIDEO_BACKGROUNDS = ("key", "white")
VIDEO_SECONDS = 2.0  # shorter clips are repeated up to this

GAP = 4  # pixels between tiles
LONGEST_KEY = 40  # characters of a title, which has figures after the key
GROUND, INK = (34, 34, 38), (235, 235, 235)


@dataclass(frozen=True)
class Clip:
    """One validation clip on the CPU, uint8, and its own figures: rgb (3, T, H, W), alpha (1, T, H,
    W)."""

    key: str
    rgb: Tensor
    alpha: Tensor
    rgb_hat: Tensor
    alpha_hat: Tensor
    psnr: float = math.nan  # dB, over the eight colours
    mae: float = math.nan  # of alpha
    prompt: str = ""

    def on_page(self, fps: float, source: bool) -> Shown:
        """Returns the clip, or what was made of it, as the run's page shows it."""
        parts = (self.rgb, self.alpha) if source else (self.rgb_hat, self.alpha_hat)
        figures = {} if source else {"PSNR": self.psnr, "alpha MAE": self.mae}
        return shown(torch.cat(parts).permute(1, 2, 3, 0).numpy(), fps, self.prompt, figures)

    def title(self, step: int) -> str:
        figures = f"PSNR over 8 colours {self.psnr:.2f} dB, alpha MAE {self.mae:.4f}"
        key = self.key if len(self.key) <= LONGEST_KEY else f"{self.key[: LONGEST_KEY - 1]}…"
        return f"{key}, step {step}: {figures}"


def quality(rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor) -> tuple[float, float]:
    """Returns a clip's share of the validation's rgb/psnr and alpha/mae from (C, T, H, W) each;
    predictions are unclamped."""
    rgb_hat, alpha_hat = rgb_hat.float().clamp(-1, 1), alpha_hat.float().clamp(0, 1)
    rgb, alpha = rgb.float(), alpha.float()
    errors = [
        (over(rgb_hat, alpha_hat, ground) - over(rgb, alpha, ground)).square().mean((0, 2, 3)) / 4
        for ground in palette(rgb.device)
    ]
    psnr = -10 * torch.stack(errors).clamp_min(1e-10).log10().mean()
    return float(psnr), float((alpha_hat - alpha).abs().mean())


def to_bytes(x: Tensor, low: float) -> Tensor:
    """Maps [low, 1] to uint8 on the CPU; NaN becomes 0 so that a diverged run can still be looked
    at."""
    x = torch.nan_to_num(x.detach().float(), nan=low).clamp(low, 1)
    return ((x - low) * (255 / (1 - low))).round().byte().cpu()


def heat(error: Tensor) -> Tensor:
    """Maps |error| (1, H, W) in [0, 1] to black-red-yellow-white (3, H, W) in [-1, 1], by its
    square root.

    The scale is fixed, so that steps compare; the root keeps both 1/255 and 1 apart from their
    neighbours.
    """
    x = 3 * error.sqrt()
    return torch.cat([x, x - 1, x - 2]).clamp(0, 1) * 2 - 1


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Returns even sides of a large tile: the short side comes to 192..384 pixels by a whole
    factor."""
    short = min(height, width)
    factor = 2 * math.ceil(96 / short) if short < 192 else 1 / math.ceil(short / 384)
    return 2 * round(height * factor / 2), 2 * round(width * factor / 2)


def picture(tile: Tensor, height: int, width: int) -> Image.Image:
    """Scales (3, H, W) in [-1, 1] to height x width: pixels stay square when enlarged, are averaged
    when reduced."""
    if tile.shape[1:] != (height, width):
        mode = "nearest" if height > tile.shape[1] else "area"
        tile = F.interpolate(tile[None], (height, width), mode=mode)[0]
    pixels = ((tile + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class Frame:
    """One frame of a clip in floats, and its tiles (3, H, W) in [-1, 1]."""

    def __init__(self, clip: Clip, t: int):
        self.rgb, self.rgb_hat = (x[:, t] / 127.5 - 1 for x in (clip.rgb, clip.rgb_hat))
        self.alpha, self.alpha_hat = (x[:, t] / 255 for x in (clip.alpha, clip.alpha_hat))

    def composites(self, background: str) -> tuple[Tensor, Tensor]:
        """Returns source and reconstruction over a background."""
        if background == "checker":
            height, width = self.rgb.shape[-2:]
            ground = checkerboard(height, width, cell=max(4, min(height, width) // 12))[:, 0]
        else:
            ground = PALETTE[PALETTE_NAMES.index(background)][:, None, None]
        return over(self.rgb, self.alpha, ground), over(self.rgb_hat, self.alpha_hat, ground)

    def columns(self) -> tuple[Tensor, ...]:
        alpha, alpha_hat = (x.expand(3, -1, -1) * 2 - 1 for x in (self.alpha, self.alpha_hat))
        return (
            *self.composites("checker"),
            alpha,
            alpha_hat,
            heat((self.alpha_hat - self.alpha).abs()),
        )


@lru_cache
def _has_glyph(character: str) -> bool:
    """Returns whether Pillow's own font, which draws a box for what it lacks, has this
    character."""
    font = ImageFont.load_default(20)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def drawable(text: str) -> str:
    """Returns the text on one line in characters that the font has: accents go, and all others that
    it lacks become boxes."""
    drawn = []
    for character in " ".join(text.split()):
        if unicodedata.category(character) in ("Mn", "Cc", "Cf"):  # marks, control codes, joiners
            continue
        if not character.isspace() and not _has_glyph(character):
            character = unicodedata.normalize("NFKD", character)[0]
            character = character if _has_glyph(character) else "\uffff"
        drawn.append(character)
    return "".join(drawn)


def wrapped(text: str, font: Any, width: float, lines: int) -> list[str]:
    """Breaks a text into at most `lines` lines of at most `width` pixels; what does not fit ends in
    an ellipsis."""
    rest, found = drawable(text), []
    while rest and len(found) < lines:
        count = _fitting(rest, font, width)
        if count < len(rest) and len(found) == lines - 1:
            count = _fitting(rest, font, width - font.getlength("…"))
            found.append(rest[:count].rstrip() + "…")
            break
        if count < len(rest):
            # between words, where there is a space
            count = rest.rfind(" ", 0, count + 1) + 1 or count
        found.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    return found or [""]


def _fitting(text: str, font: Any, width: float) -> int:
    """Returns how many characters from the front fit into the width, at least one."""
    low, high = 1, min(len(text), 4000)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


class Sheet:
    """A dark sheet with lines for title and labels above the tiles; its text grows with the
    tile."""

    def __init__(self, tile: int, width: int, height: int, title: str):
        self.text = max(14, tile // 14)
        self.top = 4 * self.text  # where the tiles begin
        self.image = Image.new("RGB", (width, self.top + height), GROUND)
        self.draw = ImageDraw.Draw(self.image)
        (title,) = self.lines(title, width - 4 * GAP, 1)
        self.write(2 * GAP, self.text, title, "lm")

    def font(self, size: float = 1) -> Any:
        return ImageFont.load_default(round(size * self.text))

    def lines(self, text: str, width: float, most: int, size: float = 1) -> list[str]:
        return wrapped(text, self.font(size), width, most)

    def write(self, x: float, y: float, text: str, anchor: str = "mm", size: float = 1) -> None:
        """Writes one line, in characters that the font has."""
        self.draw.text((x, y), text, fill=INK, font=self.font(size), anchor=anchor)

    def label(self, x: float, text: str) -> None:
        self.write(x, 3.2 * self.text, text)

    def paste(
        self,
        tile: Tensor,
        x: int,
        y: int,
        height: int,
        width: int,
        guide: Tensor | None = None,
        t: int = 0,
    ) -> None:
        """Puts a tile (3, H, W) in [-1, 1] at x, y, counted from where the tiles begin; draws the
        guide at frame t as `draw_guide` does."""
        shown = picture(tile, height, width)
        if guide is not None:
            draw_guide(shown, guide, t)
        self.image.paste(shown, (x, self.top + y))

    def heat_bar(self, x: int, width: int) -> None:
        """Draws the scale of the error column, with values at their places."""
        height = self.text // 2
        ramp = heat(torch.linspace(0, 1, width).square().expand(1, height, width))
        self.image.paste(picture(ramp, height, width), (x, height))
        for value, anchor in ((0, "lt"), (0.01, "mt"), (0.1, "mt"), (0.5, "mt"), (1, "rt")):
            self.write(x + width * value**0.5, 1.2 * self.text, f"{value:g}", anchor, 0.75)


def strip(clip: Clip, rows: int, step: int) -> Image.Image:
    """Draws one row per time, spread from the first frame to the last.

    Source and reconstruction over a checkerboard, alpha, alpha_hat and the alpha error; then, at
    half the size, the reconstruction over every background with the source beneath it.
    """
    times = sorted({round(float(t)) for t in np.linspace(0, clip.rgb.shape[1] - 1, rows)})
    height, width = tile_size(*clip.rgb.shape[-2:])
    half = height // 2, width // 2
    left = max(14, width // 14) * 4  # room for "t=80"
    middle = left + len(COLUMNS) * (width + GAP) + 3 * GAP
    row_height = 2 * half[0] + 4 * GAP
    size = middle + len(BACKGROUNDS) * (half[1] + GAP), len(times) * row_height
    sheet = Sheet(width, *size, clip.title(step))
    sheet.heat_bar(left + 4 * (width + GAP), width)
    sheet.write(middle, sheet.text, "top: reconstruction over, bottom: source over", "lm")
    for i, name in enumerate(COLUMNS):
        sheet.label(left + i * (width + GAP) + width / 2, name)
    for i, name in enumerate(BACKGROUNDS):
        sheet.label(middle + i * (half[1] + GAP) + half[1] / 2, name)
    for row, t in enumerate(times):
        frame, y = Frame(clip, t), row * row_height
        sheet.write(left / 2, sheet.top + y + height / 2, f"t={t}")
        for i, tile in enumerate(frame.columns()):
            sheet.paste(tile, left + i * (width + GAP), y, height, width)
        for i, name in enumerate(BACKGROUNDS):
            source, reconstruction = frame.composites(name)
            sheet.paste(reconstruction, middle + i * (half[1] + GAP), y, *half)
            sheet.paste(source, middle + i * (half[1] + GAP), y + half[0] + GAP // 2, *half)
    return sheet.image


def movie(clip: Clip, fps: float, step: int) -> NDArray[np.uint8]:
    """Draws the large columns and two backgrounds over time, uint8 (T, H, W, 3) with even sides for
    yuv420."""
    height, width = tile_size(*clip.rgb.shape[-2:])
    labels = (*COLUMNS, *(f"over {name}" for name in VIDEO_BACKGROUNDS))
    frames = []
    for t in range(clip.rgb.shape[1]):
        sheet = Sheet(width, len(labels) * (width + GAP), height, f"{clip.title(step)}, t={t}")
        sheet.heat_bar(4 * (width + GAP), width)
        frame = Frame(clip, t)
        composites = (frame.composites(name)[1] for name in VIDEO_BACKGROUNDS)
        for i, (label, tile) in enumerate(
            zip(labels, (*frame.columns(), *composites), strict=True)
        ):
            sheet.label(i * (width + GAP) + width / 2, label)
            sheet.paste(tile, i * (width + GAP), 0, height, width)
        frames.append(np.asarray(sheet.image))
    return np.tile(np.stack(frames), (math.ceil(VIDEO_SECONDS * fps / len(frames)), 1, 1, 1))


def save_picture(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")  # nobody opens half a file
    image.save(partial)
    os.replace(partial, path)


class Panels(Callback):
    """Draws the first `clips` clips that rank 0 validates, at every validation run; the sanity run
    is step 0.

    Files: `<directory, or the trainer's default_root_dir>/panels/step_00001000/<key>.png` and, for
    clips of more than one frame, `.mp4`; beside panels/ clips.html, which plays the clips of all
    validations. wandb gets both, TensorBoard the picture (its video needs moviepy below 2); other
    loggers have the files. The task's validation_step returns rgb_hat and alpha_hat, unclamped.
    """

    def __init__(self, clips: int, fps: float, rows: int = 3, directory: str | None = None):
        for name, value in (("clips", clips), ("fps", fps), ("rows", rows)):
            if value <= 0:
                raise ValueError(
                    f"{name}={value}; must be positive. Leave Panels out to draw nothing."
                )
        self.clips, self.fps, self.rows, self.directory = clips, fps, rows, directory

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn: set[str] = set()
        self._played: list[Clip] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero or dataloader_idx > 0:
            return
        for i, key in enumerate(batch["key"]):
            # A sampler that pads the last batch repeats clips; one without a key stands in for bad
            # ones.
            if key and len(self._drawn) < self.clips and key not in self._drawn:
                self._drawn.add(key)
                self._draw(trainer, _clip(outputs, batch, i))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._played:
            return
        run = self._folder(trainer)
        for source in (True, False):
            clips = [(clip.key, clip.on_page(self.fps, source)) for clip in self._played]
            of_run.keep(run, trainer.global_step, clips, source)
        self._played = []

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.directory or trainer.default_root_dir)

    def _draw(self, trainer: Trainer, clip: Clip) -> None:
        step, name = trainer.global_step, re.sub(r"[^\w.-]", "_", clip.key)
        self._played.append(clip)
        folder = self._folder(trainer) / "panels" / f"step_{step:08d}"
        image, video = folder / f"{name}.png", folder / f"{name}.mp4"
        sheet = strip(clip, self.rows, step)
        save_picture(sheet, image)
        if clip.rgb.shape[1] > 1:
            write_video(video, movie(clip, self.fps, step), self.fps)
        for logger in trainer.loggers:
            _log(logger, clip.key, sheet, image, video if video.exists() else None, step)


def _clip(outputs: Any, batch: Any, index: int) -> Clip:
    missing = [name for name in ("rgb_hat", "alpha_hat") if name not in (outputs or {})]
    if missing:
        raise KeyError(
            f"validation_step returned no {' and no '.join(missing)}; Panels draws "
            "reconstructions. Return them from the task, or take Panels out of the callbacks."
        )
    rgb, alpha = batch["rgb"][index], batch["alpha"][index]
    rgb_hat, alpha_hat = outputs["rgb_hat"][index], outputs["alpha_hat"][index]
    psnr, mae = quality(rgb_hat, alpha_hat, rgb, alpha)
    return Clip(
        key=batch["key"][index],
        rgb=to_bytes(rgb, -1),
        alpha=to_bytes(alpha, 0),
        rgb_hat=to_bytes(rgb_hat, -1),
        alpha_hat=to_bytes(alpha_hat, 0),
        psnr=psnr,
        mae=mae,
        prompt=batch["prompt"][index] if "prompt" in batch else "",
    )


def _log(
    logger: Logger, key: str, sheet: Image.Image, image: Path, video: Path | None, step: int
) -> None:
    caption = f"{key}, step {step}"
    if isinstance(logger, WandbLogger):
        logger.log_image(f"panels/{key}", [str(image)], step=step, caption=[caption])
        if video:
            logger.log_video(
                f"panels_video/{key}", [str(video)], step=step, caption=[caption], format=["mp4"]
            )
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(f"panels/{key}", np.asarray(sheet), step, dataformats="HWC")
