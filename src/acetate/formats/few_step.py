"""Few-step LoRA files in LightX2V's style, on the DiT."""

import re

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate.formats.names import dit_name
from acetate.models.adapters import is_float, listed

FEW_STEP_KEY = re.compile(
    r"(diffusion_model\.)?(?P<layer>.+?)\.(?P<part>lora_(down|up|A|B)(\.default)?\.weight|alpha|diff(_b|_m)?)"
)
KOHYA_KEY = re.compile(r"lora_unet_blocks_(\d+)_(self_attn|cross_attn|ffn)_([qkvo]|\d)\.")  # musubi's and kohya's names
MATRICES = {"A": "down", "down": "down", "B": "up", "up": "up"}
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


@torch.no_grad()
def merge_few_step(
    transformer: WanTransformer3DModel,
    flat: dict[str, Tensor],
    strength: float = 1.0,
    source: str = "the few-step LoRA",
) -> int:
    """Adds a LightX2V-style file to the weights, in fp32; DoRA must be merged before. Returns the tensors changed.

    Takes lora_down/up or lora_A/B (times alpha / rank where the file has alpha), and differences of weights
    (.diff), biases (.diff_b) and modulation (.diff_m). source: named by errors. Raises ValueError, and changes
    nothing, for keys that have no place in this DiT, or tensors of another shape.
    """
    changes = few_step_changes(flat, source)
    target = dict(transformer.named_parameters())
    if foreign := [name for name in changes if name not in target]:
        raise ValueError(f"{source}: {listed(foreign)} does not exist in this DiT. Give the LoRA of this model.")
    if shapes := [
        f"{name} is {tuple(target[name].shape)}, the few-step LoRA has {tuple(change.shape)}"
        for name, change in changes.items()
        if target[name].numel() != change.numel()
    ]:
        raise ValueError(f"{source}: {listed(shapes)}: another model's. Give the LoRA of this model.")
    for name, change in changes.items():
        weight = target[name]
        weight.copy_(weight.float() + strength * change.view_as(weight).to(weight.device))
    return len(changes)


def few_step_changes(flat: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """What the file adds to each parameter of the diffusers DiT, in fp32. Raises ValueError for keys of other kinds."""
    layers: dict[str, dict[str, Tensor]] = {}
    changes: dict[str, Tensor] = {}
    foreign, quantised = [], []
    for key, value in flat.items():
        match = FEW_STEP_KEY.fullmatch(KOHYA_KEY.sub(r"blocks.\1.\2.\3.", key))
        if match is None:
            foreign.append(key)
        elif not is_float(value) and match["part"] != "alpha":
            quantised.append(f"{key} is {value.dtype}")
        elif match["part"] in DIFFERENCES:
            changes[dit_name(f"{match['layer']}.{DIFFERENCES[match['part']]}")] = value.float()
        else:
            matrix = MATRICES.get(match["part"].split(".")[0].removeprefix("lora_"), "alpha")
            layers.setdefault(match["layer"], {})[matrix] = value.float()
    if foreign:
        raise ValueError(
            f"{source}: {listed(foreign)}: no tensors of a few-step LoRA "
            "(lora_down, lora_up, alpha, diff, diff_b, diff_m)."
        )
    if quantised:
        raise ValueError(f"{source}: {listed(quantised)}. Give a file in bf16, fp16 or fp32, not a quantised one.")
    for layer, parts in layers.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(f"{source}: {layer} needs a down and an up matrix; the file has {', '.join(parts)}.")
        down, up = parts["down"].flatten(1), parts["up"].flatten(1)
        rank = len(down)
        if up.shape[1] != rank:
            raise ValueError(f"{source}: {layer} has a down matrix of rank {rank} and an up matrix of {up.shape[1]}.")
        name = dit_name(f"{layer}.weight")
        changes[name] = changes.get(name, 0) + parts.get("alpha", torch.tensor(rank)) / rank * (up @ down)
    return changes
