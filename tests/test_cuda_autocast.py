"""Precisions against those of CUDA's own autocast, on fake CUDA tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from acetate.cuda_autocast import FLOAT32, INTO_FLOAT32, cuda_autocast
from tests.fake_gpu import fake_gpu

OPERATIONS = {
    "pow": lambda x: x**2, "pow of tensors": lambda x: x**x, "pow of a number": lambda x: 2**x,
    "square": torch.square, "exp": torch.exp, "log": torch.log, "log10": torch.log10,
    "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "softplus": F.softplus,
    "layer_norm": lambda x: F.layer_norm(x, (8,)), "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 2), "sum": torch.sum, "prod": torch.prod,
    "sum of rows": lambda x: x.sum(1), "cumsum": lambda x: x.cumsum(0),
    "sum in bf16": lambda x: x.sum(dtype=torch.bfloat16), "softmax": lambda x: x.softmax(-1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1), "l1": lambda x: F.l1_loss(x, x),
    "mse": lambda x: F.mse_loss(x, x), "huber": lambda x: F.huber_loss(x, x),
    "cosine": lambda x: F.cosine_similarity(x, x), "nearest": lambda x: F.interpolate(x[None], 4),
    "mean": torch.mean, "silu": F.silu, "gelu": F.gelu, "add": lambda x: x + x.float(),
    "matmul": lambda x: x @ x.float().T, "linear": lambda x: F.linear(x.float(), x.float()),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x.float(), x), "sqrt": lambda x: x.abs().sqrt(),
    "conv": lambda x: F.conv1d(x.float()[None], x[:, :, None]),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.float()[None, None]] * 3),
}  # fmt: skip


def precisions(device: str) -> dict[str, torch.dtype]:
    x = torch.rand(8, 8, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        return {name: operation(x).dtype for name, operation in OPERATIONS.items()}


def test_precisions_are_those_of_cuda():
    with fake_gpu():
        expected = precisions("cuda")
    with FakeTensorMode(), cuda_autocast():
        assert precisions("cpu") == expected
    assert {expected["pow"], expected["silu"]} == {torch.float32, torch.bfloat16}


def test_the_cpu_has_its_own_lists_again():
    before = precisions("cpu")
    with cuda_autocast(), pytest.raises(KeyError):
        assert precisions("cpu") != before
        raise KeyError
    assert precisions("cpu") == before


def test_every_name_is_an_operation_of_torch():
    for name in (*FLOAT32, *INTO_FLOAT32):
        assert torch._C._dispatch_has_kernel(f"aten::{name}")
