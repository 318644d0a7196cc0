"""Translates names of Wan's tensors from diffusers' to the original release's."""

import re
from itertools import product

from acetate.models.loading import diffusers_dit_name as dit_name
from acetate.models.loading import diffusers_vae_name as vae_name

RES_BLOCKS = 2  # num_res_blocks of Wan2.1's VAE


def original_vae_name(name: str, res_blocks: int = RES_BLOCKS) -> str:
    """Inverts `vae_name`. Raises ValueError for a name that Wan2.1's VAE does not have."""
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
        place, part = int(match[1]), match[2]
        list_name = "encoder.downsamples"
    elif match := re.fullmatch(
        r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", name
    ):
        place, part = int(match[1]) * (res_blocks + 2), match[4]
        place += int(match[3]) if match[2] == "resnets" else res_blocks + 1
        list_name = "decoder.upsamples"
    else:
        return _known(name, VAE_OUTSIDE_BLOCKS, "VAE")
    return f"{list_name}.{place}.{_known(part, VAE_IN_BLOCKS, 'VAE')}"


def original_dit_name(name: str) -> str:
    """Inverts `dit_name`. Raises ValueError for a name that Wan2.1's text-to-video and
    image-to-video DiTs do not have."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        return f"blocks.{match[1]}.{_known(match[2], DIT_IN_BLOCKS, 'DiT')}"
    return _known(name, DIT_OUTSIDE_BLOCKS, "DiT")


def original_layer(layer: str) -> str:
    """Translates the name of a layer, as `original_dit_name` does that of its weight."""
    return original_dit_name(f"{layer}.weight").removesuffix(".weight")


def _known(name: str, names: dict[str, str], model: str) -> str:
    if name not in names:
        raise ValueError(f"{name}: not a tensor of Wan2.1's {model} under diffusers' names.")
    return names[name]


def _layers(*layers: str) -> list[str]:
    return [f"{layer}.{kind}" for layer, kind in product(layers, ("weight", "bias"))]


# diffusers -> original, from diffusers' own converters over every tensor that Wan2.1 has
RESIDUAL = ["residual.0.gamma", "residual.3.gamma", *_layers("residual.2", "residual.6")]
VAE_IN_BLOCKS = {
    vae_name(f"encoder.downsamples.0.{part}").removeprefix("encoder.down_blocks.0."): part
    for part in [*RESIDUAL, *_layers("shortcut", "resample.1", "time_conv")]
}
CODERS = ("encoder", "decoder")
CODER = [
    *_layers("conv1", "head.2", "middle.1.to_qkv", "middle.1.proj"), "head.0.gamma",
    "middle.1.norm.gamma",
    *(f"middle.{place}.{part}" for place, part in product((0, 2), RESIDUAL)),
]  # fmt: skip
VAE_OUTSIDE_BLOCKS = {
    vae_name(original): original
    for original in [*_layers("conv1", "conv2"), *(f"{coder}.{part}" for coder,
    part in product(CODERS, CODER))]
}  # fmt: skip
ATTENTION = [*_layers("q", "k", "v", "o"), "norm_q.weight", "norm_k.weight"]
DIT_IN_BLOCKS = {
    dit_name(f"blocks.0.{part}").removeprefix("blocks.0."): part
    for part in [
        *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in ATTENTION),
        *_layers("norm3", "ffn.0", "ffn.2"), "modulation",
        # of image-to-video models that read a CLIP embedding
        *_layers("cross_attn.k_img", "cross_attn.v_img"), "cross_attn.norm_k_img.weight",
    ]
}  # fmt: skip
DIT_OUTSIDE_BLOCKS = {
    dit_name(original): original
    for original in [
        *_layers("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0",
        "time_embedding.2",
                 "time_projection.1", "head.head"), "head.modulation",
        *_layers(*(f"img_emb.proj.{place}" for place in (0, 1, 3, 4))),
    ]
}  # fmt: skip
