"""Writes a run's own checkpoints, as one file or sharded: whole or not there, and read by either
kind of run."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from acetate.formats.checkpoints import read_whole
from acetate.formats.layout import is_sharded
from acetate.formats.sharded import Like, read_sharded, shard_whole, write_sharded
from acetate.lightning_seams import share_data_among_all
from acetate.replacing import rename_over, unwritten


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary sibling, syncs, then renames: a full disk leaves the previous
    checkpoint as it was."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes one file. Raises OSError that says how much room there is."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            rename_over(temporary, path)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's zip writer turns a full disk into a RuntimeError
            raise unwritten(path, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        """Reads a file or a sharded folder, whole."""
        return read_sharded(Path(path)) if is_sharded(Path(path)) else read_whole(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; a folder loses its name first, so that no half of one is found."""
        path = Path(path)
        if path.is_dir():
            path = path.replace(path.with_name(f".{path.name}.{os.getpid()}.old.tmp"))
        super().remove_checkpoint(path)


class ShardedStrategy(ModelParallelStrategy):
    """Trains with FSDP2 over all ranks. Checkpoints are folders of shards that hold only what the
    module saves."""

    def setup_environment(self) -> None:
        share_data_among_all(self)
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        # shards; Lightning's own copies the frozen base to the CPU
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        write_sharded(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a folder, or the file of a run without shards."""
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded(path):
            # to train, or validate
            parts = ("state_dict", "optimizer_states") if self.optimizers else ("state_dict",)
            return read_sharded(path, self._owners(), parts)
        return shard_whole(read_whole(path), self._owners())

    def _owners(self) -> Like:
        """Returns the parameter that a tensor of a checkpoint belongs to, by its name in the
        index."""
        assert self.lightning_module is not None
        named = dict(self.lightning_module.named_parameters())
        optimized = [
            [p for group in optimizer.param_groups for p in group["params"]]
            for optimizer in self.optimizers
        ]

        def owner(name: str) -> Tensor | None:
            part, _, name = name.partition(".")
            if part == "state_dict":
                return named.get(name)
            number, index, _ = name.split(".")
            parameters = optimized[int(number)] if int(number) < len(optimized) else []
            return parameters[int(index)] if int(index) < len(parameters) else None

        return owner
