"""Measures what a device gives at most, for commands.benchmark: products of matrices, the decoder's
heaviest convolution, attention at the DiT's shapes, and copies, each by itself and in the precision
of the steps.

The backward pass of attention counts twice its forward pass: the scores that a fused kernel
computes once more are not counted, here and in the steps' figures alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count

from acetate.commands.benchmark_clock import DTYPES, failures_in, median_of, release
from acetate.commands.benchmark_step import Workload
from acetate.memory import without_numbers
from acetate.models.ops import LAYOUT
from acetate.models.wan import Geometry, WanDecoder

BACKENDS = {"cpu": (None,), "cuda": (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)}


@dataclass(frozen=True)
class CeilingsLoad:
    """The sizes of what is measured."""

    side: int  # of the square matrices
    gib: float  # that are copied
    repeats: int


@dataclass(frozen=True)
class Convolution:
    """The shapes of a convolution: its input as it is read, its weight, stride and padding."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


class Convolutions(TorchDispatchMode):
    """Holds the FLOPs of every 3-D convolution that runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[Convolution, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten.convolution.default and out.ndim == 5:
            x, weight, _, stride, padding = args[:5]
            one = Convolution(tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding))
            self.flops[one] = conv_flop_count(x.shape, weight.shape, out.shape)
        return out


def heaviest(load: Workload) -> list[tuple[Convolution, int]]:
    """Returns the decoder's convolutions of the most FLOPs at the step's shape, with that count;
    several where they tie."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=load.base_dim)
    decoder = WanDecoder(vae).requires_grad_(False)
    shape = Geometry.of(vae).latent_shape(load.frames, load.height, load.width)
    with FakeTensorMode(allow_non_fake_inputs=True), Convolutions() as convolutions:
        without_numbers(decoder)
        decoder(torch.empty(load.batch_size, *shape))
    most = max(convolutions.flops.values())
    return [(one, flops) for one, flops in convolutions.flops.items() if flops == most]


def benchmark_ceilings(
    sizes: CeilingsLoad, load: Workload, attention: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Returns a row for everything measured: what, the kind of its ceiling, the seconds and the
    FLOPs, or bytes, of a second.

    attention: (heads, tokens, width) of the DiT by the name of its shape.
    """
    rows: list[dict[str, Any]] = []
    device, dtype = load.device, DTYPES[load.precision]
    for what, optional, measures in works(sizes, load, attention):
        row: dict[str, Any] = {"what": what}
        with failures_in(row, device):
            for kind, count, call in measures(device, dtype):
                seconds = median_of(call, device, sizes.repeats)
                rows.append(
                    {"what": what, "kind": kind, "seconds": seconds, "rate": count / seconds}
                )
        if "error" in row:
            rows.append({"what": what, "missing": row["error"]} if optional else row)
        release(device)
    return rows


Measures = Iterator[tuple[str, float, Callable[[], object]]]  # kind, FLOPs or bytes, what is timed
Work = Callable[[str, torch.dtype], Measures]


def works(
    sizes: CeilingsLoad, load: Workload, attention: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, bool, Work]]:
    """Yields what is measured, whether a card may lack it, and how it is measured."""
    n = sizes.side
    yield f"{n} x {n} matrices", False, lambda device, dtype: products(n, device, dtype)
    for one, flops in heaviest(load):
        (out, into, *kernel), shape = one.weight, "x".join(map(str, one.x[2:]))
        name = f"convolution {'x'.join(map(str, kernel))}, {into} to {out} channels, {shape}"
        yield (
            name,
            False,
            lambda device, dtype, one=one, flops=flops: convolution(one, flops, device, dtype),
        )
    for name, shape in attention.items():
        for backend in BACKENDS[load.device]:
            label = "as torch chooses" if backend is None else backend.name.lower()
            yield (
                f"attention of {name}, {label}",
                backend is not None,
                lambda device, dtype, name=name, shape=shape, backend=backend: attend(
                    name, shape, backend, device, dtype
                ),
            )
    yield (
        f"copy of {sizes.gib:g} GiB",
        False,
        lambda device, dtype: copies(sizes.gib, device, dtype),
    )


def products(n: int, device: str, dtype: torch.dtype) -> Measures:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    yield "matmul", 2 * n**3, lambda: torch.mm(a, b, out=out)


def convolution(one: Convolution, flops: int, device: str, dtype: torch.dtype) -> Measures:
    """Times it in the step's layout; the backward pass gives the gradients of input and weight."""
    x, weight = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=LAYOUT).requires_grad_()
        for shape in (one.x, one.weight)
    )

    def forward() -> Tensor:
        return F.conv3d(x, weight, None, one.stride, one.padding)

    yield "conv forward", flops, forward
    out = forward()
    gradient = torch.randn_like(out)
    yield (
        "conv backward",
        2 * flops,
        lambda: torch.autograd.grad(out, (x, weight), gradient, retain_graph=True),
    )


def attend(
    name: str, shape: Sequence[int], backend: SDPBackend | None, device: str, dtype: torch.dtype
) -> Measures:
    heads, tokens, width = shape
    q, k, v = (
        torch.randn(1, heads, tokens, width, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    flops = 4 * heads * tokens**2 * width

    def forward() -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    yield f"attention of {name}, forward", flops, forward
    out = forward()
    gradient = torch.randn_like(out)
    yield (
        f"attention of {name}, backward",
        2 * flops,
        lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True),
    )


def copies(gib: float, device: str, dtype: torch.dtype) -> Measures:
    source = torch.randn(int(gib * 2**30) // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    yield "copy", 2 * source.nbytes, lambda: target.copy_(source)  # read and written


def rates_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the best rate of every kind: FLOPs, or bytes, of a second."""
    rates: dict[str, float] = {}
    for row in rows:
        if "rate" in row:
            rates[row["kind"]] = max(row["rate"], rates.get(row["kind"], 0.0))
    return rates
