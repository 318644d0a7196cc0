from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from acetate.alpha import PALETTE, over
from acetate.callbacks.panels import (
    BACKGROUNDS,
    COLUMNS,
    Clip,
    Frame,
    Panels,
    drawable,
    heat,
    movie,
    quality,
    strip,
    tile_size,
    to_bytes,
    wrapped,
)
from acetate.metrics.rgb import CompositeQuality

KEYS = ["demo/cat", "dog", "fox"]


def clip(key: str, frames: int = 5, size: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(key))
    return {
        "rgb": torch.rand(3, frames, size, size, generator=generator) * 2 - 1,
        "alpha": torch.rand(1, frames, size, size, generator=generator),
        "prompt": "",
        "key": key,
    }


def loader(keys: list[str], frames: int = 5, batch_size: int = 2) -> DataLoader:
    return DataLoader([clip(key, frames) for key in keys], batch_size=batch_size)  # type: ignore[arg-type]


class Task(LightningModule):
    """One 1 x 1 x 1 convolution that reconstructs rgba."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv3d(4, 4, 1)

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        out = self.net(torch.cat([batch["rgb"], batch["alpha"]], 1))
        return out[:, :3], out[:, 3:]

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        rgb_hat, alpha_hat = self(batch)
        return {
            "loss": (rgb_hat - batch["rgb"]).abs().mean()
            + (alpha_hat - batch["alpha"]).abs().mean()
        }

    def validation_step(self, batch: dict, batch_idx: int) -> dict:
        rgb_hat, alpha_hat = self(batch)
        return {"rgb_hat": rgb_hat, "alpha_hat": alpha_hat}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(
    tmp_path: Path,
    panels: Panels,
    logger: Logger | bool = False,
    task: Task | None = None,
    **data: Any,
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_steps=2,
        val_check_interval=2,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[panels],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task or Task(), loader(KEYS, **data), loader(KEYS, **data))


def files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("panels/**/*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def test_files_of_the_first_clips_at_every_validation(tmp_path: Path):
    fit(tmp_path, Panels(clips=2, fps=16))
    names = ["demo_cat.mp4", "demo_cat.png", "dog.mp4", "dog.png"]
    assert files(tmp_path) == [
        f"panels/step_{step:08d}/{name}" for step in (0, 2) for name in names
    ]


def test_clips_count_across_batches_and_repeats(tmp_path: Path):
    keys = ["dog", "dog", "fox", "cat"]
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path / "root", logger=False,
        callbacks=[
        Panels(clips=3, fps=16, directory=str(tmp_path / "here"))
    ], enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.validate(Task(), loader(keys), verbose=False)
    assert files(tmp_path) == [
        f"here/panels/step_00000000/{key}.{kind}"
        for key in ("cat", "dog", "fox")
        for kind in ("mp4", "png")
    ]


def test_a_page_plays_what_each_validation_made(tmp_path: Path):
    fit(tmp_path, Panels(clips=2, fps=16))
    page = (tmp_path / "clips.html").read_text()
    assert page.count('class="card"') == 2 and "demo/cat" in page
    assert 'id="systems">["source", "step 0", "step 2"]' in page


def test_a_still_has_no_video(tmp_path: Path):
    fit(tmp_path, Panels(clips=1, fps=16), frames=1)
    assert files(tmp_path) == [f"panels/step_{step:08d}/demo_cat.png" for step in (0, 2)]


def test_video_lasts_two_seconds_and_is_as_wide_as_its_columns(tmp_path: Path):
    fit(tmp_path, Panels(clips=1, fps=10))
    with av.open(str(tmp_path / "panels/step_00000000/demo_cat.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 20  # 4 times 5 frames
    assert frames[0].shape[1] == 7 * (192 + 4)


def test_wandb_gets_picture_and_video(tmp_path: Path):
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(tmp_path, Panels(clips=1, fps=16), logger)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["panels/demo/cat"]["count"] == 1
    assert summary["panels/demo/cat"]["captions"] == ["demo/cat, step 2"]
    assert summary["panels_video/demo/cat"]["videos"][0]["_type"] == "video-file"


def test_tensorboard_gets_the_picture(tmp_path: Path):
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, Panels(clips=1, fps=16), logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    images = events.Images("panels/demo/cat")
    with Image.open(tmp_path / "panels/step_00000002/demo_cat.png") as sheet:
        assert [(image.step, image.width) for image in images] == [
            (0, sheet.width),
            (2, sheet.width),
        ]


def test_other_loggers_are_left_alone(tmp_path: Path):
    fit(tmp_path, Panels(clips=1, fps=16), CSVLogger(tmp_path))
    assert "panels/step_00000002/demo_cat.png" in files(tmp_path)


def test_a_diverged_task_is_still_drawn(tmp_path: Path):
    task = Task()
    nn.init.constant_(task.net.weight, torch.nan)
    fit(tmp_path, Panels(clips=1, fps=16), task=task)
    assert "panels/step_00000002/demo_cat.png" in files(tmp_path)


def test_a_task_without_reconstruction_is_told(tmp_path: Path):
    class Silent(Task):
        def validation_step(self, batch: dict, batch_idx: int) -> dict:
            return {"rgb_hat": batch["rgb"]}

    with pytest.raises(KeyError, match="no alpha_hat"):
        fit(tmp_path, Panels(clips=1, fps=16), task=Silent())


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="clips=0"):
        Panels(clips=0, fps=16)


def test_to_bytes():
    x = torch.tensor([-3.0, -1, 0, 1, 3, torch.nan])
    assert to_bytes(x, -1).tolist() == [0, 0, 128, 255, 255, 0]
    assert to_bytes(x, 0).tolist() == [0, 0, 0, 255, 255, 0]


def test_heat_runs_black_red_yellow_white_by_the_square_root():
    scale = heat(torch.tensor([0, 1 / 9, 4 / 9, 1]).view(1, 1, 4))[:, 0].T
    assert_close(scale, torch.tensor([[-1.0, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1]]))


@pytest.mark.parametrize(
    ("size", "tile"),
    [((16, 16), (192, 192)), ((64, 64), (256, 256)), ((96, 128), (192, 256)),
     ((128, 128), (256, 256)),
     ((272, 272), (272, 272)), ((480, 832), (240, 416)), ((272, 271), (272, 272))],
)  # fmt: skip
def test_tile_size(size: tuple[int, int], tile: tuple[int, int]):
    assert tile_size(*size) == tile


def as_bytes(item: dict[str, Any], rgb_hat: Tensor, alpha_hat: Tensor) -> Clip:
    return Clip(
        item["key"],
        to_bytes(item["rgb"], -1),
        to_bytes(item["alpha"], 0),
        to_bytes(rgb_hat, -1),
        to_bytes(alpha_hat, 0),
    )


def test_title_has_the_clips_own_figures():
    """The same as the validation's, whose means they are shares of."""
    item = clip("dog")
    # some of it beyond the range
    rgb_hat, alpha_hat = item["rgb"] * 0.9 + 0.3, item["alpha"] * 0.8 - 0.1
    psnr, mae = quality(rgb_hat, alpha_hat, item["rgb"], item["alpha"])
    colors = CompositeQuality(lpips=False)
    colors.update(*(x[None] for x in (rgb_hat, alpha_hat, item["rgb"], item["alpha"])))
    assert psnr == pytest.approx(float(colors.compute()["psnr"]), rel=1e-5)
    assert mae == pytest.approx(float((alpha_hat.clamp(0, 1) - item["alpha"]).abs().mean()))
    shown = replace(as_bytes(item, rgb_hat, alpha_hat), key="k" * 80, psnr=psnr, mae=mae)
    assert (
        shown.title(60)
        == f"{'k' * 39}…, step 60: PSNR over 8 colours {psnr:.2f} dB, alpha MAE {mae:.4f}"
    )


def test_text_of_any_script_is_drawn_on_one_line():
    missing = "\uffff"  # drawn as a box
    assert drawable("a\tb\n c") == "a b c"
    assert drawable("Café 猫 \ud800 😀\ufe0f!\x1b") == f"Cafe {missing} {missing} {missing}!"
    font = ImageFont.load_default(14)
    assert wrapped("", font, 100, 3) == [""]
    lines = wrapped("one two three " * 20, font, 100, 3)
    assert len(lines) == 3 and lines[0].startswith("one two") and lines[2].endswith("…")
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(wrapped("x" * 30, font, 100, 9)) == "x" * 30  # one word without spaces


def test_columns_show_what_they_say():
    item = clip("dog")
    shown = Frame(as_bytes(item, -item["rgb"], 1 - item["alpha"]), 2)
    rgb, alpha = item["rgb"][:, 2], item["alpha"][:, 2]
    red = PALETTE[4].view(3, 1, 1)
    source, reconstruction = shown.composites("red")
    near = {"rtol": 0, "atol": 0.02}  # 8 bits
    assert_close(source, over(rgb, alpha, red), **near)
    assert_close(reconstruction, over(-rgb, 1 - alpha, red), **near)
    _, _, alpha_tile, alpha_hat_tile, error = shown.columns()
    assert_close(alpha_tile, (2 * alpha - 1).expand(3, -1, -1), **near)
    assert_close(alpha_hat_tile, -alpha_tile, **near)
    assert_close(error, heat((shown.alpha_hat - shown.alpha).abs()))


@pytest.mark.parametrize(("frames", "rows", "drawn"), [(1, 3, 1), (2, 3, 2), (5, 3, 3), (5, 1, 1)])
def test_strip_has_a_row_per_time_and_all_columns(frames: int, rows: int, drawn: int):
    item = clip("dog", frames, 64)
    opaque = as_bytes(item, item["rgb"], item["alpha"])
    sheet = strip(opaque, rows, 0)
    assert sheet.height == 4 * 18 + drawn * (256 + 16)
    assert sheet.width > len(COLUMNS) * 256 + len(BACKGROUNDS) * 128


def test_strip_places_reconstruction_above_source():
    empty = torch.zeros(1, 1, 64, 64)
    item = {"key": "dog", "rgb": torch.ones(3, 1, 64, 64), "alpha": empty + 1}
    sheet = np.asarray(strip(as_bytes(item, item["rgb"], empty), 1, 0))
    left, top = 4 * 18 + 5 * 260 + 12, 4 * 18
    red = left + 4 * 132 + 64
    assert sheet[top + 64, red].tolist() == [255, 0, 0]  # nothing reconstructed: the background
    assert sheet[top + 128 + 2 + 64, red].tolist() == [255, 255, 255]
    error = 4 * 18 + 4 * 260 + 128
    assert sheet[top + 128, error].tolist() == [255, 255, 255]  # the hottest


def test_movie_sides_are_even_and_frames_in_order():
    ramp = torch.linspace(0, 1, 4).view(1, 4, 1, 1).expand(1, 4, 17, 23)
    item = {"key": "dog", "rgb": torch.ones(3, 4, 17, 23), "alpha": ramp}
    frames = movie(as_bytes(item, item["rgb"], ramp), 1, 0)
    height, width = tile_size(17, 23)
    assert frames.shape[0] == 4
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    assert frames[:, -height // 2, 2 * (width + 4) + width // 2, 0].tolist() == [0, 85, 170, 255]
