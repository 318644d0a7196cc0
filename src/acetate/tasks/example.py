"""Example batches of a task, to measure memory and time of its training step before there is a
run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from acetate.models.wan import Geometry

Group = tuple[nn.Module, list[nn.Module]]


@dataclass(frozen=True)
class Load:
    """A batch of a GPU: clips in pixels, also where a stage reads their latents, and prompts in
    tokens."""

    batch_size: int
    frames: int
    height: int
    width: int
    prompt_length: int

    @property
    def pixels(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def keys(self) -> list[str]:
        """Keys of the clips."""
        return [str(i) for i in range(self.batch_size)]


class MeasuredTask(LightningModule, ABC):
    """A task that gives, after its configure_model, an example batch, its loss and the parts that
    are sharded."""

    shardable = True  # False: trainer=fsdp refuses what it trains

    @abstractmethod
    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        """Returns a batch of its data module, without numbers. geometry: of the VAE, where the task
        reads latents."""

    @abstractmethod
    def example_loss(self, batch: dict[str, Any]) -> Tensor:
        """Computes its own loss on such a batch, without a trainer."""

    @abstractmethod
    def sharded(self) -> list[Group]:
        """Returns the modules that trainer=fsdp shards, each with its blocks, which are gathered
        one by one."""
