"""Autocast on the CPU with the lists of CUDA, to measure there what a GPU keeps.

CUDA's autocast computes more operations in float32 than the CPU's, RMSNorm and powers among them,
and what they read is kept in float32 for the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._pytree import tree_map

# Of ATen/autocast_mode.h in PyTorch 2.11: AT_FORALL_FP32, without losses that nothing here has
FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal",
    "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus",
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "cosine_similarity", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "dist", "cdist", "logsumexp", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d",
)  # fmt: skip
# AT_FORALL_FP32_SET_OPT_DTYPE: they read what they are given and write float32
INTO_FLOAT32 = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "sum", "sum.dim_IntList",
)  # fmt: skip
HALVES = (torch.bfloat16, torch.float16)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value


def _kernel(name: str) -> Any:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
    names = [argument.name for argument in operation._schema.arguments]

    def read_wide(*args: Any, **settings: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operation(*tree_map(_wide, args), **tree_map(_wide, settings))

    def write_wide(*args: Any, **settings: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | settings
        if args[0].dtype in HALVES and given.get("dtype") is None:
            given["dtype"] = torch.float32
        with torch.autocast("cpu", enabled=False):
            return operation(**given)

    return write_wide if name in INTO_FLOAT32 else read_wide


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Lets torch.autocast("cpu") choose precisions as CUDA's does, in the whole process."""
    library = Library("aten", "IMPL")
    try:
        for name in (*FLOAT32, *INTO_FLOAT32):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                library.impl(name, _kernel(name), "AutocastCPU")
        yield
    finally:
        library._destroy()
