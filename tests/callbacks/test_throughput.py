from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from acetate.callbacks import throughput
from acetate.callbacks.throughput import Throughput
from acetate.steps import StepTrainer

STEP, VALIDATION = 3.0, 100.0  # seconds on the test's clock


class Clock:
    """Moves only where a test says that time passes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Clips(Dataset):
    def __init__(self, clock: Clock, seconds: float, latents: bool = False):
        self.clock, self.seconds, self.latents = clock, seconds, latents

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.clock.now += self.seconds
        if self.latents:
            return {"latents": torch.zeros(16, 2, 2, 2), "key": str(index)}
        return {"rgb": torch.zeros(3, 5, 4, 4), "key": str(index)}


class Task(LightningModule):
    def __init__(self, clock: Clock):
        super().__init__()
        self.weight, self.clock = nn.Parameter(torch.ones(1)), clock

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.clock.now += STEP
        return self.weight.sum()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.clock.now += VALIDATION

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorder(CSVLogger):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})
        super().log_metrics(metrics, step)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "perf_counter", clock)
    return clock


def fit(
    folder: Path, clock: Clock, train: Clips, validate: bool = False, accumulate: int = 1
) -> list[dict[str, Any]]:
    """The rows of 8 steps of 2 clips in windows of 4."""
    logger = Recorder(folder)
    StepTrainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=8,
        accumulate_grad_batches=accumulate,
        val_check_interval=2,
        limit_val_batches=1 if validate else 0,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[Throughput(every_n_steps=4)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Task(clock), DataLoader(train, batch_size=2), DataLoader(Clips(clock, 1.0), batch_size=2))
    return [row for row in logger.rows if "perf/step_s" in row]


def test_rates_of_a_known_step(tmp_path: Path, clock: Clock):
    rows = fit(tmp_path, clock, Clips(clock, seconds=0.0))
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        assert row["perf/step_s"] == STEP
        assert row["perf/clips_per_s"] == 2 / STEP
        assert row["perf/frames_per_s"] == 10 / STEP
        assert row["perf/data_wait_share"] == 0
        assert 0.05 < row["perf/peak_rss_gib"] < 100


def test_a_window_counts_optimizer_steps(tmp_path: Path, clock: Clock):
    rows = fit(tmp_path, clock, Clips(clock, seconds=0.0), accumulate=2)
    assert [row["step"] for row in rows] == [4, 8]
    assert [row["perf/step_s"] for row in rows] == [2 * STEP] * 2
    assert [row["perf/clips_per_s"] for row in rows] == [2 / STEP] * 2


def test_a_slow_loader_shows_as_wait(tmp_path: Path, clock: Clock):
    _, row = fit(tmp_path, clock, Clips(clock, seconds=0.5))  # 1 s between batches
    assert row["perf/step_s"] == STEP
    assert row["perf/data_wait_share"] == 1 / (1 + STEP)
    assert row["perf/clips_per_s"] == 2 / (1 + STEP)


def test_gaps_with_validation_are_left_out(tmp_path: Path, clock: Clock):
    # between batches 2 and 3, 4 and 5, ...
    _, row = fit(tmp_path, clock, Clips(clock, seconds=0.5), validate=True)
    assert row["perf/data_wait_share"] == 2 / (2 + 4 * STEP)
    assert row["perf/clips_per_s"] == 8 / (2 + 4 * STEP)


def test_batches_of_latents_have_no_frame_rate(tmp_path: Path, clock: Clock):
    row = fit(tmp_path, clock, Clips(clock, seconds=0.0, latents=True))[0]
    assert "perf/frames_per_s" not in row
    assert row["perf/clips_per_s"] == 2 / STEP


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Throughput(every_n_steps=0)
