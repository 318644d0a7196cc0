"""Norm and SiLU into the padded input of the next convolution, timed for commands.benchmark at the
decoder's two largest shapes: as the step runs it, compiled, and by the kernel of task.fused_norm.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor

from acetate.commands.benchmark_clock import DTYPES, failures_in, median_of, release
from acetate.commands.benchmark_step import Workload
from acetate.models.ops import LAYOUT, fuse_norms, norm_silu

WAYS = {"cpu": ("plain",), "cuda": ("plain", "compiled", "kernel")}
BEFORE = 2  # frames of zeros
Measures = Iterator[tuple[str, int, Callable[[], object]]]  # direction, bytes, what is timed


def benchmark_norm(load: Workload, repeats: int) -> list[dict[str, Any]]:
    """Returns a row for every shape, way and direction: the seconds, and the bytes of a second if
    each tensor is read or written once."""
    rows: list[dict[str, Any]] = []
    for scale in (1, 2):
        channels, height, width = load.base_dim * scale, load.height // scale, load.width // scale
        shape = (load.batch_size, channels, load.frames, height, width)
        for way in WAYS[load.device]:
            row: dict[str, Any] = {"shape": list(shape), "way": way}
            with failures_in(row, load.device):
                for direction, nbytes, call in measures(way, shape, load):
                    seconds = median_of(call, load.device, repeats)
                    figures = {"direction": direction, "seconds": seconds, "rate": nbytes / seconds}
                    rows.append({**row, **figures})
            if "error" in row:
                rows.append(row)
            release(load.device)
    return rows


def measures(way: str, shape: tuple[int, ...], load: Workload) -> Measures:
    """Yields both directions of a frozen norm, whose input alone has a gradient."""
    dtype = DTYPES[load.precision]
    norm = WanRMS_norm(shape[1], images=False).to(load.device, dtype).requires_grad_(False)
    if way == "kernel":
        fuse_norms(norm)
    call = torch.compile(norm_silu, dynamic=False) if way == "compiled" else norm_silu
    x = torch.randn(shape, device=load.device, dtype=dtype).contiguous(memory_format=LAYOUT)
    x.requires_grad_()
    y: Tensor = call(norm, x, BEFORE)
    yield "forward", x.nbytes + y.nbytes, lambda: call(norm, x, BEFORE)
    grad = torch.randn_like(y)
    yield (
        "backward",
        3 * x.nbytes,
        lambda: torch.autograd.grad(y, x, grad, retain_graph=True),
    )
