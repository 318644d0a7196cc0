"""When checkpoints are written, and the adapter file beside each."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import _FitLoop
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from acetate.callbacks.ema import EMA
from acetate.callbacks.metrics_file import MetricsFile
from acetate.replacing import unwritten


class Resumed(_FitLoop):
    """Lightning's, which also starts and ends a training that goes on from its last step."""

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0 if self.restarting else super().skip


class StepCheckpoint(ModelCheckpoint):
    """Checkpoints that a run goes on from exactly, at the end of an optimizer step, the last one included.

    They are written before a validation that is due after the same step: a run that goes on from there begins with
    that validation, also when there is no step left. What was logged is noted, so that metrics.csv has every row once.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before they load it, for which ranks of a sharded model wait for each other
            _check_same(trainer, f"checkpoint {trainer.ckpt_path}")
        super().setup(trainer, pl_module, stage)
        self._logged: dict[str, Any] = {}
        if stage == "fit":
            trainer.fit_loop.__class__ = Resumed
        if trainer.is_global_zero and stage == "fit":
            for left in Path(str(self.dirpath)).glob(".*.tmp"):  # by a process that was killed while it wrote
                left.unlink() if left.is_file() else shutil.rmtree(left)

    def save(self, trainer: Trainer) -> None:
        """Now, unless this step is saved."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        _check_same(trainer, f"step {trainer.global_step}")
        loggers, loop = _metrics_files(trainer), trainer.fit_loop.epoch_loop
        if trainer.ckpt_path is None:
            for logger in loggers:
                logger.keep(0)
            return
        self._last_global_step_saved = trainer.global_step
        for logger, rows in zip(loggers, self._logged["rows"], strict=False):
            logger.keep(rows)
        if self._logged["late"]:
            for logger in trainer.loggers:
                logger.log_metrics(self._logged["late"], step=loop._batches_that_stepped)
        if loop._should_check_val_epoch() and (loop.total_batch_idx + 1) % _every(trainer) == 0:
            trainer.validating, loop.val_loop.restarting = True, False
            loop.val_loop.run()
            trainer.training = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        connector = trainer._logger_connector
        late = {}
        if connector._first_loop_iter is not None and connector.should_update_logs:
            # Of this step, which Lightning logs only after its callbacks
            late = {name: float(value) for name, value in connector.metrics["log"].items()}
            late["epoch"] = trainer.current_epoch
        checkpoint["metrics"] = {"rows": [logger.rows() for logger in _metrics_files(trainer)], "late": late}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._logged = checkpoint.get("metrics", {"rows": [], "late": {}})  # older ones know nothing of it

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or trainer.fit_loop._should_accumulate()


def _check_same(trainer: Trainer, own: str) -> None:
    """ValueError on all ranks where one goes on from something else."""
    if trainer.world_size == 1:
        return
    found = [""] * trainer.world_size
    dist.all_gather_object(found, own)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"rank 0 goes on from {found[0]}, rank {rank} from {other}. All machines must see the same files in a "
                "run's folder: let paths.outputs, or resume, lie on a file system that they share."
            )


def _metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """On rank 0, which writes them."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile) and trainer.is_global_zero]


def _every(trainer: Trainer) -> float:
    """Batches between validations."""
    return trainer.val_check_batch or float("inf")


class AdapterCheckpoint(StepCheckpoint):
    """Beside every checkpoint NAME.ckpt a NAME.safetensors with what trains (its average where EMA runs).

    Its metadata is the module's `adapter_metadata()`, str -> str: enough to build the model again, and step and
    whether it is the average. The file's tensors are named as in the module. It comes first: a run that is killed
    between the two goes on from the checkpoint before, and writes both again.
    """

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        averaged, state = _adapters(trainer, trainer.lightning_module)  # all ranks: they gather shards
        if trainer.is_global_zero:
            self._save_adapters(trainer, Path(filepath).with_suffix(".safetensors"), averaged, state)
        super()._save_checkpoint(trainer, filepath)

    def _save_adapters(self, trainer: Trainer, path: Path, averaged: bool, state: dict[str, Tensor]) -> None:
        module = trainer.lightning_module
        metadata = {**_metadata(module), "step": str(trainer.global_step), "averaged": json.dumps(averaged)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(state, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise unwritten(path, error) from error

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            Path(filepath).with_suffix(".safetensors").unlink(missing_ok=True)


def _adapters(trainer: Trainer, module: LightningModule) -> tuple[bool, dict[str, Tensor]]:
    """Whether they are averages, and what trains, whole; on other ranks than the first without tensors."""
    averages = [callback.average for callback in trainer.callbacks if isinstance(callback, EMA)]  # pyright: ignore
    averaged = bool(averages and averages[0])
    trained = averages[0] if averaged else {name: p for name, p in module.named_parameters() if p.requires_grad}
    state: dict[str, Tensor] = {}
    for name, value in trained.items():
        whole = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
        if trainer.is_global_zero:
            state[name] = whole.cpu().contiguous()
    return averaged, state


def _metadata(module: LightningModule) -> dict[str, str]:
    return module.adapter_metadata()  # pyright: ignore[reportCallIssue]
