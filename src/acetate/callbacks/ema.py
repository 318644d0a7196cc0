"""Exponential moving average of what trains."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


class EMA(Callback):
    """Keeps an average: ema <- d * ema + (1 - d) * w after each step, d = min(decay, (1 + step) /
    (10 + step)).

    A schedule-free optimizer has an average of its own, which is taken in its place.

    Validation and adapter files see the average; training and the optimizer never do. Kept in fp32
    in the checkpoint, and whole where weights are sharded, so that a resumed run goes on with it.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay}; it lies in [0, 1), usually 0.999 or above.")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.step = -1
        self._training: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                start = parameter.detach().float().clone()
                self.average[name] = _assign(start, self.average.get(name, start))
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        training = {n: p for n, p in pl_module.named_parameters() if n in self.average}
        for parameter, own in own_averages(trainer.optimizers).items():
            for name in [name for name, p in training.items() if p is parameter]:
                self.average[name].copy_(own)
                del training[name]
        averages = [_local(self.average[name]) for name in training]
        if averages:
            values = [_local(p.float()) for p in training.values()]
            torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if name in self.average:  # a validation before training has none
                self._training[name] = parameter.detach().clone()
                _assign(parameter, self.average[name])

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if name in self._training:
                parameter.copy_(self._training.pop(name))

    def state_dict(self) -> dict[str, Any]:
        whole = {
            n: value.full_tensor() if isinstance(value, DTensor) else value
            for n, value in self.average.items()
        }
        return {"average": {name: value.cpu() for name, value in whole.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def own_averages(optimizers: Sequence[Optimizer]) -> dict[Tensor, Tensor]:
    """Returns the averages that schedule-free optimizers keep of parameters (Defazio et al. 2024,
    arXiv 2405.15682, equation 6): x of y = (1 - beta) z + beta x, where y is the parameter and z in
    the optimizer's state."""
    found = {}
    for optimizer in optimizers:
        for group in [group for group in optimizer.param_groups if "train_mode" in group]:
            beta = group["betas"][0] if "betas" in group else group["momentum"]
            for y in group["params"]:
                if "z" in optimizer.state[y]:
                    found[y] = y.lerp(optimizer.state[y]["z"], 1 - 1 / beta)
    return found


def _assign(target: Tensor, value: Tensor) -> Tensor:
    """Fills target with the value, which is whole where it comes from a checkpoint; each rank then
    takes its part."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    return target.copy_(value)
