"""Weight formats that enter and leave. Key names and shapes of the released files: Wan-Alpha's VAE training code."""

import re

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from torch import Tensor

DECODERS = {"vae_fgr": "decoder_rgb", "vae_pha": "decoder_alpha"}
LORA_KEY = re.compile(r"(vae_fgr|vae_pha)\.decoder\.(?P<path>.+?)(\.conv3D)?\.lora_(?P<matrix>[AB])(\.\w+)?\.weight")
DORA_KEY = re.compile(r"(diffusion_model\.)?(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.\w+)?\.weight")
FEW_STEP_KEY = re.compile(
    r"(diffusion_model\.)?(?P<layer>.+?)\.(?P<part>lora_(down|up|A|B)\.weight|alpha|diff(_b|_m)?)"
)
FEW_STEP_PARTS = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
RESIDUAL_PARTS = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}


def trainable_from_wan_alpha(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released flat training checkpoint -> RGBAVAE's trainable parameters.

    Takes the merge block (`middle.*`) and both decoders' LoRA; frozen tensors in the file are Wan's own and left
    out. The reference scales LoRA by alpha / rank with alpha 1: build RGBAVAE with lora_alpha=1. Raises ValueError
    for a LoRA or merge key that has no place here.
    """
    state: dict[str, Tensor] = {}
    for key, value in flat.items():
        if key.startswith("middle."):
            state[_merge_name(key)] = value
        elif ".lora_" in key:
            match = LORA_KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"{key}: a LoRA tensor under a name that Wan-Alpha's VAE files do not use.")
            conv = _diffusers_name(f"decoder.{match['path']}.weight").removeprefix("decoder.").removesuffix(".weight")
            decoder = DECODERS[match[1]]
            tensor = value.flatten(1) if match["matrix"] == "B" else value  # B is 1x1(x1) there
            state[f"{decoder}.net.{conv}.parametrizations.weight.0.{match['matrix']}"] = tensor
    return state


def _diffusers_name(original: str) -> str:
    (name,) = convert_wan_vae_to_diffusers({original: None})
    return name


def _merge_name(key: str) -> str:
    """`middle.block.*` -> `merge.*`; residual blocks stand at even places, attention at odd ones."""
    place = key.removeprefix("middle.block.")
    fixed = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
    for old, new in fixed.items():
        if place.startswith(f"{old}."):
            return f"merge.{new}.{place.removeprefix(f'{old}.')}"
    if match := re.fullmatch(r"middle\.(\d+)\.residual\.([0236])\.(\w+)", place):
        return f"merge.blocks.resnets.{int(match[1]) // 2}.{RESIDUAL_PARTS[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"middle\.(\d+)\.((norm|to_qkv|proj)\.\w+)", place):
        return f"merge.blocks.attentions.{int(match[1]) // 2}.{match[2]}"
    raise ValueError(f"{key}: not a tensor of the merge block.")


def dora_from_wan_alpha(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released t2v.safetensors -> PEFT's names on the diffusers DiT, for `models.dit.add_dora` with alpha = rank.

    Raises ValueError for a key that is no DoRA tensor.
    """
    state: dict[str, Tensor] = {}
    for key, value in flat.items():
        match = DORA_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key}: not a DoRA tensor under the names that Wan-Alpha's DiT files use.")
        layer = _dit_name(f"{match['layer']}.weight").removesuffix(".weight")
        state[f"{layer}.lora_{match['part']}.default.weight"] = value
    return state


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
            changes[_dit_name(f"{layer}.{suffix}")] = value.float()
    for layer, parts in layers.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(f"{layer}: a LoRA needs its down and its up matrix; the file has {', '.join(parts)}.")
        rank = parts["down"].shape[0]
        name = _dit_name(f"{layer}.weight")
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


def _dit_name(original: str) -> str:
    (name,) = convert_wan_transformer_to_diffusers({original: None})
    return name
