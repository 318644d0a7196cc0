"""The released files of Wan-Alpha: the VAE training checkpoint and the DiT's DoRA."""

import re

from torch import Tensor

from acetate.formats.names import dit_name, vae_name

DECODERS = {"vae_fgr": "decoder_rgb", "vae_pha": "decoder_alpha"}
LORA_KEY = re.compile(r"(vae_fgr|vae_pha)\.decoder\.(?P<path>.+?)(\.conv3D)?\.lora_(?P<matrix>[AB])(\.\w+)?\.weight")
DORA_KEY = re.compile(r"(diffusion_model\.)?(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.\w+)?\.weight")
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
            conv = vae_name(f"decoder.{match['path']}.weight").removeprefix("decoder.").removesuffix(".weight")
            decoder = DECODERS[match[1]]
            tensor = value.flatten(1) if match["matrix"] == "B" else value  # B is 1x1(x1) there
            state[f"{decoder}.net.{conv}.parametrizations.weight.0.{match['matrix']}"] = tensor
    return state


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
        layer = dit_name(f"{match['layer']}.weight").removesuffix(".weight")
        state[f"{layer}.lora_{match['part']}.default.weight"] = value
    return state
