"""The GPU's numbers against double precision on the CPU: losses, every gradient, samplers."""

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from acetate.models.adapters import trainable_state
from acetate.models.loading import load_transformer
from acetate.sampling import SOLVERS, Solver, initial_noise, sample_latents
from acetate.tasks.vae import Draw
from tests.compose import composed
from tests.conftest import TINY

pytestmark = pytest.mark.gpu


class Step(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]

    @property
    def norm(self) -> float:
        return sum(float(g.square().sum()) for g in self.gradients.values()) ** 0.5


def built(config) -> nn.Module:
    """The task on the CPU with adapters that are past their start: none is 0, whose partner would
    have no gradient."""
    torch.manual_seed(0)
    task = instantiate(config.task)
    task.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_state(task).values():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return task


def clips(frames: int, side: int) -> dict:
    """Two discs with soft edges on their way, in colours at random: opaque, mixed and empty
    cells."""
    generator = torch.Generator().manual_seed(2)
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float32)] * 2, indexing="ij")
    across = side * (0.4 + 0.02 * torch.arange(frames))[:, None, None]
    alpha = ((side / 4 - ((x - across) ** 2 + (y - side / 2) ** 2).sqrt()) / 6 + 0.5).clamp(0, 1)
    rgb = torch.rand(2, 3, frames, side, side, generator=generator) * 2 - 1
    alpha = torch.stack([alpha, alpha.flip(-1)])[:, None]
    return {"key": ["a", "b"], "rgb": rgb, "alpha": alpha}


def moved(values, device: str, dtype: torch.dtype):
    """Tensors on a device, those with fractions in another precision."""
    if isinstance(values, Mapping):
        return {name: moved(value, device, dtype) for name, value in values.items()}
    if not isinstance(values, Tensor):
        return values
    return values.to(device, dtype if values.is_floating_point() else None)


@cache
def expected_of(stage: str):
    """The task, its loss and their arguments; the step in double precision, on all cores."""
    with tempfile.TemporaryDirectory() as folder:
        task, loss, values = STAGES[stage](Path(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    expected = step_of(task, loss, values, "cpu", torch.float64)
    torch.set_num_threads(threads)
    return task, loss, values, expected


def step_of(task, loss, values, device, dtype=torch.float32, autocast=False) -> Step:
    """loss(task, *values) of a copy of the task on a device, and all of its gradients."""
    task = copy.deepcopy(task).to(device, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        result = loss(task, *(moved(value, device, dtype) for value in values))
    result.backward()
    trained = trainable_state(task)
    assert all(p.grad is not None for p in trained.values())
    return Step(
        float(result.detach()), {name: p.grad.double().cpu() for name, p in trained.items()}
    )


def vae_stage(folder):
    task = built(
        composed(
            folder, "experiment=vae_rgba", "data.shards=x", "loss.diffusion.mode=bidirectional",
            "model.lora_rank=4",
        )
    )  # fmt: skip
    batch = clips(frames=5, side=32)
    draw = task.draw(batch, "train", 0)

    def loss(task, batch, *draw):
        return task.step(batch, Draw(*draw))[0]

    return task, loss, (batch, *draw)


def dit_stage(folder):
    overrides = ["data.latents=x", "rgba_vae=x", "task.rank=4", "task.alpha=4"]
    task = built(composed(folder, "experiment=dit_dora", *overrides))
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, 2, 16, 3, 12, 12, generator=generator)
    ellipse = torch.tensor([5.0, 6.0, 7.0, 4.0, 30.0])
    batch = {
        "latents": latents, "ellipses": ellipse.expand(2, 3, 5),
        "context": torch.randn(2, 64, 64, generator=generator),
    }  # fmt: skip

    def loss(task, batch, noise, ids):
        errors = task.errors(batch, noise, ids, batch["context"])
        return (task.levels.weights[ids] * errors).mean()

    return task, loss, (batch, noise, torch.tensor([200, 700]))


STAGES = {"vae": vae_stage, "dit": dit_stage}
# Of a gradient's norm in fp32: sums of thousands of rounded products, in another order
FP32 = 1e-4
# of the norm of all gradients: what a gradient of about 0 may be off
FLOOR = 1e-6
# In bf16, which keeps 8 bits, by the cosine: of all gradients as one, and of each but those that
# are a small share of it
ALL, EACH, COUNTS = 0.995, 0.98, 1e-2


def check_float32(stage, device) -> None:
    task, loss, values, expected = expected_of(stage)
    found = step_of(task, loss, values, device)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    off = {
        name: float((found.gradients[name] - g).norm() / (FP32 * g.norm() + FLOOR * expected.norm))
        for name, g in expected.gradients.items()
    }
    worst = max(off, key=off.__getitem__)
    assert off[worst] < 1, f"{worst}: {off[worst]:.2f} times what fp32 may be off"


def cosine(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    flat = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (one, other)]
    return float(torch.cosine_similarity(*flat, dim=0))


def check_bfloat16(stage, device) -> None:
    task, loss, values, expected = expected_of(stage)
    found = step_of(task, loss, values, device, autocast=True)
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    assert cosine(found.gradients.values(), expected.gradients.values()) > ALL
    cosines = {
        name: cosine([found.gradients[name]], [g])
        for name, g in expected.gradients.items()
        if g.norm() > COUNTS * expected.norm
    }
    assert len(cosines) >= 5
    worst = min(cosines, key=cosines.__getitem__)
    assert cosines[worst] > EACH, f"{worst}: cosine {cosines[worst]:.4f}"


def check_sampler(solver, device) -> None:
    """Six steps with guidance, of the CPU in fp32, which the solvers compute in."""
    transformer = load_transformer(TINY)
    noise = initial_noise([3, 4], (16, 3, 12, 12), None, 0.0, "cpu")
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(3, 64, transformer.config.text_dim, generator=generator)
    settings = Solver(solver, steps=6, guidance=3.0)

    def sampled(device):
        prompts = context.to(device)
        return sample_latents(
            transformer.to(device), noise.to(device), prompts[:2], prompts[2:], settings,
            progress=False,
        ).cpu()  # fmt: skip

    expected, found = sampled("cpu"), sampled(device)
    assert expected.std() > 0.1
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-4, f"{solver}: off by {error:.1e}"


@pytest.mark.parametrize("stage", STAGES)
def test_float32_is_double_precision(stage, without_tf32):
    check_float32(stage, "cuda")


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_leads_the_same_way(stage):
    check_bfloat16(stage, "cuda")


@pytest.mark.parametrize("solver", SOLVERS)
def test_samplers_arrive_at_the_same_latents(solver, without_tf32):
    check_sampler(solver, "cuda")
