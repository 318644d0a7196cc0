"""task.compile on its own compiler: what inductor makes of a block and of a stage computes what was
written. On a CPU its kernels are C++, on a card Triton's; graphs, decompositions and layouts
are the same."""

import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from acetate.models import wan
from acetate.models.adapters import add_lora
from acetate.models.compiled import compile_forward
from acetate.models.dit import compile_blocks
from acetate.models.ops import LAYOUT
from tests.conftest import fill_
from tests.models.test_dora import adapted, step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
]


@pytest.fixture(autouse=True)
def alone():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def made() -> int:
    """How many graphs inductor has compiled, forward and backward as one."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_a_block_with_dora(make_transformer):
    plain, transformer = step(adapted(make_transformer)), adapted(make_transformer)
    compile_blocks(transformer, checkpointing=True)
    for ours, expected in zip(step(transformer), plain, strict=True):
        assert_close(ours, expected)
    assert made() == 2  # the input of the first block needs no gradient


class Stage(nn.Module):
    """A stage of the decoder: residual blocks, then twice the frames and pixels."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return wan.up(self.block, x, None)


def test_a_stage_of_the_decoder(make_vae):
    block = make_vae("tiny").decoder.up_blocks[0].requires_grad_(False)
    assert block.upsamplers[0].mode == "upsample3d"
    add_lora(block, 2, 2.0)
    fill_(block, 3)
    stage = Stage(block)
    x = torch.randn(2, block.resnets[0].in_dim, 3, 4, 6).contiguous(memory_format=LAYOUT)

    def run():
        inputs = [x.clone().requires_grad_(), *(p for p in stage.parameters() if p.requires_grad)]
        y = stage(inputs[0])
        return [y, *torch.autograd.grad(y.square().mean(), inputs)]

    plain = run()
    compile_forward(stage)
    compiled = run()
    assert made() == 1 and len(compiled) > 10
    for ours, expected in zip(compiled, plain, strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-5)
