"""Reads trained weights out of any checkpoint that a run writes: whole, sharded, or an adapter
file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from acetate.documents import shown
from acetate.formats.layout import is_sharded
from acetate.formats.sharded import REST, read_sharded
from acetate.formats.trained import PREFIX, check_facts, check_trained
from acetate.models.adapters import (
    ADAPTER_SCHEMA,
    best_of,
    listed,
    place_and_which,
    read_adapter_file,
    read_facts,
)
from acetate.models.weights import load_data
from acetate.replacing import standing
from acetate.settings import whole

KINDS = ("rgba_vae", "dit_dora", "dit_joint")


@dataclass(frozen=True)
class Trained:
    """Tensors named as in the model (RGBAVAE, or the DiT with PEFT's adapters), and the facts that
    the run noted of them."""

    path: Path
    kind: str  # of KINDS
    state: dict[str, Tensor]
    facts: dict[str, Any]


def read_trained(source: str, ema: bool | None = None) -> Trained:
    """Reads the weights that `source` trained: a .ckpt file or sharded folder, an adapter
    .safetensors, or a folder of runs: the newest, its last checkpoint or, with @best after the
    folder's name, its best.

    ema: True the average, False the raw weights, None the average where there is one. Raises
    FileNotFoundError (nothing there) and ValueError (not readable, damaged, no average, another
    kind of file), naming the file.
    """
    place, which = place_and_which(source)
    path = _newest(standing(place))
    if which == "best" and path != place:
        path = best_of(path.parents[1])
    if path.suffix == ".safetensors":
        state, facts = read_adapter_file(path)
        averaged = bool(facts.get("averaged", False))
        if ema is not None and ema != averaged:
            holds = "the average" if averaged else "no average, but the raw weights"
            raise ValueError(
                f"{path} holds {holds}; ema={str(ema).lower()} needs the .ckpt beside it, or leave "
                "out ema."
            )
    else:
        checkpoint = (
            read_sharded(path, parts=("state_dict",)) if path.is_dir() else read_whole(path)
        )
        state, facts, averaged = _choose(checkpoint, path, ema)
    kind = facts.get("kind")
    if kind not in KINDS or facts.get("schema") != ADAPTER_SCHEMA:
        raise ValueError(
            f"{path} is of kind {kind!r}, schema {facts.get('schema')!r}; needed: "
            f"{' or '.join(KINDS)}, schema {ADAPTER_SCHEMA}. Give a checkpoint of "
            "experiment=vae_rgba, dit_dora or dit_joint."
        )
    check_facts(path, kind, facts)
    state = {name.removeprefix(PREFIX[kind]): value for name, value in state.items()}
    check_trained(path, kind, state, facts)
    return Trained(path, kind, state, {**facts, "averaged": averaged})


def step_of(path: Path) -> int:
    """Returns the optimizer step at which a checkpoint, whole or sharded, was written. Raises
    ValueError as `read_whole`."""
    step: Any = read_whole(path / REST if is_sharded(path) else path).get("global_step")
    if not whole(0, 2**40).holds(step):
        raise ValueError(
            f"{path}: global_step={shown(step)}: must be a whole number from 0 on. Give another "
            "checkpoint."
        )
    return step


def _newest(path: Path) -> Path:
    """Returns the file or sharded folder itself, or the newest last checkpoint below a folder."""
    if path.is_file() or is_sharded(path):
        return path
    found = sorted(path.glob("**/checkpoints/last.*"), key=lambda file: file.stat().st_mtime)
    found = [file for file in found if file.suffix in (".ckpt", ".safetensors")]
    if not found:
        raise FileNotFoundError(
            f"{path}: no checkpoint there. Give a .ckpt (a file or a sharded folder), the "
            ".safetensors beside it, or the folder of a run, which has checkpoints/last.ckpt."
        )
    whole = standing(found[-1].with_suffix(".ckpt"))  # holds the raw weights and the average
    return whole if whole.exists() else found[-1]


def _choose(
    checkpoint: dict[str, Any], path: Path, ema: bool | None
) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """Returns state, facts, and whether the state is the average."""
    if "adapter_metadata" not in checkpoint:
        raise ValueError(
            f"{path} does not say what model it belongs to: it is of another task, or older than "
            "acetate's adapter_metadata. Give the .safetensors beside it."
        )
    try:
        facts = read_facts(checkpoint["adapter_metadata"])
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: its adapter_metadata are not names and JSON ({error}). Give another one."
        ) from error
    if not isinstance(checkpoint.get("global_step"), int):
        raise ValueError(
            f"{path} has no global_step: not written by a run of acetate. Give another one."
        )
    facts["step"] = checkpoint["global_step"]
    average = _part(checkpoint, "callbacks", "EMA", "average")  # where callbacks.ema.EMA keeps it
    if ema and not average:
        raise ValueError(
            f"{path} holds no average: its run had no EMA (callbacks=ema). Leave out ema, or "
            "ema=false."
        )
    averaged = bool(average) and ema is not False
    state = average if averaged else _part(checkpoint, "state_dict")
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} has no state_dict of tensors by name. Give another one of its run."
        )
    if others := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} holds {listed(others)}: no tensor. Give another one of its run.")
    return state, facts, averaged


def _part(held: object, *names: str) -> Any:
    """Returns held[name][name]..., or None where there is no such part."""
    for name in names:
        held = held.get(name) if isinstance(held, dict) else None
    return held


def read_whole(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that is one file. Raises ValueError for a file that is none, or cannot be
    read."""
    checkpoint = load_data(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a dict. Give a run's "
            ".ckpt."
        )
    return checkpoint
