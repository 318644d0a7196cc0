"""Tiny modules under the names of the files that others released: Wan2.1's own, and Wan-Alpha's."""

import re

from torch import Tensor, nn

RESIDUAL = {
    "norm1.": "residual.0.",
    "conv1.": "residual.2.",
    "norm2.": "residual.3.",
    "conv2.": "residual.6.",
}
TRANSFORMER = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".norm2.": ".norm3.",
    "proj_out": "head.head",
}
UMT5 = {
    "SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "0.SelfAttention.": "0.attn.",
    "layer.0.layer_norm": "norm1",
    "layer.1.layer_norm": "norm2",
    "DenseReluDense.wi_0": "ffn.gate.0",
    "DenseReluDense.wi_1": "ffn.fc1",
    "DenseReluDense.wo": "ffn.fc2",
    "encoder.block.": "blocks.",
    "layer.0.": "",
    "layer.1.": "",
    "shared.": "token_embedding.",
    "encoder.final_layer_norm.": "norm.",
}
MERGE = {
    "merge.conv_in.": "middle.block.conv1.",
    "merge.norm_out.": "middle.block.head.0.",
    "merge.conv_out.": "middle.block.head.2.",
    "merge.blocks.resnets.0.": "middle.block.middle.0.residual.",
    "merge.blocks.attentions.0.": "middle.block.middle.1.",
    "merge.blocks.resnets.1.": "middle.block.middle.2.residual.",
    "merge.blocks.attentions.1.": "middle.block.middle.3.",
    "merge.blocks.resnets.2.": "middle.block.middle.4.residual.",
    **{f"residual.{ours}": theirs for ours, theirs in RESIDUAL.items()},
}


def replaced(name: str, parts: dict[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def original_vae_name(name: str, res_blocks: int = 2) -> str:
    """Of Wan2.1_VAE.pth, where every stage of the decoder has res_blocks + 1 residual blocks and a
    resampling."""
    name = replaced(name, {f".{ours}": f".{theirs}" for ours, theirs in RESIDUAL.items()})
    name = name.replace("post_quant_conv.", "conv2.").replace("quant_conv.", "conv1.")
    for coder in ("encoder", "decoder"):
        name = name.replace(f"{coder}.conv_in.", f"{coder}.conv1.").replace(
            f"{coder}.norm_out.", f"{coder}.head.0."
        )
        name = name.replace(f"{coder}.conv_out.", f"{coder}.head.2.")
    name = name.replace("mid_block.resnets.0.", "middle.0.").replace(
        "mid_block.resnets.1.", "middle.2."
    )
    name = name.replace("mid_block.attentions.0.", "middle.1.").replace(
        "conv_shortcut.", "shortcut."
    )
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.+)", name):
        stage, kind, index, rest = match.groups()
        place = (res_blocks + 2) * int(stage) + (
            int(index) if kind == "resnets" else res_blocks + 1
        )
        name = f"decoder.upsamples.{place}.{rest}"
    return name


def original_vae_state(vae: nn.Module) -> dict[str, Tensor]:
    return {
        original_vae_name(name, vae.config.num_res_blocks): v
        for name, v in vae.state_dict().items()
    }


def original_transformer_state(transformer: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, value in transformer.state_dict().items():
        name = replaced(name, TRANSFORMER)
        name = (
            "head.modulation"
            if name == "scale_shift_table"
            else name.replace("scale_shift_table", "modulation")
        )
        state[name] = value
    return state


def original_umt5_state(model: nn.Module) -> dict[str, Tensor]:
    """Names of models_t5_umt5-xxl-enc-bf16.pth."""
    state = {replaced(name, UMT5): value.contiguous() for name, value in model.state_dict().items()}
    del state["encoder.embed_tokens.weight"]  # the same matrix as token_embedding
    return state


def wan_alpha_state(vae: nn.Module, res_blocks: int = 2) -> dict[str, Tensor]:
    """An RGBAVAE as the released flat training checkpoint: merge block, LoRA, and the frozen
    weights under them."""
    state = {}
    for name, value in vae.state_dict().items():
        if name.startswith("merge."):
            state[replaced(name, MERGE)] = value
        match = re.fullmatch(
            r"decoder_(rgb|alpha)\.net\.(.+)\.parametrizations\.weight\.(original|0\.A|0\.B)", name
        )
        if match is None:
            continue
        part = {"rgb": "vae_fgr", "alpha": "vae_pha"}[match[1]]
        conv = original_vae_name(f"decoder.{match[2]}.weight", res_blocks).removesuffix(".weight")
        kernel = vae.state_dict()[name.rpartition("weight.")[0] + "weight.original"].ndim - 2
        layer = f"{part}.{conv}" + (".conv3D" if kernel == 3 else "")
        if match[3] == "original":
            state[f"{layer}.base_layer.weight"] = value
        elif match[3] == "0.A":
            state[f"{layer}.lora_A.default.weight"] = value
        else:
            state[f"{layer}.lora_B.default.weight"] = value.view(*value.shape, *[1] * kernel)
    return {name: value.detach().clone().contiguous() for name, value in state.items()}
