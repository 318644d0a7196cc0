"""The memory of a training step of the published size against what `acetate estimate` says."""

import gc

import pytest
import torch
from torch import nn

from acetate.commands.estimate import footprint
from acetate.tasks.optim import with_warmup
from tests.gpu.published import batch_of, config_of, loss_of, task_of

pytestmark = pytest.mark.gpu
GIB = 2**30
# Sizes at which activations are most of it, and a step takes seconds: of the DiT the published one
SIZES = {
    "vae_rgba_wan21": ["data.frames=9", "data.height=272", "data.width=272", "data.batch_size=2"],
    "dit_dora_wan21_1b": ["wan.frames=81", "wan.height=480", "wan.width=832"],
}


def steps(config, device, measured) -> None:
    """Calls measured() around the second of two training steps, whose optimizer has its moments."""
    task = task_of(config, device)
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = with_warmup(trained, lr=1e-6, warmup_steps=0)["optimizer"]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    batch = batch_of(task, config, device)
    measured()
    loss_of(task, batch, device).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    measured()


@pytest.mark.parametrize("experiment", SIZES)
def test_estimate_is_what_a_step_takes(experiment, tmp_path):
    config = config_of(tmp_path, experiment, *SIZES[experiment])
    gc.collect()
    torch.cuda.empty_cache()
    before, peaks = torch.cuda.memory_allocated(), []

    def measured() -> None:
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()

    steps(config, "cuda", measured)
    found = footprint(config)[1]
    rows = {name: f"{size / GIB:.2f}" for name, size in found.per_gpu(1).items()}
    said, taken = found.per_gpu(1)["total"] / GIB, peaks[-1] / GIB
    print(f"{experiment}: {taken:.2f} GiB taken, {said:.2f} estimated {rows}")
    assert said == pytest.approx(taken, rel=0.1), f"{taken:.2f} GiB taken, {said:.2f} GiB: {rows}"
