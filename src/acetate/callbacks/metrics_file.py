"""Writes metrics.csv, which a resumed run goes on with, and config.yaml beside it."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

HIGHER_IS_BETTER = ("psnr", "ssim")


class Best(NamedTuple):
    """Holds the best of a metric's values, the step that it was measured at, and the last value."""

    value: float
    step: int
    last: float


def direction(name: str) -> str:
    """Returns `max` for metrics of likeness and `min` for errors and losses."""
    return "max" if name.rsplit("/")[-1].startswith(HIGHER_IS_BETTER) else "min"


def measured(name: str) -> bool:
    """Returns whether a validation measures this metric, so that its best value says something."""
    return name.startswith(("val/", "val_"))


def better(name: str, one: float, other: float) -> bool:
    return one > other if direction(name) == "max" else one < other


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads a metrics file into column -> (step, value) pairs in the order of the file; leaves out
    values that are not finite."""
    found: dict[str, list[tuple[int, float]]] = {}
    if not path.exists():
        return found
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = row.pop("step", "")
            for name, value in row.items():
                if value and step and math.isfinite(number := float(value)):
                    found.setdefault(name, []).append((int(float(step)), number))
    return found


def best_of(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Best]:
    """Returns the best of each metric in the result of `read_metrics` that validations measure."""
    found = {}
    for name, points in metrics.items():
        if measured(name):
            sign = -1 if direction(name) == "max" else 1
            step, value = min(points, key=lambda point: sign * point[1])
            found[name] = Best(value, step, points[-1][1])
    return found


class MetricsWriter(ExperimentWriter):
    """Writes rows of logged values, a column for each name; the file is whole at any moment but for
    its last row."""

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Writes the settings at once; Lightning would wait until rows are saved."""
        path = Path(self.log_dir) / "config.yaml"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(yaml.safe_dump(params, sort_keys=False, allow_unicode=True))
        temporary.replace(path)

    def _check_log_dir_exists(self) -> None:
        """Takes up the file that is there, where Lightning would delete it."""
        header, rows = self._read()
        self.metrics_keys, self.rows = list(header), len(rows)

    def save(self) -> None:
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        if self._record_new_keys([*rows]):
            self._replace([*self._read()[1], *rows])
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(rows)
        self.rows += len(rows)

    def keep(self, count: int) -> None:
        """Keeps the first `count` rows and drops those that were logged later."""
        rows = self._read()[1][:count]
        self._replace(rows)
        self.metrics, self.rows = [], len(rows)

    @property
    def path(self) -> Path:
        return Path(self.log_dir) / self.NAME_METRICS_FILE

    def _record_new_keys(self, rows: Sequence[dict[str, Any]]) -> bool:
        known = len(self.metrics_keys)
        self.metrics_keys = sorted({*self.metrics_keys, *(name for row in rows for name in row)})
        return len(self.metrics_keys) > known

    def _read(self) -> tuple[Sequence[str], list[dict[str, Any]]]:
        if not self.path.exists():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            return reader.fieldnames or [], list(reader)

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


class MetricsFile(CSVLogger):
    """Logs to `save_dir`/metrics.csv, on rank 0.

    A checkpoint notes how many rows there are (callbacks.checkpoints); the rows that a killed run
    has written since are dropped when it goes on, because it writes them again.
    """

    def __init__(self, save_dir: str):
        super().__init__(save_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsWriter:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment  # pyright: ignore[reportReturnType]  typed by its base class

    def rows(self) -> int:
        """Writes all that was logged to the disk and returns the number of rows there."""
        self.experiment.save()
        return self.experiment.rows

    def keep(self, count: int) -> None:
        self.experiment.keep(count)
