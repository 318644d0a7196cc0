import copy

import pytest
import torch
from torch.testing import assert_close

from acetate.formats.few_step import merge_few_step

Q, WIDTH, RANK = "blocks.1.self_attn.q", 24, 3


@pytest.fixture
def matrices():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(RANK, WIDTH, generator=generator), torch.randn(
        WIDTH, RANK, generator=generator
    )


def change(base, flat, strength=1.0):
    """What merging adds, by name."""
    ours = copy.deepcopy(base)
    count = merge_few_step(ours, flat, strength)
    before = base.state_dict()
    deltas = {name: value - before[name] for name, value in ours.state_dict().items()}
    changed = {name: value for name, value in deltas.items() if value.abs().max() > 0}
    assert len(changed) == count
    return changed


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize(
    "names", [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora_A.default", "lora_B.default")]
)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_matrices(make_transformer, matrices, prefix, names, alpha):
    flat = {
        f"{prefix}{Q}.{name}.weight": value for name, value in zip(names, matrices, strict=True)
    }
    if alpha is not None:
        flat[f"{prefix}{Q}.alpha"] = torch.tensor(alpha)
    ((name, delta),) = change(make_transformer(), flat, 0.5).items()
    assert name == "blocks.1.attn1.to_q.weight"
    down, up = matrices
    assert_close(
        delta, 0.5 * (1 if alpha is None else alpha / RANK) * up @ down, rtol=1e-4, atol=1e-5
    )


def test_differences(make_transformer):
    base = make_transformer()
    flat = {
        "diffusion_model.blocks.0.cross_attn.norm_q.diff": torch.ones(WIDTH),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(32),
        "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, WIDTH),
        "diffusion_model.blocks.0.norm3.diff_b": torch.ones(WIDTH),
        "diffusion_model.head.head.diff": torch.ones(64, WIDTH),
        "diffusion_model.patch_embedding.diff": torch.ones(WIDTH, 16, 1, 2, 2),
    }
    assert change(base, flat).keys() == {
        "blocks.0.attn2.norm_q.weight",
        "blocks.0.ffn.net.0.proj.bias",
        "blocks.0.scale_shift_table",
        "blocks.0.norm2.bias",  # Wan's norm3 is diffusers' norm2
        "proj_out.weight",
        "patch_embedding.weight",
    }


def test_kohyas_names(make_transformer, matrices):
    down, up = matrices
    flat = {}
    for layer in ("self_attn_q", "cross_attn_o"):
        flat |= {
            f"lora_unet_blocks_1_{layer}.lora_down.weight": down,
            f"lora_unet_blocks_1_{layer}.lora_up.weight": up,
        }
        flat[f"lora_unet_blocks_1_{layer}.alpha"] = torch.tensor(1.0)
    flat["lora_unet_blocks_0_ffn_0.lora_down.weight"] = torch.ones(2, WIDTH)
    flat["lora_unet_blocks_0_ffn_0.lora_up.weight"] = torch.ones(32, 2)
    changed = change(make_transformer(), flat)
    assert changed.keys() == {
        "blocks.1.attn1.to_q.weight",
        "blocks.1.attn2.to_out.0.weight",
        "blocks.0.ffn.net.0.proj.weight",
    }
    assert_close(changed["blocks.1.attn1.to_q.weight"], up @ down / RANK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "text_model.weight",
            torch.zeros(2),
            r"few\.safetensors: text_model\.weight: no tensors of a few-step LoRA",
        ),
        (
            "lora_unet_head_head.lora_up.weight",
            torch.zeros(2, 2),
            r"lora_unet_head_head\.weight does not exist",
        ),
        (
            "blocks.9.self_attn.q.diff",
            torch.zeros(2),
            r"blocks\.9\.attn1\.to_q\.weight does not exist in this DiT",
        ),
        (
            "blocks.0.self_attn.q.diff",
            torch.zeros(2),
            r"blocks\.0\.attn1\.to_q\.weight is \(24, 24\), .* has \(2,\)",
        ),
        (
            "blocks.0.ffn.0.diff",
            torch.zeros(24, 32),
            r"ffn\.net\.0\.proj\.weight is \(32, 24\), .* has \(24, 32\)",
        ),
        (
            "blocks.0.self_attn.k.lora_up.weight",
            torch.zeros(24, 2),
            r"to_k\.weight needs a down and an up .* has block",
        ),
        (
            f"{Q}.lora_up.weight",
            torch.zeros(24, 2),
            r"has a down matrix of rank 3 and an up matrix of 2",
        ),
        (f"{Q}.lora_up.weight", torch.zeros(32, 3), r"is \(24, 24\), .* has \(32, 24\)"),
        (f"{Q}.lora_up.weight", torch.zeros(24), r"no matrices"),
        (f"{Q}.alpha", torch.zeros(24), r"alpha has 24 values"),
        (
            f"diffusion_model.{Q}.lora_B.weight",
            torch.zeros(24, 3),
            r"lora_B.* and .*lora_up.*: one tensor under two",
        ),
        (
            "blocks.0.self_attn.q.diff",
            torch.zeros(24, 24).to(torch.float8_e4m3fn),
            r"q\.diff is torch\.float8_e4m3fn",
        ),
    ],
)
def test_keys_without_a_place_change_nothing(make_transformer, matrices, key, value, message):
    base = make_transformer()
    before = copy.deepcopy(base.state_dict())
    flat = {f"{Q}.lora_down.weight": matrices[0], f"{Q}.lora_up.weight": matrices[1]} | {key: value}
    with pytest.raises(ValueError, match=message):
        merge_few_step(base, flat, source="few.safetensors")
    for name, tensor in base.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)


def test_an_empty_file_is_no_lora(make_transformer):
    with pytest.raises(ValueError, match="empty: no tensors of a few-step LoRA"):
        merge_few_step(make_transformer(), {})
