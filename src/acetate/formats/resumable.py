"""Checks that a run can go on from a checkpoint of training, before anything is restored of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from acetate.documents import FieldError, Schema, broken, names, shown
from acetate.settings import Rule, mapping, number, optional, several, text, whole

COUNT = whole(0, 2**40)
MOST_BATCHES = 10_000  # of one optimizer step
tensors = Rule(
    "tensors by name",
    lambda value: (
        isinstance(value, dict)
        and all(isinstance(name, str) for name in value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    ),
)
parts = Rule(
    "a list of at least one part",
    lambda value: (
        isinstance(value, list) and len(value) > 0 and all(isinstance(held, dict) for held in value)
    ),
)
objects = Rule(
    "parts by name",
    lambda value: (
        isinstance(value, dict) and all(isinstance(held, dict) for held in value.values())
    ),
)
CHECKPOINT = Schema(
    {
        "epoch": COUNT, "global_step": COUNT, "pytorch-lightning_version": text,
        "state_dict": tensors, "loops": objects, "optimizer_states": parts, "lr_schedulers": parts,
    },
    {
        "callbacks": objects, "schedule": names, "adapter_metadata": mapping(text, text),
        "bins": Rule(
            "two tensors",
            lambda value: isinstance(value, tuple) and all(isinstance(x, Tensor) for x in value),
        ),
    },
)  # fmt: skip
switch = Rule("true, false or null", lambda value: value is None or isinstance(value, bool))
saved = {
    **dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), text),
    "best_k_models": Rule("an object", lambda value: isinstance(value, dict)),
    "dirpath": optional(text),
}
CALLBACKS = {
    "EMA": Schema({"average": tensors}), "NonFiniteGuard": Schema({"bad_steps": COUNT}),
    "AdapterCheckpoint": Schema(saved), "StepCheckpoint": Schema(saved),
}  # fmt: skip
METRICS = Schema({"rows": several(COUNT, 0)})
WALK = several(several(COUNT, 2, 2), 0)
ADAM = ["step", "exp_avg", "exp_avg_sq"]
GROUP = {"lr": number(0), "initial_lr": number(0), "weight_decay": number(0), "eps": number(0),
         "betas": several(number(0, 1), 2, 2)}  # fmt: skip


_rates = several(number(0))
SCHEDULER = Schema(
    {"last_epoch": COUNT, "_step_count": COUNT, "base_lrs": _rates, "_last_lr": _rates,
     "lr_lambdas": several(Rule("null", lambda value: value is None))},
)  # fmt: skip


def check_resumable(checkpoint: Mapping[str, Any], loops: Mapping[str, Any]) -> None:
    """Raises FieldError that names the part that is missing, of another form, or at odds with
    others. loops: the state of a new trainer's fit loop, whose form it has."""
    CHECKPOINT.check(checkpoint)
    if "metrics" in checkpoint:
        METRICS.check(checkpoint["metrics"], "metrics")
    if "fit_loop" not in checkpoint["loops"]:
        raise FieldError("loops.fit_loop is missing")
    loop = checkpoint["loops"]["fit_loop"]
    same_form(loops, loop, "loops.fit_loop")
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    if steps["total"]["completed"] != checkpoint["global_step"]:
        raise FieldError(
            f"global_step={checkpoint['global_step']}: must be the steps that its loops have "
            f"completed, {steps['total']['completed']}"
        )
    done = loop["epoch_loop.batch_progress"]["total"]["processed"]
    if done > MOST_BATCHES * (checkpoint["global_step"] + 1):
        raise FieldError(
            f"loops.fit_loop: {done} batches in {checkpoint['global_step']} steps: must be at most "
            f"{MOST_BATCHES} a step"
        )
    walk = checkpoint.get("LatentDataModule", {}).get("walk", [])
    if not WALK.holds(walk) or sum(batches for _, batches in walk) > done:
        raise FieldError(
            f"LatentDataModule.walk={shown(walk)}: must be pairs of whole numbers, and no more "
            f"batches than its loops have processed, {done}"
        )
    for name, state in checkpoint.get("callbacks", {}).items():
        kind = re.match("[A-Za-z]*", str(name))
        if kind and kind[0] in CALLBACKS:
            CALLBACKS[kind[0]].check(state, f"callbacks.{kind[0]}")
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("average", {})
    for name, value in average.items():
        own = checkpoint["state_dict"].get(name)
        if own is None or own.shape != value.shape:
            raise FieldError(
                f"callbacks.EMA.average: {name} is {tuple(value.shape)}, in the state_dict "
                f"{None if own is None else tuple(own.shape)}"
            )


def same_form(like: Any, value: Any, place: str) -> None:
    """Raises FieldError unless objects have the names of `like`, and its numbers are counts."""
    if isinstance(like, Mapping):
        if not isinstance(value, Mapping):
            raise FieldError(f"{place}={shown(value)}: must be an object")
        if wrong := sorted(map(str, like.keys() ^ value.keys())):
            raise FieldError(f"{place}.{wrong[0]} is missing or unknown")
        for name, part in like.items():
            same_form(part, value[name], f"{place}.{name}")
    elif isinstance(like, bool):
        if not isinstance(value, bool):
            raise FieldError(f"{place}={shown(value)}: must be true or false")
    elif isinstance(like, int) and not COUNT.holds(value):
        raise broken(place, value, COUNT)


def check_optimizers(
    checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer], schedulers: Sequence[Any]
) -> None:
    """Raises FieldError where the states are not of these optimizers and schedulers."""
    for name, own in (("optimizer_states", optimizers), ("lr_schedulers", schedulers)):
        if len(checkpoint[name]) != len(own):
            raise FieldError(f"{name} has {len(checkpoint[name])} parts: must be {len(own)}")
    for number_of, optimizer in enumerate(optimizers):
        state = checkpoint["optimizer_states"][number_of]
        _check_optimizer(state, optimizer, f"optimizer_states[{number_of}]")
        if not state["state"] and checkpoint["global_step"] > 0:
            raise FieldError(
                f"optimizer_states[{number_of}].state is empty: must hold what "
                f"{checkpoint['global_step']} steps have left there"
            )
    for number_of, scheduler in enumerate(schedulers):
        state: dict[str, Any] = checkpoint["lr_schedulers"][number_of]
        place, like = f"lr_schedulers[{number_of}]", scheduler.state_dict()
        # a state becomes attributes, which must not stand in the place of methods
        if wrong := [n for n in state if callable(getattr(type(scheduler), str(n), None))]:
            raise FieldError(f"{place}.{wrong[0]} is unknown")
        SCHEDULER.check(state, place)
        for name in ("base_lrs", "_last_lr", "lr_lambdas"):
            if not isinstance(state[name], list) or len(state[name]) != len(like[name]):
                raise FieldError(
                    f"{place}.{name}={shown(state[name])}: must be {len(like[name])} values"
                )


def _check_optimizer(state: Mapping[str, Any], optimizer: Optimizer, place: str) -> None:
    like = optimizer.state_dict()
    groups: Any = state.get("param_groups")
    held = state.get("state")
    if not parts.holds(groups) or not isinstance(held, dict):
        raise FieldError(f"{place}: must have param_groups and state")
    if len(groups) != len(like["param_groups"]):
        raise FieldError(f"{place}.param_groups: must be {len(like['param_groups'])}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    like_adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    for index, (group, own) in enumerate(zip(groups, like["param_groups"], strict=True)):
        at = f"{place}.param_groups[{index}]"
        kept = {name: value for name, value in own.items() if name != "params"}
        Schema(
            {name: rule for name, rule in GROUP.items() if name in own and like_adam},
            {name: switch if like_adam else _alike(value) for name, value in kept.items()},
        ).check({name: value for name, value in group.items() if name != "params"}, at)
        if group.get("params") != own["params"]:
            raise FieldError(f"{at}.params: must number the {len(own['params'])} parameters")
    for key, values in held.items():
        at = f"{place}.state[{shown(key)}]"
        if not isinstance(key, int) or not 0 <= key < len(parameters):
            raise FieldError(f"{at}: there are {len(parameters)} parameters")
        known = ADAM if like_adam else _state_names(optimizer, parameters[key].ndim)
        if not tensors.holds(values) or (known and values.keys() != set(known)):
            listed = " and ".join(part for part in (", ".join(known[:-1]), *known[-1:]) if part)
            said = f"the tensors {listed}" if known else tensors.says
            raise FieldError(f"{at}: must be {said}")
        for name, value in values.items():
            shape = () if name == "step" else tuple(parameters[key].shape)
            # others keep rows and columns, or blocks of 8 bits
            fits = not like_adam or (tuple(value.shape) == shape and value.is_floating_point())
            if not fits:
                raise FieldError(
                    f"{at}.{name} is {value.dtype} {tuple(value.shape)}: must be a float {shape}"
                )
            if not bool(value.isfinite().all()):
                raise FieldError(f"{at}.{name}: must be finite")


def _alike(value: Any) -> Rule:
    """Returns the rule that a setting of an optimizer's group keeps, from its own value."""
    if value is None or isinstance(value, bool):
        return switch
    if isinstance(value, (tuple, list)):
        return several(optional(number()), len(value), len(value))
    return number()


def _state_names(optimizer: Optimizer, dimensions: int) -> list[str]:
    """Returns the names of what an optimizer keeps of a parameter, from a step of a small one; none
    where that cannot be had, as of one that runs on a GPU alone."""
    small = torch.zeros((2,) * dimensions, requires_grad=True)
    small.grad = torch.ones_like(small)
    try:
        probe = type(optimizer)([small], **optimizer.defaults)
        probe.step()
    except Exception:  # whatever a package of others raises
        return []
    return [str(name) for name in probe.state[small]]
