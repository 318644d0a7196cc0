"""The kernel of norm and SiLU against double precision, beside what runs without it. As a program,
started with TRITON_INTERPRET=1, it prints the errors on a CPU as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from acetate.commands.benchmark_step import ClipTensors, Workload, build, check_agreement, draw_clip
from acetate.models import norm_kernel
from acetate.models.norm_kernel import fused_norm_silu
from acetate.models.ops import LAYOUT, FusedNorm, _NormSiLU
from acetate.models.rgba_vae import RGBAVAE

PARTS = ("y", "dx", "dgamma")
# channels, (B, T, H, W), frames of zeros: many rows, few of them, a single frame without zeros
SIZES = (
    (8, (2, 3, 9, 31), 2),
    (96, (2, 3, 4, 5), 2),
    (192, (1, 1, 9, 7), 0),
    (384, (3, 2, 5, 2), 2),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [(*size, name) for size in SIZES for name in DTYPES]


def exact(x: Tensor, gamma: Tensor, before: int) -> Tensor:
    unit = F.normalize(x, dim=1) * x.shape[1] ** 0.5
    return F.pad(F.silu(unit * gamma), (0, 0, 0, 0, before, 0))


def plain(x: Tensor, gamma: Tensor, before: int) -> Tensor:
    return F.pad(_NormSiLU.apply(x, gamma.to(x.dtype)), (0, 0, 0, 0, before, 0))


def errors_of(
    channels: int, shape: Sequence[int], before: int, name: str, device: str
) -> dict[str, list[float]]:
    """The errors of the kernel and of what runs without it, of the norm of each of PARTS."""
    batch, *size = shape
    generator, dtype = torch.Generator().manual_seed(channels), DTYPES[name]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = drawn(batch, channels, *size) * torch.logspace(-1, 1, size[-1])  # small and large norms
    gamma, grad = (
        1 + drawn(channels, 1, 1, 1) / 2,
        drawn(batch, channels, before + size[0], *size[1:]),
    )
    x, grad = (t.to(device, dtype).contiguous(memory_format=LAYOUT) for t in (x, grad))
    gamma = gamma.to(device, dtype).float()  # as the merge block trains it

    def run(way, dtype):
        inputs = [x.to(dtype), gamma.to(torch.promote_types(dtype, torch.float32))]
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = way(*inputs, before)
        assert (y.dtype, y.shape) == (dtype, grad.shape)
        assert not y[:, :, :before].any()
        return [t.double() for t in (y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype)))]

    expected = run(exact, torch.float64)
    found = [run(way, dtype) for way in (fused_norm_silu, plain)]
    return {
        part: [float((one[i] - expected[i]).norm() / expected[i].norm()) for one in found]
        for i, part in enumerate(PARTS)
    }


def check_errors(case: Sequence[Any], errors: Mapping[str, Sequence[float]]) -> None:
    """In bf16 no error is larger than without the kernel, though the interpreter cuts bits off
    where a card rounds; in fp32 each is a rounding."""
    for part, (kernel, without) in errors.items():
        most = without if "bfloat16" in case else 1e-6
        assert kernel <= most, f"{part} of {case}: {kernel:.1e}, without it {without:.1e}"


def steps_of(device: str, **settings: Any) -> tuple[list[RGBAVAE], ClipTensors]:
    """Two RGBA-VAEs of the same weights, the first with the kernel, and a clip."""
    load = Workload(
        lora_alpha=1.0, frames=5, batch_size=2, checkpointing=False,
        device=device, precision="float32", cudnn_benchmark=False, threads=1, seed=0, **settings,
    )  # fmt: skip
    return [build("ours", replace(load, fused_norm=x)) for x in (True, False)], draw_clip(load)


def check_operations() -> None:
    """Shapes, strides and precisions are those that compilers are told."""
    x = torch.randn(2, 6, 3, 4, 5).contiguous(memory_format=LAYOUT)
    gamma = torch.randn(6, 1, 1, 1)
    grad = torch.randn(2, 6, 5, 4, 5)  # in another layout
    tests = "test_schema", "test_faketensor"
    opcheck(norm_kernel._norm_silu, (x, gamma, 2), test_utils=tests)
    opcheck(norm_kernel._norm_silu_backward, (x, gamma, grad, 2), test_utils=tests)
    inputs = [t.requires_grad_() for t in (x, gamma)]
    compiled = torch.compile(fused_norm_silu, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        *(
            torch.autograd.grad(way(*inputs, 2), inputs, grad)
            for way in (compiled, fused_norm_silu)
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


if __name__ == "__main__":
    norm_kernel.PROGRAMS = 3  # so that each takes several blocks
    FusedNorm.kinds = ("cpu",)
    check_operations()
    errors = [errors_of(*case, "cpu") for case in CASES]
    agreement = check_agreement(*steps_of("cpu", base_dim=4, lora_rank=2, height=16, width=16))
    print(json.dumps({"errors": errors, "agreement": agreement}))
