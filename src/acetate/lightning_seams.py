"""The parts of Lightning that acetate needs and that are not in its public interface, under plain
names.

No other file touches them. pyproject.toml admits the minor version that they are tested with, and
tests/test_lightning_seams.py has a test of each, which names the one that a new version breaks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import _FitLoop, _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from torch.nn.parallel import DistributedDataParallel


def step_is_due(trainer: Trainer) -> bool:
    """Returns whether the batch at hand is the last of its optimizer step; after it, whether that
    step is done."""
    return not trainer.fit_loop._should_accumulate()


def batch_number(trainer: Trainer) -> int:
    """Returns the number of the training batch at hand, from 0, over all epochs and over those that
    a checkpoint had done before."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def batches_done(trainer: Trainer) -> int:
    """Returns the number of training batches of this rank that are finished; one that was
    interrupted is not."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # pyright: ignore


def validates(trainer: Trainer) -> bool:
    """Returns whether there is anything to validate with, in this epoch."""
    return trainer.fit_loop.epoch_loop._should_check_val_epoch()


def validate_now(trainer: Trainer) -> None:
    """Runs a whole validation in the middle of training, as its own loop runs it."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating, loop.restarting = True, False
    loop.run()
    trainer.training = True


def has_trainer(task: LightningModule) -> bool:
    """Returns whether the task has a trainer; `task.trainer` raises where there is none."""
    return task._trainer is not None


def log_row(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Hands the values to all loggers, at the last finished step."""
    trainer._logger_connector.log_metrics(dict(values))


def log_step(trainer: Trainer) -> None:
    """Writes the logged values of the step that was just finished, unless that is done or not
    due."""
    trainer._logger_connector.update_train_step_metrics()


def replaces_samplers(trainer: Trainer) -> bool:
    """Returns whether Lightning puts a sampler of its own in the place of a loader's."""
    return trainer._accelerator_connector.use_distributed_sampler


def leave_signals_alone(trainer: Trainer) -> None:
    """Keeps Lightning's handlers, which save amid a step, from signals; those of now come back when
    training ends."""
    connector = trainer._signal_connector
    connector._original_handlers = connector._get_current_signal_handlers()
    connector.register_signal_handlers = lambda: None


def guard_resume(
    trainer: Trainer,
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
    check_optimizers: Callable[[Mapping[str, Any], Sequence[Any], Sequence[Any]], None],
) -> None:
    """Turns whatever restoring a checkpoint raises into a ValueError that names its file.

    check: of the whole and the form of the fit loop's state, before anything is restored;
    check_optimizers: of the whole, the optimizers and the schedulers, before theirs is.
    """
    connector = trainer._checkpoint_connector

    def loaded(*args: Any, **settings: Any) -> None:
        resume_start(*args, **settings)
        if connector._loaded_checkpoint:
            check(connector._loaded_checkpoint, trainer.fit_loop.state_dict())

    def restored() -> None:
        if connector._loaded_checkpoint and trainer.optimizers:  # it trains
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            check_optimizers(connector._loaded_checkpoint, trainer.optimizers, schedulers)
        restore()

    resume_start, restore = connector.resume_start, connector.restore_training_state
    connector.resume_start = _named(trainer, loaded)
    connector.restore_training_state = _named(trainer, restored)
    for name in ("restore_datamodule", "restore_model", "restore_callbacks"):
        setattr(connector, name, _named(trainer, getattr(connector, name)))


def _named(trainer: Trainer, restore: Callable[..., None]) -> Callable[..., None]:
    """Returns `restore` with errors that name the checkpoint."""

    def named(*args: Any, **settings: Any) -> None:
        try:
            restore(*args, **settings)
        except (OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            path, said = str(trainer.ckpt_path), f"{error}"
            if isinstance(error, ValueError) and path in said:
                raise
            if not isinstance(error, ValueError):
                said = f"it cannot be restored ({type(error).__name__}: {error})"
            raise ValueError(
                f"{path}: {said.rstrip('.')}. Give another checkpoint of its run, or start anew "
                "without resume."
            ) from error

    return named


def set_ddp(strategy: DDPStrategy, **settings: Any) -> None:
    """Sets arguments of DistributedDataParallel for a strategy that Lightning chose itself."""
    strategy._ddp_kwargs |= settings


def leave_out_of_ddp(task: LightningModule, names: Sequence[str]) -> None:
    """Keeps DistributedDataParallel from parameters of a task, which it would send from rank 0 and
    ask for one device: those that every rank has read by itself and holds where it likes."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, names)  # pyright: ignore


def clip_fused(optimizer: torch.optim.Optimizer) -> None:
    """Lets gradients be clipped before a fused optimizer steps. Lightning refuses it also without a
    loss scaler, whose work such an optimizer could do; a scaler then does it itself."""
    optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]


def share_data_among_all(strategy: ModelParallelStrategy) -> None:
    """Lets every rank read clips of its own: data-parallel over all of them, tensor-parallel over
    none."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1


def count_in_steps(trainer: Trainer) -> None:
    """Puts validations and logs of an `acetate.steps.StepTrainer` on optimizer steps rather than on
    batches."""
    trainer.fit_loop.__class__ = _Fit
    trainer.fit_loop.epoch_loop.__class__ = _Steps
    trainer._logger_connector.__class__ = _StepLogs


class _Fit(_FitLoop):
    """Starts and ends also a training that goes on from its last step."""

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
        """Writes one row a step, at its end; a value that is not logged again is not written
        again."""
        done = self.trainer.global_step == self.step and step_is_due(self.trainer)
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


class SteeredCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose subclass says when it saves, and how one is written and deleted."""

    @property
    def every_n_steps(self) -> int:
        return self._every_n_train_steps

    @property
    def saved_step(self) -> int:
        """Step of the last checkpoint."""
        return self._last_global_step_saved

    @property
    def saved_path(self) -> str:
        """Path of the last checkpoint."""
        return self._last_checkpoint_saved

    def take_as_saved(self, step: int, path: str) -> None:
        """Takes a checkpoint as if it had been written here."""
        self._last_global_step_saved, self._last_checkpoint_saved = step, path

    def save_top_k_of(self, trainer: Trainer) -> None:
        """Saves a checkpoint named by its step, where it belongs to the `save_top_k` that are
        kept."""
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def save_as_last(self, trainer: Trainer) -> None:
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def may_save(self, trainer: Trainer) -> bool:
        """Returns whether there is anything new to save, in training."""
        return not super()._should_skip_saving_checkpoint(trainer)

    def write(self, trainer: Trainer, path: str) -> None:
        super()._save_checkpoint(trainer, path)

    def delete(self, trainer: Trainer, path: str) -> None:
        super()._remove_checkpoint(trainer, path)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return not self.may_save(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.write(trainer, filepath)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.delete(trainer, filepath)
