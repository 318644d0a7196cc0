"""Samples clips from fixed prompts and seeds while the DiT trains."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from acetate import regions
from acetate.alpha import checkerboard, over
from acetate.callbacks.panels import GAP, Sheet, save_picture, tile_size, to_bytes
from acetate.lightning_seams import log_row
from acetate.pages import of_run
from acetate.pages.clips import shown
from acetate.sampling import EllipsePath, Solver, decode, sample_clips
from acetate.steps import reader
from acetate.video_out import write_clip

FRAMES_SHOWN = 4
GIVEN = ("condition", "image_embeds", "ellipses")  # of a cached clip
CAPTIONS = 4  # of validation clips, where no prompts are given
LABEL_LINES, LABEL_SIZE = 4, 0.85  # at most; of the size of titles


def contact_sheet(
    clips: Sequence[tuple[str, Tensor, Tensor]],
    title: str,
    guide: Tensor | Sequence[Tensor | None] | None = None,
    given: Sequence[tuple[Tensor, Tensor]] = (),
) -> Image.Image:
    """Draws one row per clip (label, rgb (3, T, H, W), alpha (1, T, H, W)): frames over a
    checkerboard, then their alpha, then the label on as many lines as it takes, LABEL_LINES at
    most.

    guide (T, N, 2): the outline that all of them were sampled with, or that of each, drawn on every
    tile. given: the picture that each was made of, rgb (3, 1, H, W) and alpha, shown before both.
    """
    _, rgb, _ = clips[0]
    height, width = tile_size(*rgb.shape[-2:])
    height, width = height // 2, width // 2
    times = sorted({round(float(t)) for t in np.linspace(0, rgb.shape[1] - 1, FRAMES_SHOWN)})
    heads = ["given"] * bool(given) + [f"t={t}" for t in times]
    places = [GAP + column * (width + GAP) for column in range(2 * len(heads))]
    across, line = places[-1] + width + GAP, max(14, height // 8)
    text = Sheet(2 * height, across, line, "")  # which knows how wide letters are
    labels = [text.lines(label, across - 4 * GAP, LABEL_LINES, LABEL_SIZE) for label, _, _ in clips]
    tops = np.cumsum([0, *(height + 3 * GAP + line * len(lines) for lines in labels)]).tolist()
    sheet = Sheet(2 * height, across, tops[-1], title)
    for x, head in zip(places, [*heads, *(f"alpha {head}" for head in heads)], strict=True):
        sheet.label(x + width / 2, head)
    for row, ((_, rgb, alpha), y, lines) in enumerate(zip(clips, tops, labels, strict=False)):
        outline = guide if guide is None or isinstance(guide, Tensor) else guide[row]
        rgb, alpha = rgb.clamp(-1, 1), alpha.clamp(0, 1)
        ground = checkerboard(*rgb.shape[-2:], cell=max(4, min(rgb.shape[-2:]) // 12))
        matte = alpha.expand(3, -1, -1, -1) * 2 - 1
        tiles = [
            (plane[:, t], outline, t) for plane in (over(rgb, alpha, ground), matte) for t in times
        ]
        if given:
            rgb, alpha = given[row][0].clamp(-1, 1), given[row][1].clamp(0, 1)
            tiles.insert(len(times), (alpha[:, 0].expand(3, -1, -1) * 2 - 1, None, 0))
            tiles.insert(0, (over(rgb, alpha, ground)[:, 0], None, 0))
        for x, (tile, line_of, t) in zip(places, tiles, strict=True):
            sheet.paste(tile, x, y, height, width, line_of, t)
        for number, text_line in enumerate(lines):
            below = sheet.top + y + height + GAP + (number + 0.5) * line
            sheet.write(2 * GAP, below, text_line, "lm", LABEL_SIZE)
    return sheet.image


class Samples(Callback):
    """Samples `prompts` at every `every_n_validations`-th validation, by the same seeds and guide
    each time.

    prompts None: captions of the first validation clips, which are of different kinds; the data
    module's `captions`. Where the task is given frames, too (image to video), those of these clips
    as they are cached: clips then have the size and guide of theirs, and sheets show the first
    frame as the VAE decodes it.

    Ranks share the prompts; perf/samples_s is the time that it took, writing included.
    Memory: the text encoder is loaded once, before training, on rank 0, and dropped; the VAE waits
    on the CPU, and decodes one clip at a time. Files:
    `<default_root_dir>/samples/step_00001000/<number>.webm` and a contact sheet; wandb gets both,
    TensorBoard the sheet. The task has `transformer`, `mean_shift` and `cache`. Raises ValueError
    for a VAE or a text encoder that the latents were not cached with.
    """

    def __init__(
        self,
        *,
        build_vae: Callable[[], Any],
        build_text: Callable[[], Any],
        prompts: Sequence[str] | None,
        negative_prompt: str,
        seed: int,
        every_n_validations: int,
        frames: int,
        height: int,
        width: int,
        fps: float,
        solver: Solver,
        guide: EllipsePath | None,
    ) -> None:
        if prompts is not None and not prompts:
            raise ValueError(
                "samples.prompts=[]; name at least one, null for captions of validation clips, or "
                "leave the callback out."
            )
        self.build_vae, self.build_text = build_vae, build_text
        self.prompts, self.negative_prompt, self.seed = prompts, negative_prompt, seed
        self.every_n_validations, self.fps = every_n_validations, fps
        self.size = (frames, height, width)
        self.solver, self.guide = solver, guide

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        embedded: Any = self._embed(trainer, pl_module) if trainer.is_global_zero else None
        embedded = trainer.strategy.broadcast(embedded)
        self.shown, self.given, self.context, self.negative, text_sha256 = embedded
        self.vae = self.build_vae()
        if self.given:
            frames, *sides = self.given[0]["condition"].shape[2:]
            height, width = (self.vae.geometry.space_stride * side for side in sides)
            self.size = (1 + (frames - 1) * self.vae.geometry.time_stride, height, width)
        cache: dict[str, Any] = pl_module.cache  # type: ignore[assignment]
        for name, found in (
            ("vae_sha256", self.vae.latents_sha256()),
            ("text_encoder_sha256", text_sha256),
        ):
            if found is not None and cache[name] != found:  # None of files that only decode
                raise ValueError(
                    f"samples: {name} is {found[:12]}, the latents were cached with "
                    f"{cache[name][:12]}. Give the rgba_vae= and wan= that they were cached with, "
                    "or leave callbacks.samples out."
                )

    def _embed(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[list[str], list[dict[str, Tensor]], Tensor, Tensor, str]:
        """Returns the prompts, what is given beside them, their contexts, the context of the
        negative prompt, and the encoder's hash. It runs on one rank alone: UMT5 takes 11 GB, and
        the next model comes after it."""
        datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        field: Any = pl_module.field
        examples = datamodule.examples(CAPTIONS, alike=True) if self.prompts is None else []
        examples = [one for one in examples if field(one).keywords]
        given = [{name: one[name] for name in GIVEN if name in one} for one in examples]
        prompts = [one["prompt"][0] for one in examples] or self.prompts
        prompts = datamodule.captions(CAPTIONS) if prompts is None else list(prompts)
        text = self.build_text()
        negative = text.context([self.negative_prompt])
        return prompts, given, text.context(prompts), negative, text.sha256()

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By the step, not by a count of its own, which a resume would lose
        every = self.every_n_validations * cast(int, trainer.val_check_interval)
        if trainer.sanity_checking or trainer.global_step % every:
            return
        began = perf_counter()
        clips = self._sample(trainer, pl_module)
        if trainer.is_global_zero:
            self._write(trainer, clips)
        log_row(trainer, {"perf/samples_s": perf_counter() - began})

    def _sample(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[tuple[str, Tensor, Tensor]]:
        """Returns prompt, rgb and alpha of every clip, the same on all ranks, of which each has
        made its share. A given picture is a frame before the clip's own."""
        grid, device = self.vae.geometry.latent_shape(*self.size)[1:], pl_module.device
        shift: Any = pl_module.mean_shift
        ellipses = self._ellipses(grid) if shift else [None] * len(self.shown)
        self.outlines = [
            None if each is None else regions.outlines(each[0], *grid[1:], self.size[0])
            for each in ellipses
        ]
        clips: list[tuple[Tensor, Tensor]] = []
        # one at a time on each rank: training holds most of the memory
        place, readers = reader(trainer)
        for first in range(0, len(self.shown), readers):
            # A rank for which none is left makes the last one, too: sharded weights are gathered by
            # all ranks together
            index = min(first + place, len(self.shown) - 1)
            guide = ellipses[index]
            mine = self.given[index] if self.given else {}
            given = {name: value.to(device) for name, value in mine.items()}
            (made,) = sample_clips(
                pl_module.transformer,  # type: ignore[arg-type]
                self.vae,
                self.context[index : index + 1],
                self.negative,
                seeds=[self.seed + index],
                size=self.size,
                guide=None if guide is None else regions.gaussian(guide, *grid[1:]),
                mean_shift=shift,
                solver=self.solver,
                device=device,
                progress=False,
                hold=True,
                **(pl_module.field(given).keywords if given else {}),  # type: ignore[operator]
            )
            if given:
                (picture,) = decode(self.vae, given["condition"][:, :, :1])
                made = (torch.cat([picture[0], made[0]], 1), torch.cat([picture[1], made[1]], 1))
            self.vae.cpu()
            if trainer.world_size > 1:  # ranks that share their clips have made the same one
                clips += of_all_ranks(pl_module, made)[:: trainer.world_size // readers]
            else:
                clips.append(made)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return [(prompt, *clip) for prompt, clip in zip(self.shown, clips, strict=False)]

    def _ellipses(self, grid: Sequence[int]) -> list[Tensor | None]:
        """Returns (1, F, 5) in cells for each clip: of the clip that it is given a frame of, else
        the guide's."""
        if self.given:
            return [one["ellipses"] for one in self.given]
        return [None if self.guide is None else self.guide.ellipses(*grid)] * len(self.shown)

    def _write(self, trainer: Trainer, clips: list[tuple[str, Tensor, Tensor]]) -> None:
        step = trainer.global_step
        folder = Path(trainer.default_root_dir) / "samples" / f"step_{step:08d}"
        given = [(rgb[:, :1], alpha[:, :1]) for _, rgb, alpha in clips if self.given]
        if given:
            clips = [(prompt, rgb[:, 1:], alpha[:, 1:]) for prompt, rgb, alpha in clips]
        sheet = contact_sheet(clips, f"step {step}", self.outlines, given)
        save_picture(sheet, folder / "sheet.png")
        played = [
            (f"{index:02d}", shown(rgba_bytes(rgb, alpha), self.fps, prompt))
            for index, (prompt, rgb, alpha) in enumerate(clips)
        ]
        of_run.keep(Path(trainer.default_root_dir), step, played)
        for index, (prompt, rgb, alpha) in enumerate(clips):
            line = self.outlines[index]
            files = write_clip(
                folder / f"{index:02d}", rgb, alpha, self.fps, ("webm", "preview"), line
            )
            for logger in trainer.loggers:
                _log_video(logger, index, prompt, files[1], step)
        for logger in trainer.loggers:
            _log_sheet(logger, sheet, folder / "sheet.png", step)


def of_all_ranks(
    pl_module: LightningModule, clip: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Returns the clips of all ranks, rank 0's first, as their files hold them: of 8 bits."""
    frames = torch.from_numpy(rgba_bytes(*clip)).to(pl_module.device)
    everyone: Any = pl_module.all_gather(frames)  # (ranks, T, H, W, 4)
    channels = everyone.cpu().permute(0, 4, 1, 2, 3).float() / 255
    return [(each[:3] * 2 - 1, each[3:]) for each in channels]


def rgba_bytes(rgb: Tensor, alpha: Tensor) -> NDArray[np.uint8]:
    """Returns (3, T, H, W) in [-1, 1] and (1, T, H, W) in [0, 1] as uint8 (T, H, W, 4)."""
    return torch.cat([to_bytes(rgb, -1), to_bytes(alpha, 0)]).permute(1, 2, 3, 0).numpy()


def _log_video(logger: Logger, index: int, prompt: str, video: Path, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_video(
            f"samples/{index:02d}", [str(video)], step=step, caption=[prompt], format=["mp4"]
        )


def _log_sheet(logger: Logger, sheet: Image.Image, path: Path, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image("samples/sheet", [str(path)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("samples/sheet", np.asarray(sheet), step, dataformats="HWC")
