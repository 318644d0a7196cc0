"""Names there and back, for every shape that we build, and the tables of the full-size models."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

from acetate.formats.names import dit_name, original_dit_name, original_layer, original_vae_name, vae_name

# Of Wan2.1_VAE.pth
VAE_TENSORS = {
    "encoder.conv1.weight": (96, 3, 3, 3, 3),
    "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
    "encoder.downsamples.3.residual.2.weight": (192, 96, 3, 3, 3),
    "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
    "encoder.downsamples.6.shortcut.weight": (384, 192, 1, 1, 1),
    "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
    "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
    "encoder.downsamples.8.time_conv.bias": (384,),
    "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
    "encoder.middle.1.norm.gamma": (384, 1, 1),
    "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
    "encoder.head.0.gamma": (384, 1, 1, 1),
    "encoder.head.2.weight": (32, 384, 3, 3, 3),
    "conv1.weight": (32, 32, 1, 1, 1),
    "conv2.weight": (16, 16, 1, 1, 1),
    "decoder.conv1.weight": (384, 16, 3, 3, 3),
    "decoder.middle.2.residual.6.bias": (384,),
    "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
    "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
    "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
    "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
    "decoder.upsamples.14.residual.6.weight": (96, 96, 3, 3, 3),
    "decoder.head.2.weight": (3, 96, 3, 3, 3),
}
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
        original_vae_name("decoder.up_blocks.0.upsamplers.0.time_conv.bias", 1) == "decoder.upsamples.2.time_conv.bias"
    )
    assert original_vae_name("decoder.up_blocks.1.resnets.1.norm2.gamma", 1) == "decoder.upsamples.4.residual.3.gamma"
    assert vae_name("decoder.upsamples.3.shortcut.bias", 1) == "decoder.up_blocks.1.resnets.0.conv_shortcut.bias"


def test_every_dit_tensor_there_and_back(make_transformer):
    transformer = make_transformer()
    state = named(transformer, original_dit_name)
    assert convert_wan_transformer_to_diffusers(dict(state)).keys() == transformer.state_dict().keys()
    assert all(convert_wan_transformer_to_diffusers({original: 0}) == {dit_name(original): 0} for original in state)
    assert original_dit_name("blocks.11.norm2.weight") == "blocks.11.norm3.weight"
    assert original_layer("blocks.3.attn2.to_out.0") == "blocks.3.cross_attn.o"


@pytest.mark.parametrize("name", ["decoder.up_blocks.0.resnets.0.conv3.weight", "encoder.extra", "middle.0.weight"])
def test_unknown_vae_names(name):
    with pytest.raises(ValueError, match=r"not a tensor of Wan2\.1's VAE"):
        original_vae_name(name)


@pytest.mark.parametrize("name", ["blocks.0.attn2.add_k_proj.weight", "proj_in.weight"])
def test_unknown_dit_names(name):
    with pytest.raises(ValueError, match=r"not a tensor of Wan2\.1's DiT"):
        original_dit_name(name)


def test_full_size_vae():
    with torch.device("meta"):
        state = named(AutoencoderKLWan(), original_vae_name)
    assert len(state) == 194
    assert sum(value.numel() for value in state.values()) == 126_892_531
    assert {name: tuple(state[name].shape) for name in VAE_TENSORS} == VAE_TENSORS
    assert [name for name in state if "decoder" in name and "shortcut.weight" in name] == [
        "decoder.upsamples.4.shortcut.weight"
    ]


@pytest.mark.parametrize("size", DITS)
def test_full_size_dit(size):
    layers, heads, ffn, tensors, parameters = DITS[size]
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_layers=layers, num_attention_heads=heads, ffn_dim=ffn)
    state, d = named(transformer, original_dit_name), 128 * heads
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters
    shapes = {
        "patch_embedding.weight": (d, 16, 1, 2, 2),
        "text_embedding.0.weight": (d, 4096),
        "time_embedding.0.weight": (d, 256),
        "time_projection.1.weight": (6 * d, d),
        f"blocks.{layers - 1}.modulation": (1, 6, d),
        f"blocks.{layers - 1}.self_attn.norm_q.weight": (d,),
        "blocks.0.cross_attn.o.bias": (d,),
        "blocks.0.norm3.weight": (d,),
        "blocks.0.ffn.0.weight": (ffn, d),
        "blocks.0.ffn.2.weight": (d, ffn),
        "head.modulation": (1, 2, d),
        "head.head.weight": (64, d),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
