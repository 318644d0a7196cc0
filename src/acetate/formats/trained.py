"""Whether tensors and facts of a checkpoint are whole, as far as that shows without the base
model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acetate.formats.names import DIT_IN_BLOCKS, VAE_OUTSIDE_BLOCKS, original_vae_name
from acetate.formats.wan_alpha import OUR_LORA_KEY
from acetate.models.adapters import misfits
from acetate.models.dit import DORA_TARGETS
from acetate.models.merge import INITS, FeatureMerge

NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "rgba_vae": {
        "base": str, "base_sha256": str, "merge_init": str, "lora_rank": int, "lora_alpha": (int,
        float),
        "average_alpha": bool,
    },
    "dit_dora": {
        "base": str, "transformer_sha256": str, "rank": int, "alpha": (int, float),
        "mean_shift": (int, float),
    },
}  # fmt: skip
DORA_LAYERS = [
    name.removesuffix(".weight")
    for name in DIT_IN_BLOCKS
    if name.endswith(".weight")
    and re.fullmatch(DORA_TARGETS, f"blocks.0.{name.removesuffix('.weight')}")
]
DORA_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
# Of any Wan decoder, however many stages it has
DECODER_CONVOLUTIONS = [
    name.removeprefix("decoder.").removesuffix(".weight")
    for name in VAE_OUTSIDE_BLOCKS
    if name.startswith("decoder.") and name.endswith(".weight")
]


def check_facts(path: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Raises ValueError that names the file and each key that the model of this kind cannot be
    built without."""
    wrong = [
        f"{name}={facts[name]!r}" if name in facts else f"no {name}"
        for name, kinds in NEEDED[kind].items()
        if not isinstance(facts.get(name), kinds)
        or (isinstance(facts[name], bool) and kinds is not bool)
    ]
    rank = "lora_rank" if kind == "rgba_vae" else "rank"
    if not wrong and facts[rank] < 1:
        wrong = [f"{rank}={facts[rank]}"]
    if not wrong and kind == "rgba_vae" and facts["merge_init"] not in INITS:
        wrong = [f"merge_init={facts['merge_init']!r}"]
    if wrong:
        raise ValueError(
            f"{path}: its metadata has {', '.join(wrong)}. They are damaged: give another of its "
            "run."
        )


def check_trained(
    path: Path, kind: str, state: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Raises ValueError that names the file and all tensors that are missing, foreign, of wrong
    shape or no floats.

    state: named as in the model. What only the base says is not checked: how many blocks a DiT has,
    stages a decoder.
    """
    expected = {"rgba_vae": _rgba_vae, "dit_dora": _dit_dora}[kind](state, facts)
    if found := misfits(expected, state):
        raise ValueError(
            f"{path} is no whole {kind}: {found}. It is damaged: give another checkpoint of its "
            "run."
        )


def _side(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    """0 where there is no such tensor or axis, which is found to be wrong then."""
    shape = state[name].shape if name in state else ()
    return shape[axis] if axis < len(shape) else 0


def _dit_dora(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    expected: dict[str, Tensor] = {}
    for block in sorted(found | set(range(max(1, len(found))))):
        for layer in DORA_LAYERS:
            a, b, magnitude = (
                f"blocks.{block}.{layer}.{part}.default.weight" for part in DORA_PARTS
            )
            width = _side(state, b, 0) or _side(state, magnitude, 0)
            expected[a] = torch.empty(facts["rank"], _side(state, a, 1), device="meta")
            expected[b] = torch.empty(width, facts["rank"], device="meta")
            expected[magnitude] = torch.empty(width, device="meta")
    return expected


def _rgba_vae(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        features, channels = (
            _side(state, "merge.conv_in.weight", 0),
            _side(state, "merge.conv_out.weight", 0),
        )
        merge = FeatureMerge(max(1, features), max(1, channels), "scratch").named_parameters()
    expected: dict[str, Tensor] = {f"merge.{name}": value for name, value in merge}
    matches = [match for name in state if (match := OUR_LORA_KEY.fullmatch(name))]
    for conv in dict.fromkeys(
        [*DECODER_CONVOLUTIONS, *(match[2] for match in matches if _is_decoders(match[2]))]
    ):
        for decoder in ("decoder_rgb", "decoder_alpha"):
            a, b = (f"{decoder}.net.{conv}.parametrizations.weight.0.{matrix}" for matrix in "AB")
            kernel = state[a].shape[1:] if a in state and state[a].ndim in (4, 5) else (0, 0, 0, 0)
            expected[a] = torch.empty(facts["lora_rank"], *kernel, device="meta")
            expected[b] = torch.empty(_side(state, b, 0), facts["lora_rank"], device="meta")
    return expected


def _is_decoders(conv: str) -> bool:
    try:
        original_vae_name(f"decoder.{conv}.weight")
    except ValueError:
        return False
    return True
