"""Translates the released files of Wan-Alpha: the VAE training checkpoint and the DiT's DoRA."""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from acetate.formats.names import RES_BLOCKS, dit_name, original_layer, original_vae_name, vae_name
from acetate.models.adapters import listed
from acetate.models.loading import renamed

DECODERS = {"vae_fgr": "decoder_rgb", "vae_pha": "decoder_alpha"}
LORA_KEY = re.compile(
    r"(vae_fgr|vae_pha)\.decoder\.(?P<path>.+?)(\.conv3D)?\.lora_(?P<matrix>[AB])(\.\w+)?\.weight"
)
DORA_KEY = re.compile(
    r"(diffusion_model\.|pipe\.dit\.)?(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.\w+)?\.weight"
)
WRAPPED = re.compile(r"(?P<prefix>(?:\w+\.)*?)vae_(?:fgr|pha)\.decoder\..*\.lora_[AB]\.")
# of the training module
MODULES = ("vae_fgr.", "vae_pha.", "middle.", "perceptual_loss.", "sobel_edge_loss.", "pipe.")
RESIDUAL_PARTS = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
MERGE_PARTS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
OUR_LORA_KEY = re.compile(
    r"(decoder_rgb|decoder_alpha)\.net\.(.+)\.parametrizations\.weight\.0\.([AB])"
)


def unwrapped(held: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Returns the VAE's training checkpoint or decoder.bin without the prefix that a wrapper put
    before all of its names.

    Raises ValueError for a file without decoder LoRA, for one with two such prefixes, and for
    tensors of no part of the released training module.
    """
    found = {match["prefix"] for name in held if (match := WRAPPED.match(name))}
    if len(found) != 1:
        prefixes = f" under {len(found)} prefixes ({listed(sorted(found))})" if found else ""
        wan = "decoder.conv1.weight" in held
        hint = (
            "It is one whole Wan VAE; of ComfyUI's pair give both: rgba_vae=[RGB,ALPHA]."
            if wan
            else "Give another."
        )
        raise ValueError(
            f"{source}: {'several' if found else 'no'} decoder LoRAs{prefixes}; Wan-Alpha's VAE "
            f"files hold vae_fgr.decoder.*.lora_A and vae_pha's. {hint}"
        )
    (prefix,) = found
    if foreign := [
        name for name in held if not name.startswith(tuple(prefix + part for part in MODULES))
    ]:
        raise ValueError(
            f"{source}: {len(foreign)} not used: {listed(foreign)}. Wan-Alpha's VAE files hold "
            f"{', '.join(MODULES)} and nothing else."
        )
    return {name.removeprefix(prefix): value for name, value in held.items()}


def trainable_from_wan_alpha(
    flat: dict[str, Tensor], res_blocks: int = RES_BLOCKS, source: str = "the VAE file"
) -> dict[str, Tensor]:
    """Translates the released flat training checkpoint into RGBAVAE's trainable parameters.

    Takes the merge block (`middle.*`) and both decoders' LoRA; frozen tensors in the file are Wan's
    own and left out. The reference scales LoRA by alpha / rank with alpha 1: build RGBAVAE with
    lora_alpha=1. res_blocks: of the base VAE's config; source: named by errors. Raises ValueError
    for LoRA or merge keys that have no place here.
    """
    ours = [key for key in flat if key.startswith("middle.") or ".lora_" in key]
    names = _placed(ours, lambda key: _trainable_name(key, res_blocks), source)
    if flattened := [key for key in ours if ".lora_" in key and flat[key].ndim < 2]:
        raise ValueError(
            f"{source}: {listed(flattened)}: a LoRA matrix has two dimensions or more. Fetch it "
            "anew."
        )
    # B is 1x1(x1) there
    return {
        name: flat[key].flatten(1) if name.endswith(".B") else flat[key]
        for name, key in names.items()
    }


def _placed(
    keys: Iterable[str], name_of: Callable[[str], str | None], source: str
) -> dict[str, str]:
    """Returns our name -> theirs. Raises ValueError for all keys without one, and for two keys of
    one name."""
    names = {key: name_of(key) for key in keys}
    if foreign := [key for key, name in names.items() if name is None]:
        raise ValueError(
            f"{source}: {listed(foreign)}: names that Wan-Alpha does not use for what it trains."
        )
    return renamed(names, lambda key: str(names[key]))


def _trainable_name(key: str, res_blocks: int) -> str | None:
    if key.startswith("middle."):
        return _merge_name(key)
    match = LORA_KEY.fullmatch(key)
    if match is None:
        return None
    conv = (
        vae_name(f"decoder.{match['path']}.weight", res_blocks)
        .removeprefix("decoder.")
        .removesuffix(".weight")
    )
    return f"{DECODERS[match[1]]}.net.{conv}.parametrizations.weight.0.{match['matrix']}"


def _merge_name(key: str) -> str | None:
    """Translates `middle.block.*` to `merge.*`; residual blocks stand at even places, attention at
    odd ones."""
    place = key.removeprefix("middle.block.")
    for old, new in MERGE_PARTS.items():
        if place.startswith(f"{old}."):
            return f"merge.{new}.{place.removeprefix(f'{old}.')}"
    if match := re.fullmatch(r"middle\.(\d+)\.residual\.([0236])\.(\w+)", place):
        return f"merge.blocks.resnets.{int(match[1]) // 2}.{RESIDUAL_PARTS[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"middle\.(\d+)\.((norm|to_qkv|proj)\.\w+)", place):
        return f"merge.blocks.attentions.{int(match[1]) // 2}.{match[2]}"
    return None


def trainable_to_wan_alpha(
    state: dict[str, Tensor], lora_alpha: float, res_blocks: int = RES_BLOCKS
) -> dict[str, Tensor]:
    """Translates RGBAVAE's trainable parameters into the released flat training checkpoint:
    `trainable_from_wan_alpha` backwards.

    lora_alpha: what they were trained with; it goes into B, since every released reader scales by 1
    / rank. Raises ValueError for a tensor that has no place there.
    """
    flat: dict[str, Tensor] = {}
    released = {ours: theirs for theirs, ours in DECODERS.items()}
    for name, value in state.items():
        if name.startswith("merge."):
            flat[_released_merge_name(name)] = value
            continue
        match = OUR_LORA_KEY.fullmatch(name)
        if match is None:
            raise ValueError(f"{name}: no trained tensor of an RGBA-VAE.")
        decoder, conv, matrix = match.groups()
        kernel = state[f"{name[:-1]}A"].ndim - 2
        place = original_vae_name(f"decoder.{conv}.weight", res_blocks).removesuffix(".weight")
        # the released class wraps its causal convolutions
        place += ".conv3D" if kernel == 3 else ""
        if matrix == "B":
            value = (lora_alpha * value).view(*value.shape, *[1] * kernel)
        flat[f"{released[decoder]}.{place}.lora_{matrix}.default.weight"] = value
    return flat


def _released_merge_name(name: str) -> str:
    """Inverts `_merge_name`."""
    place = name.removeprefix("merge.")
    for old, new in MERGE_PARTS.items():
        if place.startswith(f"{new}."):
            return f"middle.block.{old}.{place.removeprefix(f'{new}.')}"
    _, kind, index, rest = place.split(".", 3)
    if kind == "attentions":
        return f"middle.block.middle.{2 * int(index) + 1}.{rest}"
    part, parameter = rest.split(".")
    number = {part: number for number, part in RESIDUAL_PARTS.items()}[part]
    return f"middle.block.middle.{2 * int(index)}.residual.{number}.{parameter}"


def decoder_of(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the part of a flat training checkpoint that the released inference reads
    (decoder.bin): the decoders' LoRA."""
    return {
        name: value
        for name, value in flat.items()
        if name.startswith(tuple(f"{part}." for part in DECODERS))
    }


def is_dora(names: Iterable[str]) -> bool:
    """Returns whether a file with these tensors is a released DoRA."""
    return any(re.search(r"(self|cross)_attn\.[qkvo]\.lora_A", name) for name in names)


def rank_of(adapters: dict[str, Tensor]) -> int:
    """Returns the rank of adapters, which a released file does not say."""
    return next(len(value) for name, value in adapters.items() if ".lora_A." in name)


def dora_from_wan_alpha(
    flat: dict[str, Tensor], source: str = "the DoRA file"
) -> dict[str, Tensor]:
    """Translates the released t2v.safetensors into PEFT's names on the diffusers DiT, for
    `models.dit.add_dora` with alpha = rank.

    source: named by errors. Raises ValueError for keys that are no DoRA tensors, and for one tensor
    under two names.
    """
    return {name: flat[key] for name, key in _placed(flat, _dora_name, source).items()}


def _dora_name(key: str) -> str | None:
    match = DORA_KEY.fullmatch(key)
    if match is None:
        return None
    layer = dit_name(f"{match['layer']}.weight").removesuffix(".weight")
    return f"{layer}.lora_{match['part']}.default.weight"


def dora_to_wan_alpha(state: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Translates PEFT's DoRA on the diffusers DiT into the released t2v.safetensors, bf16:
    `dora_from_wan_alpha` backwards.

    scaling: alpha / rank; it goes into B, since the released loader has no such factor. Raises
    ValueError for a tensor that is no DoRA.
    """
    flat: dict[str, Tensor] = {}
    for layer, part, value in dora_parts(state):
        value = scaling * value if part == "B" else value
        flat[f"{layer}.lora_{part}.default.weight"] = value.to(torch.bfloat16)
    return flat


def dora_parts(state: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (original layer, A or B or magnitude_vector, tensor) of PEFT's DoRA on the diffusers
    DiT."""
    for name, value in state.items():
        match = DORA_KEY.fullmatch(name)
        if match is None:
            raise ValueError(f"{name}: no DoRA tensor under PEFT's names.")
        yield original_layer(match["layer"]), match["part"], value
