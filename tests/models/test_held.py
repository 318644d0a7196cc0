"""Frozen weights that are rounded, or in the host's memory: what they compute beside plain ones."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from acetate.models import held
from acetate.models.adapters import trainable_state
from acetate.models.dit import FrozenDiT, add_dora, checkpoint_blocks, merge_dora, velocity
from acetate.models.held import HeldLinear, held_layers, hold, whole
from tests.conftest import TINY, fill_

# what rounding may change of velocity and gradients, a share of their norm
BOUNDS = {"fp8": 0.06, "nf4": 0.2}


def tiny(make_transformer, blocks=3):
    """A DiT of blocks that differ, with adapters that have trained and recomputation."""
    transformer = make_transformer()
    for seed in range(1, blocks - 1):
        transformer.blocks.append(make_transformer(seed=seed).blocks[0])
    del transformer.blocks[blocks:]
    return adapted(transformer)


def adapted(transformer):
    add_dora(transformer.train(), 4, 4)
    for name, part in transformer.named_modules():
        if ".lora_B." in name:
            fill_(part, 0)
    checkpoint_blocks(transformer)
    return transformer


def step(transformer, optimizer=None):
    """Velocity and gradients of what trains, and a step of an optimizer."""
    config = transformer.config
    draws = torch.Generator().manual_seed(1)
    sizes = (2, config.in_channels, 2, 4, 4), (2, 3, config.text_dim)
    x, context = (torch.randn(size, generator=draws) for size in sizes)
    v = velocity(transformer, x, torch.tensor([300.0, 900.0]), context)
    transformer.zero_grad()
    v.square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    return [v.detach(), *(p.grad.clone() for p in trainable_state(transformer).values())]


def rounded(transformer):
    """The plain DiT with the weights that a held one has."""
    plain = deepcopy(transformer)
    for part in held_layers(plain).values():
        weight = part.whole()
        part.__class__ = nn.Linear
        part.weight = nn.Parameter(weight, requires_grad=False)
    return plain


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
@pytest.mark.parametrize("base", ["made", "shipped"])
def test_rounded_weights_compute_what_plain_ones_of_their_values_do(kind, base, make_transformer):
    if base == "made":
        plain = tiny(make_transformer)
    else:
        plain = adapted(FrozenDiT(TINY, "float32").load())
    transformer = deepcopy(plain)
    hold(transformer.blocks, kind, False)
    assert len(held_layers(transformer)) == 10 * len(transformer.blocks)
    found, exact = step(transformer), step(plain)
    for a, b in zip(found, step(rounded(transformer)), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    assert 1e-4 < errors[0] < BOUNDS[kind], errors[0]
    assert sorted(errors)[len(errors) // 2] < 2 * BOUNDS[kind], errors


@pytest.mark.parametrize("kind", held.KINDS)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_offloaded_blocks_compute_to_the_bit_what_plain_ones_do(kind, blocks, make_transformer):
    plain = tiny(make_transformer, blocks)
    hold(plain.blocks, kind, False)
    transformer = tiny(make_transformer, blocks)
    hold(transformer.blocks, kind, True)
    most = 0
    offload = transformer.blocks[0].forward.func.__self__
    fetch = offload.fetch

    def counted(*arguments):
        nonlocal most
        fetch(*arguments)
        copies = sum(layer.copy is not None for layer in held_layers(transformer).values())
        most = max(most, copies)

    offload.fetch = counted
    steps = [torch.optim.AdamW(trainable_state(t).values(), 1e-2) for t in (plain, transformer)]
    for _ in range(2):
        for a, b in zip(step(plain, steps[0]), step(transformer, steps[1]), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():  # a validation between two steps
            assert torch.equal(*(step_forward(t) for t in (plain, transformer)))
    for name, value in trainable_state(plain).items():
        assert torch.equal(value, trainable_state(transformer)[name])
    assert most == 10 * min(2, blocks)


def step_forward(transformer):
    x = torch.ones(1, transformer.config.in_channels, 1, 4, 4)
    context = torch.ones(1, 3, transformer.config.text_dim)
    return velocity(transformer, x, torch.tensor([500.0]), context)


def test_fp8_keeps_three_bits_of_every_weight_that_is_not_tiny():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -20, 10, 64
    ).unsqueeze(1)
    weight[3] = 0
    codes, scale = held.to_fp8(weight)
    assert codes.dtype == torch.float8_e4m3fn
    back = codes.float() * scale
    least = scale * 2**-10  # half the smallest that the type has
    assert ((back - weight).abs() <= weight.abs() * 2**-4 + least).all()
    assert not back[3].any()


def test_nf4_takes_the_nearest_level():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(128, 8, bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    HeldLinear.of(layer, "nf4", False)
    assert layer.weight.nbytes == weight.numel() // 2
    scale = weight.view(-1, 64).abs().amax(1, keepdim=True)
    levels = torch.tensor(held.NF4) * scale[:, :, None]
    nearest = (weight.view(-1, 64, 1) - levels).abs().amin(2).view_as(weight)
    assert_close((whole(layer) - weight).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", held.KINDS)
def test_no_cast_of_a_module_changes_what_is_held(kind, make_transformer):
    transformer = make_transformer()
    hold(transformer.blocks, kind, True)
    before = {name: part.whole().clone() for name, part in held_layers(transformer).items()}
    transformer.bfloat16()
    for name, part in held_layers(transformer).items():
        assert torch.equal(part.whole(), before[name])
        assert part.bias.dtype == torch.bfloat16


def test_weights_that_are_held_are_not_merged_into(make_transformer):
    transformer = tiny(make_transformer)
    hold(transformer.blocks, "fp8", False)
    with pytest.raises(TypeError, match="merge into whole weights"):
        merge_dora(transformer)


def test_settings_that_do_not_go_together_are_named():
    with pytest.raises(ValueError, match=r"base\.weights=fp4; known: full, fp8, nf4"):
        FrozenDiT(TINY, "float32", weights="fp4")
    base = FrozenDiT(TINY, "float32", weights="fp8", offload=True)
    with pytest.raises(ValueError, match=r"needed: task\.checkpointing=true"):
        base.check_step(False, False)
    with pytest.raises(ValueError, match=r"needed: task\.compile=false"):
        base.check_step(True, True)
    said = r"base\.weights=fp8 and base\.offload=true: trainer=fsdp cannot shard"
    with pytest.raises(ValueError, match=said):
        base.check_shards(object())  # pyright: ignore
    FrozenDiT(TINY, "float32").check_shards(object())  # pyright: ignore


def test_a_layer_that_nf4_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"has 15 weights, no multiple of 64\. Use .*fp8"):
        HeldLinear.of(nn.Linear(5, 3), "nf4", False)
