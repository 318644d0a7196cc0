"""AdamW with linear warm-up and, where wanted, cosine decay."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn


def linear(step: int, steps: int) -> float:
    """Returns the share of the learning rate in the warm-up and after it."""
    return min(1.0, (step + 1) / (steps + 1))


def adamw_with_warmup(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    warmup_steps: int,
    decay_steps: int | None = None,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    warmup: Callable[[int, int], float] = linear,
) -> dict:
    """Returns the value of `configure_optimizers`. decay_steps: the step at which a half cosine
    reaches zero."""
    if decay_steps is not None and decay_steps < 1:
        raise ValueError(
            f"decay_steps {decay_steps}; the cosine ends at a positive step. Set trainer.max_steps."
        )
    trainable = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay
    )

    def factor(step: int) -> float:
        warm = warmup(step, warmup_steps)
        if decay_steps is None:
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
