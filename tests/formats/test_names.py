"""Names there and back, for every shape that we build, and the tables of the full-size models."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)

from acetate.blank import blank_transformer
from acetate.formats.names import (
    dit_name,
    original_dit_name,
    original_layer,
    original_vae_name,
    vae_name,
)
from acetate.models.experts import PARTS


def conv(name, out, *rest):
    return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}


def residual(name, into, out):
    shortcut = conv(f"{name}.shortcut", out, into, 1, 1, 1) if into != out else {}
    return {
        f"{name}.residual.0.gamma": (into, 1, 1, 1), **conv(f"{name}.residual.2", out, into, 3, 3,
        3),
        f"{name}.residual.3.gamma": (out, 1, 1, 1), **conv(f"{name}.residual.6", out, out, 3, 3, 3),
        **shortcut,
    }  # fmt: skip


def coder(name, into, first, last, out):
    return {
        **conv(f"{name}.conv1", first, into, 3, 3, 3), **residual(f"{name}.middle.0", 384, 384),
        f"{name}.middle.1.norm.gamma": (384, 1, 1), **conv(f"{name}.middle.1.to_qkv", 1152, 384, 1,
        1),
        **conv(f"{name}.middle.1.proj", 384, 384, 1, 1), **residual(f"{name}.middle.2", 384, 384),
        f"{name}.head.0.gamma": (last, 1, 1, 1), **conv(f"{name}.head.2", out, last, 3, 3, 3),
    }  # fmt: skip


def wan21_vae():
    """Every tensor of Wan2.1_VAE.pth and its shape."""
    table = {**conv("conv1", 32, 32, 1, 1, 1), **conv("conv2", 16, 16, 1, 1, 1)}
    table |= coder("encoder", 3, 96, 384, 32) | coder("decoder", 16, 384, 96, 3)
    sides = {0: (96, 96), 1: (96, 96), 3: (96, 192), 4: (192, 192), 6: (192, 384), 7: (384, 384),
        9: (384, 384),
             10: (384, 384)}  # fmt: skip
    for place, (into, out) in sides.items():
        table |= residual(f"encoder.downsamples.{place}", into, out)
    for place, width in {2: 96, 5: 192, 8: 384}.items():
        table |= conv(f"encoder.downsamples.{place}.resample.1", width, width, 3, 3)
        table |= (
            conv(f"encoder.downsamples.{place}.time_conv", width, width, 3, 1, 1)
            if place > 2
            else {}
        )
    for place in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14):
        width = (384, 384, 192, 96)[place // 4]
        table |= residual(f"decoder.upsamples.{place}", 192 if place == 4 else width, width)
    for place, width in {3: 384, 7: 384, 11: 192}.items():
        table |= conv(f"decoder.upsamples.{place}.resample.1", width // 2, width, 3, 3)
        table |= (
            conv(f"decoder.upsamples.{place}.time_conv", 768, 384, 3, 1, 1) if place < 11 else {}
        )
    return table


def wan21_dit(layers, d, ffn, text=4096, freq=256):
    """Every tensor of a text-to-video DiT and its shape."""
    table = {**conv("patch_embedding", d, 16, 1, 2, 2), **conv("text_embedding.0", d, text),
             **conv("text_embedding.2", d, d), **conv("time_embedding.0", d, freq),
             **conv("time_embedding.2", d, d),
             **conv("time_projection.1", 6 * d, d), **conv("head.head", 64, d),
             "head.modulation": (1, 2, d)}  # fmt: skip
    for block in (f"blocks.{index}" for index in range(layers)):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                table |= conv(f"{block}.{attention}.{part}", d, d)
            table |= {f"{block}.{attention}.norm_{part}.weight": (d,) for part in "qk"}
        table |= {f"{block}.modulation": (1, 6, d), **conv(f"{block}.norm3", d)}
        table |= conv(f"{block}.ffn.0", ffn, d) | conv(f"{block}.ffn.2", d, ffn)
    return table


def diffusers_dit(layers, d, ffn):
    """The same as diffusers names them."""
    embedder = "condition_embedder"
    table = {**conv("patch_embedding", d, 16, 1, 2, 2), **conv("proj_out", 64, d),
             **conv(f"{embedder}.time_embedder.linear_1", d, 256),
             **conv(f"{embedder}.time_embedder.linear_2", d, d),
             **conv(f"{embedder}.time_proj", 6 * d, d),
             **conv(f"{embedder}.text_embedder.linear_1", d, 4096),
             **conv(f"{embedder}.text_embedder.linear_2", d, d),
             "scale_shift_table": (1, 2, d)}  # fmt: skip
    for block in (f"blocks.{index}" for index in range(layers)):
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                table |= conv(f"{block}.{attention}.{part}", d, d)
            table |= {f"{block}.{attention}.norm_{part}.weight": (d,) for part in "qk"}
        table |= {f"{block}.scale_shift_table": (1, 6, d), **conv(f"{block}.norm2", d)}
        table |= conv(f"{block}.ffn.net.0.proj", ffn, d) | conv(f"{block}.ffn.net.2", d, ffn)
    return table


# Of either expert of Wan2.2's T2V-A14B: transformer/ and transformer_2/config.json of its
# diffusers release, and high_noise_model/config.json of the original one
A14B = {
    "patch_size": [1, 2, 2], "num_attention_heads": 40, "attention_head_dim": 128,
    "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824,
    "num_layers": 40, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
    "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}  # fmt: skip
ORIGINAL_A14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "in_dim": 16}


def wan21_i2v(d, ffn, clip, layers=40, **widths):
    """Every tensor of an image-to-video DiT; clip: width of the embedding that Wan2.1's reads, none
    for Wan2.2's."""
    table = wan21_dit(layers, d, ffn, **widths) | conv("patch_embedding", d, 36, 1, 2, 2)
    if clip is None:
        return table
    table |= {f"img_emb.proj.{place}.{kind}": (width,)
              for place, width in ((0, clip), (4, d)) for kind in ("weight", "bias")}  # fmt: skip
    table |= conv("img_emb.proj.1", clip, clip) | conv("img_emb.proj.3", d, clip)
    for block in range(layers):
        for part in ("k_img", "v_img"):
            table |= conv(f"blocks.{block}.cross_attn.{part}", d, d)
        table[f"blocks.{block}.cross_attn.norm_k_img.weight"] = (d,)
    return table


# as diffusers' scripts/convert_wan_to_diffusers.py has Wan-I2V-14B-480p and Wan2.2-I2V-14B-720p;
# wan/modules/model.py has the layers: MLPProj, WanI2VCrossAttention
I2V = {
    "Wan2.1": (
        {"image_dim": 1280, "added_kv_proj_dim": 5120}, 1280, "Wan2.1-I2V-14B-480P-Diffusers",
    ),
    "Wan2.2": ({}, None, "Wan2.2-I2V-A14B-Diffusers"),
}  # fmt: skip

DITS = {  # layers, heads, width of the feed-forward part, tensors, parameters
    "1.3B": (30, 12, 8960, 825, 1_418_996_800),
    "14B": (40, 40, 13824, 1095, 14_288_491_584),
}


def named(module, name_of):
    state = {name_of(name): value for name, value in module.state_dict().items()}
    assert len(state) == len(module.state_dict())
    return state


@pytest.mark.parametrize("layout", ["wan21", "tiny"])
def test_every_vae_tensor_there_and_back(make_vae, layout):
    vae = make_vae(layout)
    blocks = vae.config.num_res_blocks
    for name in vae.state_dict():
        assert vae_name(original_vae_name(name, blocks), blocks) == name


def test_the_vae_names_are_those_that_diffusers_converts(make_vae):
    vae = make_vae("wan21")
    state = named(vae, original_vae_name)
    assert convert_wan_vae_to_diffusers(dict(state)).keys() == vae.state_dict().keys()
    for original in state:  # our own arithmetic of places agrees with its table
        assert convert_wan_vae_to_diffusers({original: 0}) == {vae_name(original): 0}


def test_places_of_another_decoder():
    """Two stages of one residual block and one more, then an upsampling: 0, 1, 2 and 3, 4."""
    assert (
        original_vae_name("decoder.up_blocks.0.upsamplers.0.time_conv.bias", 1)
        == "decoder.upsamples.2.time_conv.bias"
    )
    assert (
        original_vae_name("decoder.up_blocks.1.resnets.1.norm2.gamma", 1)
        == "decoder.upsamples.4.residual.3.gamma"
    )
    assert (
        vae_name("decoder.upsamples.3.shortcut.bias", 1)
        == "decoder.up_blocks.1.resnets.0.conv_shortcut.bias"
    )


def test_every_dit_tensor_there_and_back(make_transformer):
    transformer = make_transformer()
    state = named(transformer, original_dit_name)
    assert (
        convert_wan_transformer_to_diffusers(dict(state)).keys() == transformer.state_dict().keys()
    )
    assert all(
        convert_wan_transformer_to_diffusers({original: 0}) == {dit_name(original): 0}
        for original in state
    )
    assert original_dit_name("blocks.11.norm2.weight") == "blocks.11.norm3.weight"
    assert original_layer("blocks.3.attn2.to_out.0") == "blocks.3.cross_attn.o"


@pytest.mark.parametrize(
    "name", ["decoder.up_blocks.0.resnets.0.conv3.weight", "encoder.extra", "middle.0.weight"]
)
def test_unknown_vae_names(name):
    with pytest.raises(ValueError, match=r"not a tensor of Wan2\.1's VAE"):
        original_vae_name(name)


@pytest.mark.parametrize("name", ["blocks.0.attn2.add_q_proj.weight", "proj_in.weight"])
def test_unknown_dit_names(name):
    with pytest.raises(ValueError, match=r"not a tensor of Wan2\.1's DiT"):
        original_dit_name(name)


def test_full_size_vae():
    with torch.device("meta"):
        state = named(AutoencoderKLWan(), original_vae_name)
    assert len(state) == 194
    assert sum(value.numel() for value in state.values()) == 126_892_531
    assert {name: tuple(value.shape) for name, value in state.items()} == wan21_vae()


@pytest.mark.parametrize("size", DITS)
def test_full_size_dit(size):
    layers, heads, ffn, tensors, parameters = DITS[size]
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_layers=layers, num_attention_heads=heads, ffn_dim=ffn
        )
    state, d = named(transformer, original_dit_name), 128 * heads
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters
    assert {name: tuple(value.shape) for name, value in state.items()} == wan21_dit(layers, d, ffn)


def test_full_size_experts():
    """Both layouts of Wan2.2's T2V-A14B, and what we build for either expert without files."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(A14B)
    layers, d, ffn = (ORIGINAL_A14B[name] for name in ("num_layers", "dim", "ffn_dim"))
    assert d == 128 * ORIGINAL_A14B["num_heads"]
    state = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    assert state == diffusers_dit(layers, d, ffn)
    theirs = {name: tuple(x.shape) for name, x in named(transformer, original_dit_name).items()}
    assert theirs == wan21_dit(layers, d, ffn)
    assert theirs["patch_embedding.weight"][1] == ORIGINAL_A14B["in_dim"]
    assert convert_wan_transformer_to_diffusers(dict(theirs)) == state
    for part in PARTS.values():
        built = blank_transformer("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch.bfloat16, part)
        assert {name: tuple(x.shape) for name, x in built.state_dict().items()} == state


@pytest.mark.parametrize("release", I2V)
def test_full_size_image_to_video_dit(release):
    more, clip, source = I2V[release]
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_layers=40, num_attention_heads=40, ffn_dim=13824, in_channels=36, out_channels=16,
            **more,
        )  # fmt: skip
    state = named(transformer, original_dit_name)
    assert {name: tuple(value.shape) for name, value in state.items()} == wan21_i2v(
        5120, 13824, clip
    )
    built = blank_transformer(f"Wan-AI/{source}", torch.bfloat16).state_dict()
    shapes = {name: value.shape for name, value in transformer.state_dict().items()}
    assert {name: value.shape for name, value in built.items()} == shapes
    assert all(dit_name(original_dit_name(name)) == name for name in transformer.state_dict())
    assert convert_wan_transformer_to_diffusers(dict(state)).keys() == set(transformer.state_dict())
