"""AdamW with linear warm-up and, where wanted, cosine decay."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn


def adamw_with_warmup(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    warmup_steps: int,
    decay_steps: int | None = None,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    warmup: str = "linear",
) -> dict:
    """What `configure_optimizers` returns. decay_steps: the step at which a half cosine reaches zero.

    warmup: `linear`, or `third` (released DiT code: a third of lr for warmup_steps, then all of it).
    """
    if warmup not in ("linear", "third"):
        raise ValueError(f"warmup {warmup!r}; known: linear, third.")
    if decay_steps is not None and decay_steps < 1:
        raise ValueError(f"decay_steps {decay_steps}; the cosine ends at a positive step. Set trainer.max_steps.")
    trainable = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)

    def factor(step: int) -> float:
        if warmup == "third":
            warm = 1.0 if step >= warmup_steps else 1 / 3
        else:
            warm = min(1.0, (step + 1) / (warmup_steps + 1))
        if decay_steps is None:
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
