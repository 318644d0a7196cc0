"""Few-step LoRA files in LightX2V's style, on the DiT."""

import re

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate.formats.names import dit_name

FEW_STEP_KEY = re.compile(
    r"(diffusion_model\.)?(?P<layer>.+?)\.(?P<part>lora_(down|up|A|B)\.weight|alpha|diff(_b|_m)?)"
)
FEW_STEP_PARTS = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}


@torch.no_grad()
def merge_few_step(transformer: WanTransformer3DModel, flat: dict[str, Tensor], strength: float = 1.0) -> int:
    """Adds a LightX2V-style file to the weights, in fp32; DoRA must be merged before. Returns the tensors changed.

    Takes lora_down/up or lora_A/B (times alpha / rank where the file has alpha), and differences of weights
    (.diff), biases (.diff_b) and modulation (.diff_m). Raises ValueError, and changes nothing, for a key that has no
    place in this DiT, or a tensor of another shape.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    changes: dict[str, Tensor] = {}
    for key, value in flat.items():
        match = FEW_STEP_KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{key}: not a tensor of a few-step LoRA (lora_down, lora_up, alpha, diff, diff_b, diff_m)."
            )
        layer, part = match["layer"], match["part"]
        if part in FEW_STEP_PARTS or part == "alpha":
            layers.setdefault(layer, {})[FEW_STEP_PARTS.get(part, part)] = value.float()
        else:
            suffix = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}[part]
            changes[dit_name(f"{layer}.{suffix}")] = value.float()
    for layer, parts in layers.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(f"{layer}: a LoRA needs its down and its up matrix; the file has {', '.join(parts)}.")
        rank = parts["down"].shape[0]
        name = dit_name(f"{layer}.weight")
        delta = (parts.get("alpha", torch.tensor(rank)) / rank) * (parts["up"].flatten(1) @ parts["down"].flatten(1))
        changes[name] = changes.get(name, 0) + delta
    target = dict(transformer.named_parameters())
    for name, change in changes.items():
        if name not in target or target[name].numel() != change.numel():
            place = f"is {tuple(target[name].shape)}" if name in target else "does not exist"
            raise ValueError(
                f"{name} {place} in this DiT, the few-step LoRA has {tuple(change.shape)}: another model's."
            )
    for name, change in changes.items():
        weight = target[name]
        weight.copy_(weight.float() + strength * change.view_as(weight).to(weight.device))
    return len(changes)
