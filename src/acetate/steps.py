"""Training counted in optimizer steps, and in nothing else: when it validates and logs, and what it logs.

What has to be known of Lightning's own loops and logging, which count batches, stands here.
"""

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop, _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector


class StepTrainer(Trainer):
    """Lightning's, with val_check_interval and log_every_n_steps in optimizer steps.

    All that is logged stands at N, the number of finished steps, with `epoch`, the passes over the
    training data, where the data module counts them (`passes`). Several devices or processes use DDP
    unless a strategy is given. find_unused_parameters: DDP's own.
    """

    def __init__(self, *, find_unused_parameters: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        if isinstance(self.strategy, DDPStrategy) and settings.get("strategy", "auto") == "auto":
            self.strategy._ddp_kwargs |= {
                "find_unused_parameters": find_unused_parameters,
                "broadcast_buffers": False,  # they never change
            }
        self.fit_loop.__class__ = _Fit
        self.fit_loop.epoch_loop.__class__ = _Steps
        self._logger_connector.__class__ = _StepLogs

    @property
    def validation_due(self) -> bool:
        """Whether one belongs after the step that was just finished."""
        loop = self.fit_loop.epoch_loop
        if not self.global_step or loop._should_accumulate() or not loop._should_check_val_epoch():
            return False
        return self.global_step % self.val_check_interval == 0

    @property
    def passes(self) -> float:
        """Over the training data, of all ranks together; Lightning's epochs where nothing counts them."""
        return float(getattr(self.datamodule, "passes", self.current_epoch))

    def log_step(self) -> None:
        """Writes what the step that was just finished has logged, unless that is done or not due."""
        self._logger_connector.update_train_step_metrics()


def log_row(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """To all loggers, at the last finished step."""
    trainer._logger_connector.log_metrics(dict(values))


def ends_step(task: LightningModule) -> bool:
    """In training_step: whether the optimizer steps after this batch."""
    return not task.trainer.fit_loop._should_accumulate()


def logs_step(task: LightningModule) -> bool:
    """In training_step: whether loggers write what this step logs; never of a task without a trainer."""
    if task._trainer is None:
        return False
    every = task.trainer.log_every_n_steps
    return every > 0 and (task.trainer.global_step + 1) % every == 0


class _Fit(_FitLoop):
    """Which also starts and ends a training that goes on from its last step."""

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0 if self.restarting else super().skip


class _Steps(_TrainingEpochLoop):
    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return self.trainer.validation_due


class _StepLogs(_LoggerConnector):
    step = 0  # that the present batch belongs to
    written = 0  # the last step whose row is written

    def on_batch_start(self, batch: Any, dataloader_idx: int | None = None) -> None:
        super().on_batch_start(batch, dataloader_idx)
        if self.trainer.training:
            self.step = self.trainer.global_step + 1
            self.rates = {
                f"lr-{type(optimizer).__name__}": optimizer.param_groups[0]["lr"]
                for optimizer in self.trainer.optimizers
            }

    @property
    def should_update_logs(self) -> bool:
        every = self.trainer.log_every_n_steps
        return every > 0 and (self.step % every == 0 or self.trainer.should_stop)

    def update_train_step_metrics(self) -> None:
        """One row a step, at its end; a value that is not logged again is not written again."""
        done = self.trainer.global_step == self.step and not self.trainer.fit_loop._should_accumulate()
        if self.written == self.step or not done:
            return
        self.written = self.step
        if not self.should_update_logs:
            return
        metrics, results = self.metrics, self.trainer._results
        self._progress_bar_metrics.update(metrics["pbar"])
        self._callback_metrics.update(metrics["callback"])
        self.log_metrics({**metrics["log"], **self.rates})
        for name in [name for name, value in results.items() if not value.meta.on_epoch]:
            del results[name]

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if not metrics:
            return
        step = self.trainer.global_step if step is None else step
        super().log_metrics({**metrics, "epoch": self.trainer.passes}, step=step)
