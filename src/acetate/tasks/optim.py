"""Optimizers by name, with linear warm-up and, where wanted, cosine decay."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from acetate.lightning_seams import clip_fused

# package of a name -> module
OTHERS = {"bitsandbytes": "bitsandbytes.optim", "schedulefree": "schedulefree"}
# needs a closure; only sparse gradients; only matrices, which a magnitude of DoRA is not
UNFIT = {"LBFGS", "SparseAdam", "Muon"}
# of schedulefree: what needs a closure, wraps another one, or is for comparison
KINDS_UNFIT = ("Closure", "Wrapper", "Reference", "Paper")
FUSED = {"Adam", "AdamW", "SGD"}  # one kernel for all weights, on a GPU


def linear(step: int, steps: int) -> float:
    """Returns the share of the learning rate in the warm-up and after it."""
    return min(1.0, (step + 1) / (steps + 1))


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Returns the class of a name: of torch.optim, as AdamW, or of bitsandbytes or schedulefree
    where that is installed, as bitsandbytes.AdamW8bit. Raises ValueError that says what is
    known."""
    package, _, own = name.rpartition(".")
    place = {"": "torch.optim", "torch.optim": "torch.optim", **OTHERS}.get(package)
    if place is None:
        known = ", ".join(["torch.optim", *OTHERS])
        raise ValueError(f"task.optimizer={name}: of the package {package}; known: {known}.")
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise ValueError(
            f"task.optimizer={name}: {package} is not installed ({error}). Install it, or choose "
            "one of torch.optim, as task.optimizer=AdamW."
        ) from error
    known = {
        found
        for found, of in vars(module).items()
        if inspect.isclass(of)
        and issubclass(of, torch.optim.Optimizer)
        and found != "Optimizer"
        and not found.endswith(KINDS_UNFIT)
    } - UNFIT
    if own not in known:
        near = get_close_matches(own, known, 1)
        said = f"the nearest is {near[0]}" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"task.optimizer={name}: {place} has no such optimizer; {said}.")
    return getattr(module, own)


def with_warmup(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    warmup_steps: int,
    decay_steps: int | None = None,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    warmup: Callable[[int, int], float] = linear,
    optimizer: str = "AdamW",
    fused: bool = False,
) -> dict:
    """Returns the value of `configure_optimizers`. decay_steps: the step at which a half cosine
    reaches zero. optimizer: as of `optimizer_class`; betas and weight decay are for those that have
    them, and the first beta is SGD's momentum. fused: those of FUSED step on a GPU by one kernel,
    also after a checkpoint of a CPU; a CPU stays with its own after one of a GPU."""
    if decay_steps is not None and decay_steps < 1:
        raise ValueError(
            f"decay_steps {decay_steps}; the cosine ends at a positive step. Set trainer.max_steps."
        )
    trainable = [p for p in parameters if p.requires_grad]
    kind = optimizer_class(optimizer)
    given: dict[str, Any] = {
        "betas": (betas[0], betas[1]),
        "momentum": betas[0],
        "weight_decay": weight_decay,
    }
    if fused and optimizer.removeprefix("torch.optim.") in FUSED:
        given["fused"] = all(p.is_cuda for p in trainable) or None
    taken = inspect.signature(kind).parameters
    made = kind(trainable, lr=lr, **{n: value for n, value in given.items() if n in taken})
    if "fused" in given:
        clip_fused(made)
        made.register_load_state_dict_pre_hook(_keep_kernel)

    if "train_mode" in made.param_groups[0]:  # schedule-free; callbacks.ema has its average
        made.train()  # pyright: ignore[reportAttributeAccessIssue]

    def factor(step: int) -> float:
        warm = warmup(step, warmup_steps)
        if decay_steps is None:
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(made, factor)
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _keep_kernel(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a checkpoint with the kernel of this optimizer."""
    own = optimizer.defaults["fused"]
    return {**state, "param_groups": [{**group, "fused": own} for group in state["param_groups"]]}
