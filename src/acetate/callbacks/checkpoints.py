"""Checkpoints that are whole or not there, and the adapter file beside each."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from acetate.callbacks.ema import EMA


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary sibling, syncs, then renames: a full disk leaves the previous checkpoint as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises OSError that says how much room there is."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            free = shutil.disk_usage(path.parent).free / 2**20
            raise OSError(
                f"{path} could not be written ({error}); {free:.0f} MiB are free there. Earlier checkpoints are "
                "whole: make room and go on with resume=last."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


class AdapterCheckpoint(ModelCheckpoint):
    """Beside every checkpoint NAME.ckpt a NAME.safetensors with what trains (its average where EMA runs).

    Its metadata is the module's `adapter_metadata()`, str -> str: enough to build the model again, and step and
    whether it is the average. The file's tensors are named as in the module.
    """

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        averaged, state = _adapters(trainer, trainer.lightning_module)  # all ranks: they gather shards
        if trainer.is_global_zero:
            self._save_adapters(trainer, Path(filepath).with_suffix(".safetensors"), averaged, state)

    def _save_adapters(self, trainer: Trainer, path: Path, averaged: bool, state: dict[str, Tensor]) -> None:
        module = trainer.lightning_module
        metadata = {**_metadata(module), "step": str(trainer.global_step), "averaged": json.dumps(averaged)}
        temporary = path.with_suffix(".tmp")
        save_file(state, temporary, metadata)
        temporary.replace(path)

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
