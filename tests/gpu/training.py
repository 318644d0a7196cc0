"""Trainings of the tiny stages by the command itself, in this process."""

from collections.abc import Callable
from pathlib import Path

from tests.compose import called
from tests.test_resume import logged, run_of, small

STAGES = ("vae_rgba", "dit_dora")
EXACT = "trainer.deterministic=true"
Train = Callable[..., Path]


def trainer_of(experiment: str, shards: Path, cached: tuple[Path, Path], accelerator: str) -> Train:
    """train(outputs, setting, ...) trains the stage for six steps on a device unless told
    otherwise, and returns the run's folder."""

    def train(outputs: Path, *settings: str) -> Path:
        called(
            "train", *small(experiment, outputs, shards, cached), "data.num_workers=0",
            "callbacks.curves=null", f"trainer.accelerator={accelerator}", "trainer.max_steps=6",
            "trainer.val_check_interval=3", "task.decay_steps=6", *settings,
        )  # fmt: skip
        return run_of(outputs)

    return train


def losses(run: Path) -> list[float]:
    """Of every step that the run's table has."""
    return [float(row["train/loss"]) for row in logged(run) if "train/loss" in row]
