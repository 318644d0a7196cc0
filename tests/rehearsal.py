"""Trainings on the fake GPU, by Lightning's own loops, with the callbacks of a run."""

from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig
from torch.utils.data import DataLoader, IterableDataset

from acetate import memory
from acetate.blank import blank_vae
from acetate.callbacks.ema import EMA
from acetate.callbacks.guard import NonFiniteGuard
from acetate.callbacks.throughput import Throughput
from acetate.commands.estimate import blank_task
from acetate.data.latents import MADE_WITH
from acetate.models.text import embed_prompt
from acetate.models.wan import Geometry
from acetate.steps import StepTrainer
from acetate.tasks.example import Load, MeasuredTask
from tests.fake_gpu import Attention, Convolution, FakeGPU

BLOCKS = 2  # of a DiT of the published size: all of its blocks are alike


@dataclass
class Noted:
    """What the fake GPU noted of one training step, from the batch in the CPU's memory to the last
    callback, or of one validation."""

    waits: Counter[str] = field(default_factory=Counter)
    convolutions: list[Convolution] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    softmaxes: Counter[str] = field(default_factory=Counter)

    def large(self, flops: float = 1e9) -> list[Convolution]:
        """Returns the convolutions of clips that cost more than so much; 2-D ones are VGG's."""
        return [c for c in self.convolutions if c.flops > flops and c.dimensions == 5]


class Notes(Callback):
    """Keeps what the GPU noted; comes last."""

    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu = gpu
        self.steps: list[Noted] = []
        self.validations: list[Noted] = []

    def take(self) -> Noted:
        gpu = self.gpu
        parts = (gpu.waits, gpu.convolutions, gpu.attentions, gpu.softmaxes)
        noted = Noted(*map(copy, parts))
        for part in parts:
            part.clear()
        return noted

    def on_train_start(self, *_: Any) -> None:
        self.take()

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, *_: Any) -> None:
        self.steps.append(self.take())
        assert all(tensor.is_cuda for tensor in (*task.parameters(), *task.buffers()))

    def on_validation_end(self, *_: Any) -> None:
        self.validations.append(self.take())


class Card(CPUAccelerator):
    """Sets nothing up for a GPU that is not there."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == "cuda"


class Batches(LightningDataModule):
    """Gives the same batch again and again, from the memory of the CPU, to train and to validate.

    manifest: of a cache of latents.
    """

    manifest = dict.fromkeys(MADE_WITH, "")

    def __init__(self, batch: dict[str, Any]) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Endless(self.batch), batch_size=None)

    val_dataloader = train_dataloader


class _Endless(IterableDataset[Any]):
    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.batch


def trainer_of(gpu: FakeGPU, *callbacks: Callback, validate: bool = True) -> tuple[Trainer, Notes]:
    """Returns a trainer of one step in bf16 that does not log, and a validation of one batch."""
    notes = Notes(gpu)
    strategy = SingleDeviceStrategy(device=torch.device("cuda:0"), accelerator=Card())
    trainer = StepTrainer(
        strategy=strategy, precision="bf16-mixed", max_steps=1, gradient_clip_val=1.0,
        log_every_n_steps=1000, val_check_interval=1, limit_val_batches=int(validate),
        num_sanity_val_steps=0, check_val_every_n_epoch=None, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, notes],
    )  # fmt: skip
    return trainer, notes


def with_numbers(config: DictConfig) -> MeasuredTask:
    """Builds a task as a run does; its model is loaded when the trainer asks for it."""
    wan = config.wan
    embed_prompt("", wan.text_encoder, wan.prompt_length, config.paths.cache)  # the judge's
    return instantiate(config.task)


def of_published_size(config: DictConfig) -> MeasuredTask:
    """Builds a task without weights on the fake GPU, its DiT as wide as ever and BLOCKS deep."""
    task: Any = blank_task(config)
    judge = getattr(task, "judge", None)
    for transformer in (getattr(task, "transformer", None), judge and judge.transformer):
        if transformer is not None:
            transformer.blocks = transformer.blocks[:BLOCKS]
    memory.without_numbers(task, "cuda:0")
    return task


def batch_of(config: DictConfig, text_width: int) -> dict[str, Any]:
    """Returns a batch as the data module of the config gives it, in the memory of the CPU."""
    wan, clip = config.wan, config.data if "frames" in config.data else config.wan
    size, shape = config.data.batch_size, (clip.frames, clip.height, clip.width)
    load = Load(size, *shape, prompt_length=wan.prompt_length)
    if "frames" in config.data:
        rgb, alpha = (torch.zeros(size, channels, *shape) for channels in (3, 1))
        return {"key": load.keys, "rgb": rgb, "alpha": alpha}
    latents = Geometry.of(blank_vae(wan.vae)).latent_shape(*shape)
    context = torch.zeros(size, wan.prompt_length, text_width)
    return {
        "key": load.keys, "latents": torch.zeros(size, *latents), "context": context,
        "ellipses": torch.zeros(size, latents[1], 5), "null_context": context[:1].clone(),
    }  # fmt: skip


def rehearse(
    gpu: FakeGPU, task: LightningModule, batch: dict[str, Any], validate: bool = True
) -> tuple[Noted, Noted | None]:
    """Trains a step and validates, with the callbacks of a run; returns what was noted of both."""
    callbacks = (NonFiniteGuard(), EMA(0.9), Throughput(1000))
    trainer, notes = trainer_of(gpu, *callbacks, validate=validate)
    trainer.fit(task, datamodule=Batches(batch))
    (step,) = notes.steps
    return step, notes.validations[0] if validate else None
