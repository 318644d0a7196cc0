"""Stops training at the first number that is not finite, before it reaches a weight."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


@dataclass
class Batch:
    """A training batch, and what is known of it on the device."""

    step: int
    keys: list[str]
    inputs: dict[str, Tensor]  # name -> (B,) bool, one per clip
    loss: Tensor | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    parameters: Sequence[nn.Parameter] = ()
    largest: Tensor | None = None  # of this rank's part of each parameter's gradient
    bad: Tensor | None = None  # 1 where any rank met a value that is not finite, else 0
    answer: bool | None = None
    copied: torch.cuda.Event | None = None  # when `bad` has come to the CPU
    stepped: bool = False  # whether the optimizer was asked to step

    def find(self, trainer: Trainer, device: torch.device) -> None:
        """Computes `bad`, for which all ranks have to ask together."""
        values = [x.isfinite() for x in (self.largest, self.loss) if x is not None]
        finite = [ok.all().to(device) for ok in [*self.inputs.values(), *values]]
        self.bad = (~torch.stack(finite)).any().float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self.bad, torch.distributed.ReduceOp.MAX)

    def send(self) -> None:
        """Begins to copy `bad` to the CPU."""
        assert self.bad is not None
        self.bad = self.bad.to("cpu", non_blocking=True)
        if torch.cuda.is_initialized():
            self.copied = torch.cuda.current_stream().record_event()

    def is_bad(self) -> bool:
        """Waits until `bad` is known, once."""
        assert self.bad is not None
        if self.copied is not None:
            self.copied.synchronize()
        if self.answer is None:
            self.answer = bool(self.bad.item())
        return self.answer


class NonFiniteGuard(Callback):
    """Raises FloatingPointError when a batch, its loss or its gradients hold NaN or infinity.

    Such a step never changes a weight. Up to `patience` bad steps in a row are skipped with a
    warning. Everything is tested on the device, over all ranks, so that they skip or raise
    together. A fused optimizer skips the step on the device, and what there is to say is said
    before the next one, a validation, a checkpoint or the end: the host never waits for the step at
    hand. Else the answer is read, and gradients are dropped before the optimizer runs. With an fp16
    loss scaler infinite gradients are the scaler's business and are not tested here.
    """

    def __init__(self, patience: int = 0):
        if patience < 0:
            raise ValueError(f"patience={patience}; it counts steps. Use 0 to raise at once.")
        self.patience = patience
        self._bad_steps = 0
        self._sent: tuple[LightningModule, Batch] | None = None  # a step that nobody has judged

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        inputs = {
            name: x.isfinite().reshape(len(x), -1).all(1)
            for name, x in batch.items()
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0
        }
        self._batch = Batch(trainer.global_step, list(batch["key"]), inputs)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._batch.loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._judge_sent()
        batch, scaler = self._batch, getattr(trainer.precision_plugin, "scaler", None)
        batch.stepped = True
        if not scaler:
            batch.parameters, batch.largest = _largest_gradients(optimizer)
        batch.find(trainer, pl_module.device)
        if not scaler and _skips(optimizer):
            optimizer.found_inf = batch.bad  # pyright: ignore  as GradScaler tells it
            batch.send()
            self._sent = pl_module, batch
        elif batch.is_bad():
            # an optimizer leaves parameters without gradient alone
            pl_module.zero_grad(set_to_none=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._batch
        if isinstance(outputs, dict):
            parts = outputs.get("parts", {}).items()
            now.parts = {n: x.detach() if isinstance(x, Tensor) else x for n, x in parts}
        if self._sent is not None and self._sent[1] is now:
            return
        self._judge_sent()
        if not now.stepped:  # gradients are being accumulated
            now.find(trainer, pl_module.device)
            if now.is_bad():
                pl_module.zero_grad(set_to_none=True)
        self._judge(pl_module, now)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge_sent()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge_sent()

    def state_dict(self) -> dict[str, Any]:
        self._judge_sent()
        return {"bad_steps": self._bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bad_steps = state_dict["bad_steps"]

    def _judge_sent(self) -> None:
        """Judges the step that a fused optimizer has skipped or made, if any is left."""
        sent, self._sent = self._sent, None
        if sent is not None:
            self._judge(*sent)

    def _judge(self, pl_module: LightningModule, batch: Batch) -> None:
        """Counts the batch, and warns or raises where it is bad."""
        if not batch.is_bad():
            self._bad_steps = 0 if batch.stepped else self._bad_steps
            return
        self._bad_steps += 1
        message = self._message(pl_module, batch)
        if self._bad_steps > self.patience:
            raise FloatingPointError(message)
        warnings.warn(
            f"{message} Skipped, {self._bad_steps} of at most {self.patience} in a row.",
            stacklevel=2,
        )

    def _message(self, pl_module: LightningModule, batch: Batch) -> str:
        found = []
        for name, ok in batch.inputs.items():
            clips = [key for key, good in zip(batch.keys, ok.tolist(), strict=False) if not good]
            if clips:
                found.append(
                    f"{name} of clip {', '.join(clips)} holds NaN or infinity (repair or drop it)"
                )
        values = {"loss": batch.loss, **batch.parts}
        values = {name: float(x) for name, x in values.items() if x is not None}
        bad_values = [f"{name} = {x}" for name, x in values.items() if not abs(x) < float("inf")]
        if bad_values:
            found.append(", ".join(bad_values))
        if bad_parameters := _bad_parameters(pl_module, batch):
            more = len(bad_parameters) - 1
            found.append(f"gradient of {bad_parameters[0]}" + (f" and {more} more" if more else ""))
        found = found or ["nothing on this rank; another rank names the cause"]
        return (
            f"training step {batch.step}, clips {', '.join(batch.keys)}: not finite: "
            f"{'; '.join(found)}. No weight was changed. Lower the learning rate or set "
            "trainer.gradient_clip_val, or let bad steps be skipped with "
            f"patience={self.patience + 1}."
        )


def _skips(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer leaves out a step where `found_inf` on the device says so:
    torch's fused ones, on shards too, where a flag without dimensions counts as every rank's."""
    return all(group.get("fused") for group in optimizer.param_groups)


def _largest_gradients(optimizer: Optimizer) -> tuple[list[nn.Parameter], Tensor | None]:
    """Returns parameters and the largest value of each one's gradient, of a shard that of this
    rank: finite if and only if all are. The Euclidean norm would overflow before its gradients
    do."""
    parameters = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and _local(p.grad).numel()
    ]
    if not parameters:
        return [], None
    gradients = [_local(p.grad) for p in parameters]
    return parameters, torch.stack(torch._foreach_norm(gradients, float("inf")))


def _local(gradient: Tensor) -> Tensor:
    """Returns this rank's shard: ranks agree in one sum over flags, not in one collective per
    tensor."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _bad_parameters(pl_module: LightningModule, batch: Batch) -> list[str]:
    """Returns the names of the parameters whose gradients are not finite."""
    if batch.largest is None:
        return []
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    finite = batch.largest.isfinite().tolist()
    pairs = zip(batch.parameters, finite, strict=True)
    return [names[id(parameter)] for parameter, ok in pairs if not ok]
