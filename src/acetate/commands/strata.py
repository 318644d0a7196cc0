"""Figures of each stratum of a test set, with intervals, beside those of all its clips."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from acetate.data.splits import kind_of
from acetate.metrics.intervals import mean_interval
from acetate.replacing import write_json

ALL = "all"  # the stratum of all clips
SHOWN = {
    "rgb/psnr": "PSNR over 8 colours, dB",
    "alpha/psnr": "alpha PSNR, dB",
    "alpha/mae": "alpha MAE",
    "alpha/mae_mixed": "mixed",
}
Figures = dict[str, float]  # of a clip, by name
Intervals = dict[str, dict[str, tuple[float, float, float]]]  # by stratum and name


class ClipFigures(Callback):
    """Takes the figures of single clips out of a validation of one clip a batch.

    The metrics of a task keep sums alone: a clip's are what its batch adds to them.
    """

    def __init__(self) -> None:
        self.clips: dict[str, Figures] = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *rest: Any
    ) -> None:
        self._before = {name: _state(metric) for name, metric in _metrics(pl_module).items()}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        if batch["key"] == [""]:  # in the place of a bad clip
            return
        (key,) = batch["key"]
        figures = self.clips.setdefault(key, {})
        for name, metric in _metrics(pl_module).items():
            added = deepcopy(metric)
            for state, value in _state(metric).items():
                setattr(added, state, value - self._before[name][state])
            figures |= {f"{name}/{figure}": float(x) for figure, x in added.compute().items()}

    def of_all_ranks(self) -> dict[str, Figures]:
        """Returns the figures of every clip, by its key."""
        if not dist.is_initialized():
            return self.clips
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.clips)
        return {key: figures for part in parts for key, figures in part.items()}


def _metrics(task: LightningModule) -> dict[str, Metric]:
    """Returns a task's metrics of colour and alpha by what their figures begin with."""
    held = {name: part for name, part in task.named_children() if isinstance(part, Metric)}
    return {
        "rgb" if name != "alpha_quality" else "alpha": metric
        for name, metric in held.items()
        if name.endswith("_quality")
    }


def _state(metric: Metric) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in metric.metric_state.items()}


def by_stratum(clips: Mapping[str, Figures]) -> Intervals:
    """Returns mean, low and high of the 95 % interval of each figure over the clips of each
    stratum, and over all of them."""
    strata = {ALL: list(clips)}
    for key in sorted(clips):
        strata.setdefault(kind_of(key), []).append(key)
    found: Intervals = {}
    for stratum, keys in strata.items():
        names = dict.fromkeys(name for key in keys for name in clips[key])
        found[stratum] = {
            name: mean_interval(np.array([clips[key][name] for key in keys if name in clips[key]]))
            for name in names
        }
    return found


def table(rows: Mapping[str, Intervals], clips: Collection[str]) -> Table:
    """Returns, for each stratum and each row, the figures with half of their interval. clips: the
    keys that were measured."""
    counts = Counter(map(kind_of, clips)) | Counter({ALL: len(clips)})
    view = Table("stratum", "clips", "", *SHOWN.values())
    for stratum in next(iter(rows.values())):
        for place, (row, found) in enumerate(rows.items()):
            figures = [_cell(found[stratum].get(name), name) for name in SHOWN]
            first = ("", "") if place else (stratum, str(counts[stratum]))
            view.add_row(*first, row, *figures, end_section=place == len(rows) - 1)
    return view


def _cell(figure: tuple[float, float, float] | None, name: str) -> str:
    if figure is None:
        return ""
    digits = 2 if name.endswith("psnr") else 4
    mean, low, high = figure
    half = f" ± {(high - low) / 2:.{digits}f}" if math.isfinite(low) else ""
    return f"{mean:.{digits}f}{half}"


def write(path: Path, rows: Mapping[str, Intervals]) -> None:
    """Writes mean, low and high of every figure, by row and stratum; null where one clip has no
    interval."""
    write_json(path, {
        row: {
            stratum: {name: [x if math.isfinite(x) else None for x in figure]
                      for name, figure in figures.items()}
            for stratum, figures in found.items()
        }
        for row, found in rows.items()
    })  # fmt: skip
