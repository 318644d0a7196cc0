"""Tells on the console and in train.log where a run is, how it goes and what comes next."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from acetate.callbacks.metrics_file import Best, MetricsFile, best_of, direction, read_metrics
from acetate.pages.of_run import PAGE
from acetate.steps import reader

log = logging.getLogger(__name__)
# train.log alone: tracebacks, of which the console has the message
to_file = logging.getLogger("acetate.file")

FIGURES = (
    "val/loss", "val/rgb/psnr", "val/rgb/ssim", "val/alpha/mae", "val/alpha/psnr", "val/psnr",
    "val/ssim",
)  # fmt: skip


class Story(Callback):
    """Tells a run's story on rank 0. name, folder, data and device are texts for a reader.

    settings: what loggers are told, to which it adds the numbers of parameters. commands: what can
    be done next, {what: command line}; `go on` of a finished run gets a number of steps. objective:
    the metric whose best value is told at the end.
    """

    def __init__(
        self,
        *,
        name: str,
        folder: str,
        data: str,
        device: str,
        objective: str | None = None,
        settings: Mapping[str, Any] | None = None,
        commands: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.folder, self.data, self.device = name, folder, data, device
        self.objective = objective
        self.settings, self.commands = dict(settings or {}), dict(commands or {})
        self._started = monotonic()
        self._showwarning = warnings.showwarning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            warnings.showwarning = _to_log

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = list(pl_module.parameters())
        counts = {
            "total": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        }
        if not trainer.is_global_zero:
            return
        self._counts = counts
        about = {**self.settings, "parameters": counts}
        for logger in trainer.loggers:
            logger.log_hyperparams(about)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = monotonic()
        if not trainer.is_global_zero:
            return
        self._told = _lines_of(Path(trainer.default_root_dir) / "train.log")
        rows = {
            "run": self.folder,
            "trains on": self._trains_on(trainer),
            "parameters": self._parameters(),
        }
        rows["steps"] = self._steps(trainer)
        rows["device"] = self.device + (
            f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
        )
        shared = trainer.world_size // reader(trainer)[1]
        rows["device"] += f", {shared} to a clip" if shared > 1 else ""
        rows["device"] += f", {trainer.precision}"
        rows |= self._places(trainer)
        _say(self.name, rows)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = [name for name in (*FIGURES, self.objective) if name in found]
        figures = "   ".join(
            f"{name.removeprefix('val/')} {_digits(name, found[name])}"
            for name in dict.fromkeys(shown)
        )
        line = f"step {trainer.global_step:,}   validation   {figures}"
        if line not in self._told:  # a run that goes on begins with the validation that was due
            log.info("%s", line)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            done = trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
            self._end(trainer, "finished" if done else "ended")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not trainer.is_global_zero:
            return
        told = ": ".join(filter(None, (type(exception).__name__, str(exception))))
        if isinstance(exception, SystemExit | KeyboardInterrupt):
            self._end(trainer, "stopped")
        else:
            to_file.error("failed at step %d: %s", trainer.global_step, told, exc_info=exception)
            # of a run that did not get to a step nothing is kept
            look = {"look at": f"{self.folder}/train.log"} if trainer.global_step else {}
            _say(f"{self.name} failed at step {trainer.global_step:,}", look)
        warnings.showwarning = self._showwarning

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        warnings.showwarning = self._showwarning

    def _end(self, trainer: Trainer, how: str) -> None:
        metrics = {}
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.save()
                metrics = best_of(read_metrics(Path(logger.log_dir) / "metrics.csv"))
        took = tqdm.format_interval(monotonic() - self._started)
        rows = {"run": self.folder}
        if best := metrics.get(self.objective or ""):
            rows["best"] = _best(str(self.objective), best)
        rows |= self._places(trainer)
        rows |= self.commands
        if "go on" in rows and 0 < trainer.max_steps <= trainer.global_step:
            rows["go on"] += f" trainer.max_steps={2 * trainer.max_steps}"
        _say(f"{self.name} {how} at step {trainer.global_step:,} after {took}", rows)

    def _places(self, trainer: Trainer) -> dict[str, str]:
        """Returns the files and pages that there are to look at."""
        root = Path(trainer.default_root_dir)
        names = ["curves.png", PAGE, "metrics.csv", "panels", "samples", "checkpoints", "train.log"]
        callbacks = {type(callback).__name__.lower() for callback in trainer.callbacks}  # pyright: ignore
        due = {name for name in ("panels", "samples") if name in callbacks} | {"checkpoints"}
        due |= {"curves.png"} if "curves" in callbacks else set()
        due |= {PAGE} if due & {"panels", "samples"} else set()
        there = [name for name in names if name in due or (root / name).exists()]
        rows = {"look at": "  ".join(f"{name}/" if "." not in name else name for name in there)}
        for logger in trainer.loggers:
            where = getattr(logger, "where", None)
            if where:
                rows[type(logger).__name__.removesuffix("Run").lower()] = where
        return rows

    def _trains_on(self, trainer: Trainer) -> str:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for kind in ("refs", "windows"):
            if train := getattr(data, f"train_{kind}", None):
                unit = "clips" if kind == "refs" else "windows of clips"
                val = len(getattr(data, f"val_{kind}"))
                return f"{self.data}: {len(train):,} {unit}, {val:,} to validate on"
        return self.data

    def _parameters(self) -> str:
        total, trainable = self._counts["total"], self._counts["trainable"]
        return f"{_count(total)}, " + (
            "all of them train" if total == trainable else f"{_count(trainable)} train"
        )

    def _steps(self, trainer: Trainer) -> str:
        first, last = trainer.global_step, trainer.max_steps
        batch = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        text = f"{first:,} to {last:,}" if last > 0 else f"from {first:,} on"
        if batch:
            clips = batch * reader(trainer)[1] * trainer.accumulate_grad_batches
            text += f", {clips} clip{'s' * (clips > 1)} each"
        every = trainer.val_check_interval
        return text + (f", validation every {every:,}" if isinstance(every, int) else "")


def _say(title: str, rows: Mapping[str, str]) -> None:
    """Prints a title and aligned lines below it."""
    width = max(map(len, rows), default=0)
    log.info(
        "%s", "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows.items())])
    )


def _to_log(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    log.warning("%s", message)


def _lines_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _best(name: str, best: Best) -> str:
    which = "highest" if direction(name) == "max" else "lowest"
    value, last = _digits(name, best.value), _digits(name, best.last)
    return f"{name} {value} at step {best.step:,}, the {which}; last {last}"


def _digits(name: str, value: float) -> str:
    if name.endswith("psnr"):
        return f"{value:.2f}"
    return f"{value:.4f}" if 0.01 <= abs(value) < 1e4 else f"{value:.3g}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
