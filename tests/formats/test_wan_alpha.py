from itertools import product
from math import prod

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch.testing import assert_close

from acetate.formats.wan_alpha import (
    decoder_of,
    dora_from_wan_alpha,
    dora_to_wan_alpha,
    trainable_from_wan_alpha,
    trainable_to_wan_alpha,
)
from acetate.models.adapters import MergedLoRA, check_fit, trainable_state
from acetate.models.dit import add_dora
from acetate.models.merge import FeatureMerge
from acetate.models.rgba_vae import RGBAVAE
from tests.formats.test_names import conv, residual, wan21_vae
from tests.original import MERGE, replaced


@pytest.fixture(scope="module")
def trainable(make_vae):
    return trainable_state(
        RGBAVAE(vae=make_vae(), merge_init="scratch", lora_rank=2, lora_alpha=1.0)
    )


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
        (
            "vae_pha.decoder.middle.1.to_qkv.lora_A.default.weight",
            "decoder_alpha.net.mid_block.attentions.0.to_qkv",
        ),
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
        state = trainable_from_wan_alpha(
            {"vae_fgr.decoder.conv1.lora_B.default.weight": value.view(3, 2, *kernel)}
        )
        assert_close(state["decoder_rgb.net.conv_in.parametrizations.weight.0.B"], value.view(3, 2))


def test_frozen_tensors_are_left_out():
    frozen = (
        "vae.encoder.conv1.weight",
        "vae_fgr.decoder.conv1.conv3D.weight",
        "dit.blocks.0.norm3.weight",
    )
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
PARTS = {
    "lora_A": torch.ones(2, 3),
    "lora_B": torch.ones(3, 2),
    "lora_magnitude_vector": torch.ones(3),
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "pipe.dit."])
@pytest.mark.parametrize("adapter", [".default", ""])
def test_dora_names(prefix, adapter):
    flat = {f"{prefix}{LAYER}.{part}{adapter}.weight": value for part, value in PARTS.items()}
    assert dora_from_wan_alpha(flat) == {
        f"blocks.1.attn2.to_out.0.{p}.default.weight": v for p, v in PARTS.items()
    }


def test_dora_keys_without_a_place():
    flat = {f"{LAYER}.dora_scale": torch.ones(3, 1), f"{LAYER}.alpha": torch.ones(1)}
    with pytest.raises(
        ValueError,
        match=rf"t2v: {LAYER}\.dora_scale, {LAYER}\.alpha: names that Wan-Alpha does not",
    ):
        dora_from_wan_alpha(flat, "t2v")
    twice = {
        f"{prefix}{LAYER}.lora_A.weight": torch.ones(2, 3) for prefix in ("", "diffusion_model.")
    }
    with pytest.raises(ValueError, match="the same tensor under two names"):
        dora_from_wan_alpha(twice)


@pytest.mark.parametrize("layout", ["wan21", "tiny"])
def test_trainable_there_and_back(make_vae, layout):
    """Bit for bit where alpha is a power of two; B takes alpha in, since the released scale is 1 /
    rank."""
    vae = RGBAVAE(vae=make_vae(layout), merge_init="scratch", lora_rank=2, lora_alpha=4.0)
    state = {name: torch.randn_like(value) for name, value in trainable_state(vae).items()}
    blocks = make_vae(layout).config.num_res_blocks
    back = trainable_from_wan_alpha(trainable_to_wan_alpha(state, 4.0, blocks), blocks)
    check_fit(state, back, "there and back")
    for name, value in back.items():
        assert_close(
            value, (4 * state[name] if name.endswith(".B") else state[name]), rtol=0, atol=0
        )


def test_names_of_the_released_file(trainable):
    flat = trainable_to_wan_alpha(trainable, 1.0)
    decoder = decoder_of(flat)
    assert len(decoder) == 152
    assert all("decoder" in name and ".lora_" in name for name in decoder)
    assert set(flat) - set(decoder) == {name for name in flat if name.startswith("middle.block.")}
    assert flat["vae_pha.decoder.middle.1.to_qkv.lora_B.default.weight"].shape[1:] == (2, 1, 1)
    assert flat["vae_fgr.decoder.upsamples.3.time_conv.conv3D.lora_B.default.weight"].shape[1:] == (
        2,
        1,
        1,
        1,
    )
    with pytest.raises(ValueError, match=r"vae\.merge\.x: no trained tensor"):
        trainable_to_wan_alpha({"vae.merge.x": torch.zeros(1)}, 1.0)


def test_dora_there_and_back(make_transformer):
    """Bit for bit in bfloat16; alpha / rank goes into B."""
    transformer = make_transformer()
    add_dora(transformer, 4, 8)
    state = {name: torch.randn_like(value) for name, value in trainable_state(transformer).items()}
    back = dora_from_wan_alpha(dora_to_wan_alpha(state, 2.0))
    check_fit(state, back, "there and back")
    for name, value in back.items():
        assert_close(
            value,
            (2 * state[name] if ".lora_B." in name else state[name]).bfloat16(),
            rtol=0,
            atol=0,
        )
    with pytest.raises(ValueError, match="no DoRA tensor"):
        dora_to_wan_alpha({"blocks.0.attn1.to_q.weight": torch.zeros(1)}, 1.0)


def test_full_size_vae_file():
    with torch.device("meta"):
        merge = FeatureMerge(384, 16, "scratch").named_parameters()
        state = {f"merge.{name}": value for name, value in merge}
        for name, layer in AutoencoderKLWan().decoder.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                lora = MergedLoRA(layer.weight, 128, 1.0)
                for decoder, matrix in product(("decoder_rgb", "decoder_alpha"), "AB"):
                    state[f"{decoder}.net.{name}.parametrizations.weight.0.{matrix}"] = getattr(
                        lora, matrix
                    )
        flat = trainable_to_wan_alpha(state, 1.0)
    table = wan_alpha_vae()
    assert {name: tuple(value.shape) for name, value in flat.items()} == table
    counts = [
        [prod(shape) for name, shape in table.items() if name.startswith(part)]
        for part in PARTS_OF_FILE
    ]
    assert [(len(numbers), sum(numbers)) for numbers in counts] == list(PARTS_OF_FILE.values())


PARTS_OF_FILE = {  # tensors and parameters
    "middle.": (33, 25_537_552), "vae_fgr.decoder.": (76, 30_013_824), "vae_pha.decoder.": (76,
    30_013_824)
}  # fmt: skip


def wan_alpha_vae(rank=128):
    """Every trained tensor of the released VAE checkpoint and its shape."""
    block = "middle.block"
    table = {**conv(f"{block}.conv1", 384, 768, 1, 1, 1), f"{block}.head.0.gamma": (384, 1, 1, 1),
             **conv(f"{block}.head.2", 16, 384, 3, 3, 3)}  # fmt: skip
    for place in (0, 2, 4):
        table |= residual(f"{block}.middle.{place}", 384, 384)
    for place in (1, 3):
        table |= {f"{block}.middle.{place}.norm.gamma": (384, 1, 1)}
        table |= conv(f"{block}.middle.{place}.to_qkv", 1152, 384, 1, 1)
        table |= conv(f"{block}.middle.{place}.proj", 384, 384, 1, 1)
    for name, (out, *rest) in wan21_vae().items():
        if name.startswith("decoder.") and name.endswith(".weight"):
            kernel = rest[1:]
            place = name.removesuffix(".weight") + (".conv3D" if len(kernel) == 3 else "")
            for decoder in ("vae_fgr", "vae_pha"):
                table[f"{decoder}.{place}.lora_A.default.weight"] = (rank, *rest)
                table[f"{decoder}.{place}.lora_B.default.weight"] = (out, rank, *[1] * len(kernel))
    return table


def test_full_size_dora():
    with torch.device("meta"):
        transformer = WanTransformer3DModel()
        add_dora(transformer, 32, 32)
    flat = dora_to_wan_alpha(trainable_state(transformer), 1.0)
    assert len(flat) == 1200
    assert {value.dtype for value in flat.values()} == {torch.bfloat16}
    expected = {}
    for block, part in product(
        range(40), [*product(("self_attn", "cross_attn"), "qkvo"), ("ffn", "0"), ("ffn", "2")]
    ):
        layer = f"blocks.{block}.{'.'.join(part)}"
        out, into = {("ffn", "0"): (13824, 5120), ("ffn", "2"): (5120, 13824)}.get(
            part, (5120, 5120)
        )
        expected[f"{layer}.lora_A.default.weight"] = (32, into)
        expected[f"{layer}.lora_B.default.weight"] = (out, 32)
        expected[f"{layer}.lora_magnitude_vector.default.weight"] = (out,)
    assert {name: tuple(value.shape) for name, value in flat.items()} == expected
