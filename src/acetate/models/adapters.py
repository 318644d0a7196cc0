"""LoRA that is merged inside the forward pass, and the state of the parameters that train."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from acetate.documents import FieldError, is_shallow, parse, shown, something
from acetate.replacing import standing

ADAPTER_SCHEMA = 1  # of adapter files' metadata


class MergedLoRA(nn.Module):
    """Computes W' = W + (alpha / rank) * B A for 2-D and 3-D convolutions (Hu et al. 2021), then
    one convolution.

    A (rank, in, *kernel) and B (out, rank) are fp32 masters. A factored second path would cost 96 %
    more FLOPs in Wan's decoder and keep rank-channel activations at full resolution.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, *weight.shape[1:]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        # a bf16 sum would swallow small updates
        with torch.autocast(self.A.device.type, enabled=False):
            delta = (self.B.float() @ self.A.float().flatten(1)).view_as(weight)
            return (weight.float() + self.scale * delta).to(weight.dtype)


def add_lora(module: nn.Module, rank: int, alpha: float) -> list[str]:
    """Freezes `module` and puts a MergedLoRA on each of its convolutions; returns their names."""
    module.requires_grad_(False)
    convolutions = [
        (name, m) for name, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))
    ]
    for _, conv in convolutions:
        # unsafe: without a first merge to check shape and type, which MergedLoRA keeps; the meta
        # device cannot do it
        parametrize.register_parametrization(
            conv, "weight", MergedLoRA(conv.weight, rank, alpha), unsafe=True
        )
    return [name for name, _ in convolutions]


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns name -> parameter of everything that trains."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def is_float(tensor: Tensor) -> bool:
    """Returns whether a tensor has floats of 16 bits or more: 8 bits are quantised, and their
    scales lie elsewhere."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def listed(names: Sequence[str], most: int = 20) -> str:
    """Joins all names, or the first ones and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_fit(
    target: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Raises ValueError with the names unless `state` has exactly target's names and shapes, in
    floating point.

    labels: what state's names are called in the source.
    """
    if found := misfits(target, state, labels):
        raise ValueError(
            f"{source} does not fit the model: {found}. Choose the wan= and model= settings that "
            "these weights were made with."
        )


def misfits(
    target: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    labels: Mapping[str, str] | None = None,
) -> str:
    """Returns the lines that `check_fit` reports; none where names and shapes fit."""
    labels = labels or {}
    both = [
        (labels.get(name, name), tensor, state[name])
        for name, tensor in target.items()
        if name in state
    ]
    found = {
        "missing": [name for name in target if name not in state],
        "not used": [labels.get(name, name) for name in state if name not in target],
        "of another shape": [
            f"{label} is {tuple(value.shape)}, the model has {tuple(tensor.shape)}"
            for label, tensor, value in both
            if value.shape != tensor.shape
        ],
        "of another type": [
            f"{label} is {str(value.dtype).removeprefix('torch.')}, needed: a float of 16 bits or "
            "more"
            for label, tensor, value in both
            if is_float(tensor) and not is_float(value)
        ],
    }
    return "; ".join(
        f"{len(names)} {what}: {listed(names)}" for what, names in found.items() if names
    )


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Raises ValueError that names the tensors with NaN or infinity."""
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{source} holds {listed(bad)} with values that are not finite (NaN or infinity). Give "
            "an earlier checkpoint of its run."
        )


def load_trainable(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads exactly the trainable parameters, or nothing. Raises ValueError as `check_fit` and
    `check_finite`."""
    target = trainable_state(module)
    check_fit(target, state, source)
    check_finite(state, source)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(state[name])


def place_and_which(source: str) -> tuple[Path, str]:
    """Splits a source into a file or folder and the checkpoint of a folder: RUN@best, RUN@last, or
    RUN, which is RUN@last."""
    for which in ("best", "last"):
        if source.endswith(f"@{which}"):
            return Path(source.removesuffix(f"@{which}")).expanduser(), which
    return Path(source).expanduser(), "last"


def best_of(run: Path) -> Path:
    """Returns the best checkpoint of a run's folder. Raises FileNotFoundError."""
    checkpoints = run / "checkpoints"
    for name in ("best.ckpt", "best.safetensors"):
        if (path := standing(checkpoints / name)).exists():
            return path
    raise FileNotFoundError(
        f"{checkpoints} has no best.ckpt: no validation has measured the run's objective yet. Use "
        f"{run}@last."
    )


def read_adapters(source: str, *kinds: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Reads path, tensors and metadata of an adapter file; for a folder, those of the newest
    last.safetensors below it, or, with @best after its name, those of that run's best.

    Raises FileNotFoundError without one, and ValueError for a file of another kind or schema.
    """
    path, which = place_and_which(source)
    if path.is_dir():
        found = sorted(
            path.glob("**/checkpoints/last.safetensors"), key=lambda file: file.stat().st_mtime
        )
        path = found[-1].with_name(f"{which}.safetensors") if found else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{source}: no adapter file there (.safetensors beside a checkpoint). Train one, or "
            "name its file."
        )
    state, facts = read_adapter_file(path)
    found_kind, schema = facts.get("kind"), facts.get("schema")
    if found_kind not in kinds or schema != ADAPTER_SCHEMA:
        raise ValueError(
            f"{path} is of kind {found_kind!r}, schema {schema!r}; needed: "
            f"{' or '.join(map(repr, kinds))}, schema {ADAPTER_SCHEMA}. Adapter files stand beside "
            "the checkpoints of the experiment that trains them."
        )
    return path, state, facts


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors and metadata of an adapter file of any kind. Raises ValueError for one that
    cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            facts = read_facts(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except Exception as error:  # safetensors has several
        raise ValueError(
            f"{path} cannot be read as adapters ({error}). Train it anew or fetch it again."
        ) from error


def read_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Reads metadata, each of which is JSON. Raises FieldError that names the one that is not."""
    facts = {}
    for name, value in metadata.items():
        try:
            facts[name] = parse(value)
        except (ValueError, AttributeError, TypeError) as error:
            raise FieldError(f"{name}={shown(value)}: must be JSON ({error})") from error
        if not is_shallow(facts[name]):
            raise FieldError(f"{name}={shown(value)}: must be {something.says}")
    return facts
