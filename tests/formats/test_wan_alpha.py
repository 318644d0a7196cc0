import pytest
import torch
from torch.testing import assert_close

from acetate.formats.wan_alpha import dora_from_wan_alpha, trainable_from_wan_alpha
from acetate.models.adapters import check_fit, trainable_state
from acetate.models.rgba_vae import RGBAVAE
from tests.original import MERGE, replaced


@pytest.fixture(scope="module")
def trainable(make_vae):
    return trainable_state(RGBAVAE(vae=make_vae(), merge_init="scratch", lora_rank=2, lora_alpha=1.0))


def test_the_whole_merge_block_has_a_place(trainable):
    merge = {name: value for name, value in trainable.items() if name.startswith("merge.")}
    flat = {replaced(name, MERGE): value for name, value in merge.items()}
    assert all(name.startswith("middle.block.") for name in flat)
    converted = trainable_from_wan_alpha(flat)
    check_fit(merge, converted, "released merge block")
    for name, value in converted.items():
        assert value is merge[name]


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        ("vae_fgr.decoder.conv1.conv3D.lora_A.default.weight", "decoder_rgb.net.conv_in"),
        ("vae_fgr.decoder.conv1.lora_A.weight", "decoder_rgb.net.conv_in"),
        ("vae_pha.decoder.middle.1.to_qkv.lora_A.default.weight", "decoder_alpha.net.mid_block.attentions.0.to_qkv"),
        (
            "vae_pha.decoder.upsamples.4.shortcut.conv3D.lora_A.default.weight",
            "decoder_alpha.net.up_blocks.1.resnets.0.conv_shortcut",
        ),
        (
            "vae_fgr.decoder.upsamples.3.time_conv.conv3D.lora_A.default.weight",
            "decoder_rgb.net.up_blocks.0.upsamplers.0.time_conv",
        ),
        (
            "vae_fgr.decoder.upsamples.11.resample.1.lora_A.default.weight",
            "decoder_rgb.net.up_blocks.2.upsamplers.0.resample.1",
        ),
        ("vae_pha.decoder.head.2.conv3D.lora_A.default.weight", "decoder_alpha.net.conv_out"),
    ],
)
def test_lora_names(trainable, released, ours):
    (name,) = trainable_from_wan_alpha({released: torch.zeros(2, 3, 1, 1, 1)})
    assert name == f"{ours}.parametrizations.weight.0.A"
    assert name in trainable


def test_lora_b_loses_its_kernel_of_one():
    value = torch.arange(6.0).view(3, 2, 1, 1, 1)
    for kernel in ((1, 1, 1), (1, 1)):
        state = trainable_from_wan_alpha({"vae_fgr.decoder.conv1.lora_B.default.weight": value.view(3, 2, *kernel)})
        assert_close(state["decoder_rgb.net.conv_in.parametrizations.weight.0.B"], value.view(3, 2))


def test_frozen_tensors_are_left_out():
    frozen = ("vae.encoder.conv1.weight", "vae_fgr.decoder.conv1.conv3D.weight", "dit.blocks.0.norm3.weight")
    assert trainable_from_wan_alpha(dict.fromkeys(frozen, torch.zeros(1))) == {}


@pytest.mark.parametrize(
    "key",
    [
        "vae_fgr.encoder.conv1.conv3D.lora_A.default.weight",
        "vae_shadow.decoder.conv1.conv3D.lora_A.default.weight",
        "vae_fgr.decoder.conv1.lora_C.default.weight",
        "middle.block.conv3.weight",
        "middle.block.middle.1.to_out.weight",
        "middle.block.middle.0.residual.5.weight",
    ],
)
def test_keys_without_a_place_are_errors(key):
    with pytest.raises(ValueError, match=key):
        trainable_from_wan_alpha({key: torch.zeros(2, 2)})


LAYER = "blocks.1.cross_attn.o"
PARTS = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2), "lora_magnitude_vector": torch.ones(3)}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "pipe.dit."])
@pytest.mark.parametrize("adapter", [".default", ""])
def test_dora_names(prefix, adapter):
    flat = {f"{prefix}{LAYER}.{part}{adapter}.weight": value for part, value in PARTS.items()}
    assert dora_from_wan_alpha(flat) == {f"blocks.1.attn2.to_out.0.{p}.default.weight": v for p, v in PARTS.items()}


def test_dora_keys_without_a_place():
    flat = {f"{LAYER}.dora_scale": torch.ones(3, 1), f"{LAYER}.alpha": torch.ones(1)}
    with pytest.raises(ValueError, match=rf"t2v: {LAYER}\.dora_scale, {LAYER}\.alpha: names that Wan-Alpha does not"):
        dora_from_wan_alpha(flat, "t2v")
    twice = {f"{prefix}{LAYER}.lora_A.weight": torch.ones(2, 3) for prefix in ("", "diffusion_model.")}
    with pytest.raises(ValueError, match="the same tensor under two names"):
        dora_from_wan_alpha(twice)
