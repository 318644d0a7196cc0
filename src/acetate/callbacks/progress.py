"""Shows how far a run is: a bar on a terminal, now and then a line in a log file."""

import logging
import sys
from time import monotonic
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from tqdm import tqdm

log = logging.getLogger(__name__)

# seconds; the later ones at most one in a tenth of the time so far
FIRST_LINE, LATER_LINES = 10.0, 60.0


class Progress(TQDMProgressBar):
    """Counts the optimizer steps of the whole run, at this process's rate.

    Without a terminal: a line after ten seconds, then one a minute, and fewer the longer it takes.
    """

    BAR_FORMAT = "{desc} {bar:30} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._lines = not sys.stdout.isatty() and self.is_enabled
        if self._lines:
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = self._shown = trainer.global_step
        self._total = trainer.max_steps if trainer.max_steps > 0 else None
        self._started = monotonic()
        self._next = self._started + FIRST_LINE
        self.train_progress_bar = Tqdm(
            desc="training", initial=self._first, total=self._total, disable=self.is_disabled,
            leave=True, dynamic_ncols=True, file=sys.stdout, smoothing=0, unit="step",
            bar_format=self.BAR_FORMAT,
        )  # fmt: skip

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Leaves the bar as it is: it is that of the run, whatever Lightning calls an epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the bar as it is, as `on_train_epoch_start` does."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._shown:  # gradients are being accumulated
            return
        if self._should_update(step, self._total or 0):
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix_str(self._loss(trainer))
        self._shown = step
        now = monotonic()
        if self._lines and now >= self._next and step != self._total:
            self._next = now + max(LATER_LINES, (now - self._started) / 10)
            log.info("%s", self._line(trainer, step, now - self._started))

    def on_train_end(self, *_: Any) -> None:
        self.train_progress_bar.n = self._shown
        self.train_progress_bar.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._train_progress_bar is not None:
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.refresh()

    def on_validation_batch_start(self, trainer: Trainer, *arguments: Any, **more: Any) -> None:
        super().on_validation_batch_start(trainer, *arguments, **more)
        self.val_progress_bar.set_description(self.validation_description, refresh=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    @property
    def validation_description(self) -> str:
        return "validating"

    @staticmethod
    def _loss(trainer: Trainer) -> str:
        loss = trainer.progress_bar_metrics.get("train/loss")
        return "" if loss is None else f"loss {float(loss):.4g}"

    def _line(self, trainer: Trainer, step: int, seconds: float) -> str:
        rate = (step - self._first) / seconds
        parts = [
            f"step {step:,}" + (f" of {self._total:,}" if self._total else ""),
            self._loss(trainer),
        ]
        parts.append(
            f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s a step" if rate else ""
        )
        if self._total and rate:
            parts.append(f"{tqdm.format_interval((self._total - step) / rate)} left")
        return "   ".join(filter(None, parts))
