"""DoRA as one operation against PEFT's own, and blocks that are computed again or compiled."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from acetate.models.dit import (
    ATTENTION,
    add_dora,
    checkpoint_blocks,
    compile_blocks,
    dora_layers,
    velocity,
)
from acetate.models.dora import DoRALinear, fuse
from tests.conftest import fill_

RANK, WIDTH = 4, 48


def layer(fused, seed=0, bias=True, dtype=torch.float32, share=0.02):
    """PEFT's layer with DoRA that has trained a little. share: of the base in what it adds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    base = nn.Linear(WIDTH, 2 * WIDTH, bias=bias).to(dtype)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=True)
    made = Linear(base, "default", config=config, r=RANK, lora_alpha=2 * RANK, use_dora=True)
    with torch.no_grad():
        base.weight.copy_(draw(2 * WIDTH, WIDTH) * WIDTH**-0.5)
        if bias:
            base.bias.copy_(0.1 * draw(2 * WIDTH))
        made.lora_A["default"].weight.copy_(draw(RANK, WIDTH))
        made.lora_B["default"].weight.copy_(draw(2 * WIDTH, RANK) * share * WIDTH**-0.5)
        size = base.weight.float().norm(dim=1)
        made.lora_magnitude_vector["default"].weight.copy_(size * (1 + share * draw(2 * WIDTH)))
    base.requires_grad_(False)
    if fused:
        fuse(made)
    return made


def ran(made, x, g):
    """y, the gradient of x and those of what trains, by their names."""
    x = x.clone().requires_grad_()
    y = made(x)
    y.backward(g.to(y.dtype))
    trained = {name: p.grad for name, p in made.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **trained}


def error(found, exact):
    return {n: float((found[n].double() - v).norm() / v.norm()) for n, v in exact.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH)])
def test_it_is_what_peft_computes(bias, shape):
    x, g = (torch.randn(*shape[:-1], n, dtype=torch.float64) for n in (WIDTH, 2 * WIDTH))
    ours, theirs = (ran(layer(fused, bias=bias).double(), x, g) for fused in (True, False))
    assert set(ours) == set(theirs)
    assert ours["y"].shape == theirs["y"].shape == (*shape[:-1], 2 * WIDTH)
    assert max(error(ours, theirs).values()) < 1e-13


@pytest.mark.parametrize("share", [1e-3, 0.05])
def test_in_bfloat16_it_errs_no_more_than_peft(share):
    """Against fp64: y and every gradient, over layers and tokens of ten seeds; the base in bfloat16
    and the adapters in fp32, as they train on a GPU."""
    errors = {True: Counter(), False: Counter()}
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x, g = (torch.randn(256, n, generator=generator).bfloat16() for n in (WIDTH, 2 * WIDTH))
        exact = ran(layer(False, seed, dtype=torch.bfloat16, share=share).double(),
                    x.double(), g.double())  # fmt: skip
        for fused, sums in errors.items():
            made = layer(fused, seed, dtype=torch.bfloat16, share=share)
            with torch.autocast("cpu", torch.bfloat16):
                sums.update(error(ran(made, x, g), exact))
    ours, theirs = errors[True], errors[False]
    assert all(ours[name] < 1.1 * theirs[name] for name in theirs), (ours, theirs)


def test_a_row_without_weights_stays_zero():
    made = layer(True, bias=False)
    with torch.no_grad():
        made.get_base_layer().weight[0] = 0
        made.lora_B["default"].weight[0] = 0
        made.lora_magnitude_vector["default"].weight[0] = 0
    found = ran(made, torch.randn(3, WIDTH), torch.randn(3, 2 * WIDTH))
    assert not found["y"][:, 0].any()
    assert all(value.isfinite().all() for value in found.values())


def test_adapters_that_are_off_are_the_base():
    made, x = layer(True), torch.randn(3, WIDTH)
    made.enable_adapters(False)
    assert torch.equal(made(x), made.get_base_layer()(x))


def test_another_layer_is_refused():
    made = layer(True)
    with pytest.raises(TypeError, match=r"DoRALinear; only peft\.tuners\.lora\.Linear"):
        fuse(made)


class Counted(TorchDispatchMode):
    """Counts the operations within it."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **kwargs or {})


def step(transformer):
    """Returns velocity and gradients."""
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(s, generator=generator) for s in ((2, 16, 2, 4, 4), (2, 3, 16)))
    v = velocity(transformer, x, torch.tensor([300.0, 900.0]), context)
    v.square().mean().backward()
    return [v.detach(), *(p.grad for p in transformer.parameters() if p.grad is not None)]


def adapted(make_transformer):
    """Three blocks that differ, with adapters that have trained."""
    transformer = make_transformer()
    transformer.blocks.append(make_transformer(seed=1).blocks[0])
    transformer.train()
    add_dora(transformer, 4, 4)
    for name, part in transformer.named_modules():
        if ".lora_B." in name:
            fill_(part, 0)
    return transformer


@pytest.mark.parametrize(("keep", "times"), [(True, 1), (False, 2)])
def test_blocks_are_computed_again_but_for_their_attention(keep, times, make_transformer):
    plain, transformer = step(adapted(make_transformer)), adapted(make_transformer)
    checkpoint_blocks(transformer, keep)
    with Counted() as counted:
        again = step(transformer)
    attentions = sum(counted.calls[operation] for operation in ATTENTION)
    # to the prompt always again
    assert attentions == (times + 2) * len(transformer.blocks)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_compiles_whole_and_once_for_all(checkpointing, make_transformer):
    plain, transformer = step(adapted(make_transformer)), adapted(make_transformer)
    assert all(type(layer) is DoRALinear for layer in dora_layers(transformer).values())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(transformer, checkpointing, backend="aot_eager")
    compiled = step(transformer)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # the input of the first needs no gradient; the others share
    assert counters["stats"]["unique_graphs"] == 2
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b)
