"""What task.compile compiles is one graph each: no break leaves a part to Python."""

import pytest
import torch
from torch._dynamo import explain

from acetate.blank import blank_lpips
from tests.compose import composed
from tests.rehearsal import with_numbers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    config = composed(
        tmp_path_factory.mktemp("run"), "experiment=vae_rgba", "data.shards=x",
        "loss.diffusion.mode=bidirectional",
    )  # fmt: skip
    made = with_numbers(config)
    made.configure_model()
    return made


def check(forward, *inputs):
    torch._dynamo.reset()
    found = explain(forward)(*inputs)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_the_halves_of_the_vae(task):
    vae = task.vae
    check(vae.encoder, torch.zeros(2, 3, 5, 16, 16))
    check(vae.decoder_alpha, torch.zeros(1, 16, 2, 4, 4))


@pytest.mark.parametrize("perceptual", ["encoder_features", "lpips"])
def test_the_losses(perceptual, task):
    loss = task.loss
    if perceptual == "lpips":
        loss.perceptual = blank_lpips()
    rgb, alpha, plain = (torch.zeros(1, c, 5, 16, 16) for c in (3, 1, 3))
    views = rgb.clone().requires_grad_(), alpha, rgb, alpha, *[plain[:, :, :1, :1, :1]] * 2
    check(loss, *views, task.vae.encoder.feature_maps)


def test_a_block_of_the_judge(task):
    transformer = task.judge.transformer
    caught = []
    block = transformer.blocks[0]
    hook = block.register_forward_pre_hook(lambda _, inputs: caught.extend(inputs))
    task.judge(torch.zeros(1, 16, 2, 4, 4), torch.tensor([500.0]))
    hook.remove()
    check(block, *caught)
