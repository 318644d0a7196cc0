"""Writes checkpoints, and the adapter file beside each."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from acetate.callbacks.ema import EMA
from acetate.callbacks.metrics_file import MetricsFile, direction
from acetate.lightning_seams import SteeredCheckpoint, log_step, step_is_due, validate_now
from acetate.replacing import remove, rename_over, unwritten, write_tensors
from acetate.steps import StepTrainer


class StepCheckpoint(SteeredCheckpoint):
    """Saves checkpoints that a run goes on from exactly: every `every_n_train_steps` optimizer
    steps, before every validation, and at the end.

    A run that goes on from one begins with the validation that was due there, also when there is no
    step left. What was logged is noted, so that metrics.csv has every row once. With `monitor`, the
    `save_top_k` best are chosen after the validation that measured them.

    best: a validation's metric; best.ckpt is the checkpoint of the step at which it was best so
    far, and best.json its name, value and step. best_mode: min or max; None: max of PSNR and SSIM,
    else min.
    """

    def __init__(
        self, *, best: str | None = None, best_mode: str | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if best_mode not in (None, "min", "max"):
            raise ValueError(
                f"callbacks.checkpoint.best_mode={best_mode}; known: min, max, or null to go by "
                "the metric."
            )
        self.best, self.best_mode = best, best_mode or direction(best or "")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # before they load it, for which ranks of a sharded model wait for each other
        if stage == "fit":
            _check_same(trainer, f"checkpoint {trainer.ckpt_path}")
        super().setup(trainer, pl_module, stage)
        self._rows: list[int] = []
        if trainer.is_global_zero and stage == "fit":
            # by a process that was killed while it wrote
            for left in Path(str(self.dirpath)).glob(".*.tmp"):
                left.unlink() if left.is_file() else shutil.rmtree(left)

    def save(self, trainer: Trainer) -> None:
        """Saves a checkpoint now, unless this step is saved. Raises what the data module does where
        the run has read no clip."""
        check = getattr(trainer.datamodule, "check_read", None)  # pyright: ignore
        if check is not None:
            check("train")
        log_step(trainer)  # a checkpoint knows the rows of all steps that it has seen
        if not self.may_save(trainer):
            return
        if not self._measured_later:
            self.save_top_k_of(trainer)
        self.save_as_last(trainer)

    @property
    def _measured_later(self) -> bool:
        """True where a validation decides what is kept."""
        return self.monitor is not None and not self.monitor.startswith("train")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        _check_same(trainer, f"step {trainer.global_step}")
        loggers = _metrics_files(trainer)
        if trainer.ckpt_path is None:
            for logger in loggers:
                logger.keep(0)
            return
        self.take_as_saved(trainer.global_step, str(trainer.ckpt_path))
        for logger, rows in zip(loggers, self._rows, strict=False):
            logger.keep(rows)
        if _steps(trainer).validation_due:
            validate_now(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        every = self.every_n_steps
        if _steps(trainer).validation_due or (every and trainer.global_step % every == 0):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.best is not None:
            self._keep_best(trainer, self.best)
        if self._measured_later:
            self.save_top_k_of(trainer)

    def _keep_best(self, trainer: Trainer, metric: str) -> None:
        measured = trainer.callback_metrics
        if metric not in measured:
            known = ", ".join(sorted(name for name in measured if name.startswith("val")))
            raise ValueError(
                f"objective={metric} is not what a validation measures: {known}. Name one, or null."
            )
        value, folder = float(measured[metric]), Path(str(self.dirpath))
        if not trainer.is_global_zero or value != value or self.saved_step != trainer.global_step:
            return
        record = folder / "best.json"
        before = json.loads(record.read_text()) if record.exists() else {}
        if before.get("metric") == metric:
            old = before["value"]
            if value >= old if self.best_mode == "min" else value <= old:
                return
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "metric": metric,
            "mode": self.best_mode,
            "value": value,
            "step": trainer.global_step,
        }
        self._copy(Path(self.saved_path), folder / "best.ckpt", facts)
        temporary = folder / ".best.json.tmp"
        temporary.write_text(json.dumps(facts))
        temporary.replace(record)

    def _copy(self, saved: Path, best: Path, facts: dict[str, Any]) -> None:
        """Makes hard links where the disk has them: checkpoints are replaced, never changed."""
        temporary = best.with_name(f".{best.name}.tmp")
        remove(temporary)
        if saved.is_dir():
            shutil.copytree(saved, temporary, copy_function=_link)
        else:
            _link(saved, temporary)
        rename_over(temporary, best)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["metrics"] = {"rows": [logger.rows() for logger in _metrics_files(trainer)]}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # older ones know nothing of it
        self._rows = checkpoint.get("metrics", {"rows": []})["rows"]

    def may_save(self, trainer: Trainer) -> bool:
        return super().may_save(trainer) and step_is_due(trainer)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _steps(trainer: Trainer) -> StepTrainer:
    assert isinstance(trainer, StepTrainer), "conf/trainer builds acetate.steps.StepTrainer"
    return trainer


def _check_same(trainer: Trainer, own: str) -> None:
    """Raises ValueError on all ranks where one goes on from something else."""
    if trainer.world_size == 1:
        return
    found = [""] * trainer.world_size
    dist.all_gather_object(found, own)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"rank 0 goes on from {found[0]}, rank {rank} from {other}. All machines must see "
                "the same files in a run's folder: let paths.outputs, or resume, lie on a file "
                "system that they share."
            )


def _metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """Returns the metrics files of the run on rank 0, which writes them; none on other ranks."""
    return [
        logger
        for logger in trainer.loggers
        if isinstance(logger, MetricsFile) and trainer.is_global_zero
    ]


class AdapterCheckpoint(StepCheckpoint):
    """Writes NAME.safetensors beside every checkpoint NAME.ckpt: what trains, or its average where
    EMA runs.

    Its metadata is the module's `adapter_metadata()`, str -> str: enough to build the model again,
    and step and whether it is the average. The file's tensors are named as in the module. It comes
    first: a run that is killed between the two goes on from the checkpoint before, and writes both
    again.
    """

    def write(self, trainer: Trainer, path: str) -> None:
        # all ranks: they gather shards
        averaged, state = _adapters(trainer, trainer.lightning_module)
        if trainer.is_global_zero:
            self._save_adapters(trainer, Path(path).with_suffix(".safetensors"), averaged, state)
        super().write(trainer, path)

    def _save_adapters(
        self, trainer: Trainer, path: Path, averaged: bool, state: dict[str, Tensor]
    ) -> None:
        module = trainer.lightning_module
        metadata = {
            **module.adapter_metadata(),  # pyright: ignore[reportCallIssue]
            "step": str(trainer.global_step),
            "averaged": json.dumps(averaged),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            write_tensors(state, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise unwritten(path, error) from error

    def _copy(self, saved: Path, best: Path, facts: dict[str, Any]) -> None:
        adapters = saved.with_suffix(".safetensors")
        if adapters.exists():  # not beside a checkpoint that was brought from elsewhere alone
            target = best.with_suffix(".safetensors")
            temporary = target.with_name(f".{target.name}.tmp")
            with safe_open(adapters, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = {**file.metadata(), "best": json.dumps(facts)}
            write_tensors(state, temporary, metadata)
            temporary.replace(target)
        super()._copy(saved, best, facts)

    def delete(self, trainer: Trainer, path: str) -> None:
        super().delete(trainer, path)
        if trainer.is_global_zero:
            Path(path).with_suffix(".safetensors").unlink(missing_ok=True)


def _adapters(trainer: Trainer, module: LightningModule) -> tuple[bool, dict[str, Tensor]]:
    """Returns whether the tensors are averages, and what trains, whole; only the first rank has
    tensors."""
    averages = [callback.average for callback in trainer.callbacks if isinstance(callback, EMA)]  # pyright: ignore
    averaged = bool(averages and averages[0])
    trained = (
        averages[0]
        if averaged
        else {name: p for name, p in module.named_parameters() if p.requires_grad}
    )
    state: dict[str, Tensor] = {}
    for name, value in trained.items():
        whole = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
        if trainer.is_global_zero:
            state[name] = whole.cpu().contiguous()
    return averaged, state
