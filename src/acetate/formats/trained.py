"""Checks that tensors and facts of a checkpoint are whole, as far as that shows without the base
model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acetate.documents import names, shown
from acetate.formats.names import DIT_IN_BLOCKS, VAE_OUTSIDE_BLOCKS, original_vae_name
from acetate.formats.wan_alpha import OUR_LORA_KEY
from acetate.models.adapters import check_finite, misfits, read_adapters
from acetate.models.condition import GIVEN
from acetate.models.dit import DORA_TARGETS
from acetate.models.experts import PARTS
from acetate.models.joint import TARGETS as JOINT_TARGETS
from acetate.models.merge import INITS, FeatureMerge
from acetate.settings import Rule, flag, number, one_of, text, whole

RANK = whole(1, 2**16)
ALPHA = number(0, 2**20)  # of low rank, by which a rank's adapters are scaled
NEEDED: dict[str, dict[str, Rule]] = {
    "rgba_vae": {
        "base": text, "base_sha256": text, "merge_init": one_of(*INITS), "lora_rank": RANK,
        "lora_alpha": ALPHA, "average_alpha": flag,
    },
    "dit_dora": {
        "base": text, "transformer_sha256": text, "rank": RANK, "alpha": ALPHA,
        "mean_shift": number(-100, 100),
    },
    "dit_joint": {
        "base": text, "transformer_sha256": text, "rank": RANK, "alpha": ALPHA,
        "rgb_attends_alpha": flag,
    },
}  # fmt: skip
# what may stand beside them
condition = Rule(
    "given (first or first_last), channels (1 to 4096) and widened (true or false)",
    lambda value: (
        isinstance(value, dict)
        and value.keys() == {"given", "channels", "widened"}
        and one_of(*GIVEN).holds(value["given"])
        and whole(1, 4096).holds(value["channels"])
        and flag.holds(value["widened"])
    ),
)
KNOWN: dict[str, Rule] = {
    "expert": one_of(*PARTS), "boundary": number(0, 1),
    "eps": number(0), "step": whole(0), "averaged": flag, "prompt_length": whole(1, 2**20),
    **dict.fromkeys(("vae_sha256", "text_encoder_sha256", "base_sha256"), text),
    "image_encoder_sha256": text,
    **dict.fromkeys(("ellipse", "geometry"), names),
    "condition": condition,
}  # fmt: skip
DORA_LAYERS, JOINT_LAYERS = (
    [
        name.removesuffix(".weight")
        for name in DIT_IN_BLOCKS
        if name.endswith(".weight")
        and re.fullmatch(targets, f"blocks.0.{name.removesuffix('.weight')}")
    ]
    for targets in (DORA_TARGETS, JOINT_TARGETS)
)
PREFIX = {"rgba_vae": "vae.", "dit_dora": "transformer.", "dit_joint": "transformer."}
ALPHA_EMBEDDING = "patch_embedding.alpha_embedding"
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
    wrong = [f"no {name}" for name in NEEDED[kind] if name not in facts] + [
        f"{name}={shown(facts[name])}: must be {rule.says}"
        for name, rule in (KNOWN | NEEDED[kind]).items()
        if name in facts and not rule.holds(facts[name])
    ]
    if wrong:
        raise ValueError(
            f"{path}: its metadata has {', '.join(wrong)}. They are damaged: give another of its "
            "run."
        )


def check_trained(
    path: Path, kind: str, state: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Raises ValueError that names the file and all tensors that are missing, foreign, of wrong
    shape, no floats or not finite.

    state: named as in the model. What only the base says is not checked: how many blocks a DiT has,
    stages a decoder.
    """
    read = {"rgba_vae": _rgba_vae, "dit_dora": _dit_dora, "dit_joint": _dit_joint}
    expected = read[kind](state, facts)
    if found := misfits(expected, state):
        raise ValueError(
            f"{path} is no whole {kind}: {found}. It is damaged: give another checkpoint of its "
            "run."
        )
    check_finite(state, path)


def _side(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Returns the length of a tensor's axis; 0 where there is no such tensor or axis, which is
    found to be wrong then."""
    shape = state[name].shape if name in state else ()
    return shape[axis] if axis < len(shape) else 0


def _dit_joint(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    width = _side(state, ALPHA_EMBEDDING, 0)
    return {
        ALPHA_EMBEDDING: torch.empty(width, device="meta"),
        **_low_rank(state, facts, JOINT_LAYERS, DORA_PARTS[:2]),
    }


def _dit_dora(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    expected = _low_rank(state, facts, DORA_LAYERS, DORA_PARTS)
    if facts.get("condition", {}).get("widened"):
        shape = state["patch_embedding.weight"].shape if "patch_embedding.weight" in state else ()
        shape = shape if len(shape) == 5 else (0, 0, 0, 0, 0)
        expected["patch_embedding.weight"] = torch.empty(shape, device="meta")
        expected["patch_embedding.bias"] = torch.empty(shape[0], device="meta")
    return expected


def _low_rank(
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    layers: Sequence[str],
    parts: Sequence[str],
) -> dict[str, Tensor]:
    found = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    expected: dict[str, Tensor] = {}
    for block in sorted(found | set(range(max(1, len(found))))):
        for layer in layers:
            a, b, *magnitude = (f"blocks.{block}.{layer}.{part}.default.weight" for part in parts)
            width = next(filter(None, (_side(state, name, 0) for name in (b, *magnitude))), 0)
            expected[a] = torch.empty(facts["rank"], _side(state, a, 1), device="meta")
            expected[b] = torch.empty(width, facts["rank"], device="meta")
            expected |= {name: torch.empty(width, device="meta") for name in magnitude}
    return expected


def _rgba_vae(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        features = _side(state, "merge.conv_in.weight", 0)
        channels = _side(state, "merge.conv_out.weight", 0)
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


def read_whole_adapters(source: str, *kinds: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Reads adapters as `read_adapters` does and checks their facts and tensors; named as in the
    model."""
    path, state, facts = read_adapters(source, *kinds)
    kind = facts["kind"]
    check_facts(path, kind, facts)
    state = {name.removeprefix(PREFIX[kind]): value for name, value in state.items()}
    check_trained(path, kind, state, facts)
    return path, state, facts
