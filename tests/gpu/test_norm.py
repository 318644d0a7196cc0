"""Norm and SiLU by a kernel (task.fused_norm) on a card: against float64, and in whole steps."""

import pytest
import torch

from acetate.commands.benchmark_step import check_agreement, step_loss
from acetate.models.adapters import trainable_state
from tests.models.norm_cases import CASES, check_errors, errors_of, steps_of

pytestmark = pytest.mark.gpu
FULL = {"base_dim": 96, "lora_rank": 16, "height": 64, "width": 64}


def gradients(vae, clip, precision):
    """All gradients of a step as one vector."""
    vae.zero_grad()
    step_loss(vae, clip, precision).backward()
    found = [p.grad for p in trainable_state(vae).values() if p.grad is not None]
    return torch.cat([grad.double().flatten() for grad in found])


def check_bfloat16(vaes, clip) -> None:
    """A step in bf16 is as near to one in fp32 with the kernel as it is without."""
    exact = gradients(vaes[1], clip, "float32")
    errors = []
    for vae in vaes:
        vae.cast_frozen("bfloat16")
        found = gradients(vae, clip, "bfloat16")
        errors.append(float((found - exact).norm() / exact.norm()))
    print(f"off by {errors[0]:.2%} with the kernel, by {errors[1]:.2%} without")
    assert errors[0] < 1.1 * errors[1]


def check_compiled(vaes, clip) -> None:
    """The kernel is part of what is compiled."""
    vaes[0].compile_halves()
    check_agreement(vaes, clip)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_norm(case):
    check_errors(case, errors_of(*case, "cuda"))


def test_a_step_with_it_is_the_step_without(without_tf32):
    vaes, clip = steps_of("cuda", **FULL)
    check_agreement(vaes, clip)
    check_bfloat16(vaes, clip)


def test_a_compiled_step_with_it_is_the_step_without(without_tf32):
    check_compiled(*steps_of("cuda", **FULL))
