"""Stops training at the first number that is not finite, before it reaches a weight."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class NonFiniteGuard(Callback):
    """Raises FloatingPointError when a batch, its loss or its gradients hold NaN or infinity.

    Such a step never changes a weight: its gradients are dropped before the optimizer runs. Up to
    `patience` bad steps in a row are skipped with a warning. Everything is tested on the device and
    read once per batch, summed over ranks, so that all ranks skip or raise together. With an fp16
    loss scaler infinite gradients are the scaler's business and are not tested here.
    """

    def __init__(self, patience: int = 0):
        if patience < 0:
            raise ValueError(f"patience={patience}; it counts steps. Use 0 to raise at once.")
        self.patience = patience
        self._bad_steps = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        self._bad: bool | None = None  # None: not read yet
        self._loss: Tensor | None = None
        self._bad_parameters: list[str] = []
        self._inputs = {  # name -> (B,) bool, one per clip
            name: x.isfinite().reshape(len(x), -1).all(1)
            for name, x in batch.items()
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0
        }

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        largest = (
            []
            if getattr(trainer.precision_plugin, "scaler", None)
            else [_largest_gradient(optimizer)]
        )
        self._bad = self._read(trainer, pl_module, largest)
        if self._bad:
            self._bad_parameters = [
                name
                for name, p in pl_module.named_parameters()
                if p.grad is not None and not _finite(p.grad)
            ]
            # an optimizer leaves parameters without gradient alone
            pl_module.zero_grad(set_to_none=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = self._bad is not None
        if not stepped:  # gradients are being accumulated
            self._bad = self._read(trainer, pl_module, [])
            if self._bad:
                pl_module.zero_grad(set_to_none=True)
        if not self._bad:
            self._bad_steps = 0 if stepped else self._bad_steps
            return
        self._bad_steps += 1
        message = self._message(outputs, batch)
        if self._bad_steps > self.patience:
            raise FloatingPointError(message)
        warnings.warn(
            f"{message} Skipped, {self._bad_steps} of at most {self.patience} in a row.",
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"bad_steps": self._bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bad_steps = state_dict["bad_steps"]

    def _read(self, trainer: Trainer, pl_module: LightningModule, values: list[Tensor]) -> bool:
        """Returns whether any rank met a value that is not finite; the one synchronisation of the
        batch."""
        loss = [] if self._loss is None else [self._loss]
        finite = [ok.all() for ok in self._inputs.values()] + [
            x.isfinite().all() for x in values + loss
        ]
        bad = torch.stack([~ok.to(pl_module.device) for ok in finite]).any().float()
        total = trainer.strategy.reduce(bad, reduce_op="sum")
        return bool(torch.as_tensor(total).item())

    def _message(self, outputs: Any, batch: Any) -> str:
        keys = list(batch["key"])
        found = []
        for name, ok in self._inputs.items():
            clips = [key for key, good in zip(keys, ok.tolist(), strict=False) if not good]
            if clips:
                found.append(
                    f"{name} of clip {', '.join(clips)} holds NaN or infinity (repair or drop it)"
                )
        outputs = outputs if isinstance(outputs, dict) else {}
        values = {"loss": self._loss, **outputs.get("parts", {})}
        values = {
            name: float(torch.as_tensor(x).detach()) for name, x in values.items() if x is not None
        }
        bad_values = [f"{name} = {x}" for name, x in values.items() if not abs(x) < float("inf")]
        if bad_values:
            found.append(", ".join(bad_values))
        if self._bad_parameters:
            more = len(self._bad_parameters) - 1
            found.append(
                f"gradient of {self._bad_parameters[0]}" + (f" and {more} more" if more else "")
            )
        found = found or ["nothing on this rank; another rank names the cause"]
        return (
            f"training step {self._step}, clips {', '.join(keys)}: not finite: {'; '.join(found)}. "
            "No weight was changed. Lower the learning rate or set trainer.gradient_clip_val, or "
            f"let bad steps be skipped with patience={self.patience + 1}."
        )


def _local(gradient: Tensor) -> Tensor:
    """Returns this rank's shard: ranks agree in one sum over flags, not in one collective per
    tensor."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _finite(gradient: Tensor) -> bool:
    return bool(_local(gradient).isfinite().all())


def _largest_gradient(optimizer: Optimizer) -> Tensor:
    """Returns the largest gradient, finite if and only if all are; the Euclidean norm would
    overflow before its gradients do."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(
        [g for g in gradients if g.numel()], norm_type=float("inf")
    )
