"""Merges few-step LoRA files in LightX2V's style into the DiT."""

import re
from collections.abc import Iterator

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate.formats.names import dit_name
from acetate.models.adapters import is_float, listed

FEW_STEP_KEY = re.compile(
    r"(diffusion_model\.)?(?P<layer>.+?)\.(?P<part>lora_(down|up|A|B)(\.default)?\.weight|alpha|diff(_b|_m)?)"
)
# musubi's and kohya's names
KOHYA_KEY = re.compile(r"lora_unet_blocks_(\d+)_(self_attn|cross_attn|ffn)_([qkvo]|\d)\.")
MATRICES = {"A": "down", "down": "down", "B": "up", "up": "up"}
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
Parts = dict[str, tuple[str, Tensor]]  # down, up, alpha, diff -> key and tensor in the file


@torch.no_grad()
def merge_few_step(
    transformer: WanTransformer3DModel,
    flat: dict[str, Tensor],
    strength: float = 1.0,
    source: str = "the few-step LoRA",
) -> int:
    """Adds a LightX2V-style file to the weights, in fp32; DoRA must be merged before. Returns the
    tensors changed.

    Takes lora_down/up or lora_A/B (times alpha / rank where the file has alpha), and differences of
    weights (.diff), biases (.diff_b) and modulation (.diff_m). One weight at a time is in fp32.
    source: named by errors. Raises ValueError, and changes nothing, for keys that have no place in
    this DiT, or tensors of another shape.
    """
    changes, target = read_changes(flat, source), dict(transformer.named_parameters())
    if foreign := [name for name in changes if name not in target]:
        raise ValueError(
            f"{source}: {listed(foreign)} does not exist in this DiT. Give the LoRA of this model."
        )
    problems = [
        problem
        for name, parts in changes.items()
        for problem in misfits(name, target[name].shape, parts)
    ]
    if problems:
        raise ValueError(f"{source}: {listed(problems)}. Give the LoRA of this model.")
    for name, parts in changes.items():
        weight = target[name]
        changed = weight.float()
        if "diff" in parts:
            changed = changed + strength * parts["diff"][1].float().view_as(weight).to(
                weight.device
            )
        if "up" in parts:
            down, up = (
                parts[part][1].float().flatten(1).to(weight.device) for part in ("down", "up")
            )
            scale = float(parts["alpha"][1]) / len(down) if "alpha" in parts else 1.0
            changed = changed + (strength * scale * (up @ down)).view_as(weight)
        weight.copy_(changed)
    return len(changes)


def read_changes(flat: dict[str, Tensor], source: str) -> dict[str, Parts]:
    """Returns for each parameter of the diffusers DiT the tensors that change it. Raises ValueError
    for keys of other kinds and for two keys of one part."""
    changes: dict[str, Parts] = {}
    foreign, quantised, double = [], [], []
    for key, value in flat.items():
        match = FEW_STEP_KEY.fullmatch(KOHYA_KEY.sub(r"blocks.\1.\2.\3.", key))
        if match is None:
            foreign.append(key)
            continue
        if not is_float(value) and match["part"] != "alpha":
            quantised.append(f"{key} is {value.dtype}")
        difference = DIFFERENCES.get(match["part"])
        part = (
            "diff"
            if difference
            else MATRICES.get(match["part"].split(".")[0].removeprefix("lora_"), "alpha")
        )
        parts = changes.setdefault(dit_name(f"{match['layer']}.{difference or 'weight'}"), {})
        if part in parts:
            double.append(f"{key} and {parts[part][0]}")
        parts[part] = key, value
    if foreign or not flat:
        raise ValueError(
            f"{source}: {listed(foreign) if foreign else 'empty'}: no tensors of a few-step LoRA "
            "(lora_down, lora_up, alpha, diff, diff_b, diff_m)."
        )
    if quantised:
        raise ValueError(
            f"{source}: {listed(quantised)}. Give a file in bf16, fp16 or fp32, not a quantised "
            "one."
        )
    if double:
        raise ValueError(
            f"{source}: {listed(double)}: one tensor under two names. Remove one of them."
        )
    return changes


def misfits(name: str, shape: torch.Size, parts: Parts) -> Iterator[str]:
    """Yields the reasons why these parts cannot change a parameter of this shape."""
    key, value = parts.get("diff", ("", None))
    if value is not None and tuple(value.shape) not in (
        tuple(shape),
        tuple(shape)[1:] if shape[0] == 1 else None,
    ):
        yield f"{name} is {tuple(shape)}, {key} has {tuple(value.shape)}"
    pair = [parts[part][1] for part in ("down", "up") if part in parts]
    if parts.keys() == {"diff"}:
        return
    if len(pair) < 2:
        yield (
            f"{name} needs a down and an up matrix, the file has "
            f"{', '.join(key for key, _ in parts.values())}"
        )
        return
    (down_key, down), (up_key, up) = parts["down"], parts["up"]
    if min(down.ndim, up.ndim) < 2 or min(down.numel(), up.numel()) < 1:
        yield f"{down_key} and {up_key} are {tuple(down.shape)} and {tuple(up.shape)}, no matrices"
    elif len(down) != up[0].numel():
        yield f"{name} has a down matrix of rank {len(down)} and an up matrix of {up[0].numel()}"
    elif len(up) != shape[0] or down[0].numel() != shape[1:].numel():
        yield f"{name} is {tuple(shape)}, {up_key} times {down_key} has {len(up), down[0].numel()}"
    if "alpha" in parts and parts["alpha"][1].numel() != 1:
        yield f"{parts['alpha'][0]} has {parts['alpha'][1].numel()} values, it is one number"
