"""A GPU without one: its tensors have shapes and no numbers, what a real one refuses is refused,
and what a real one would wait for is noted.

Tensors of the CPU keep their numbers, so that files are read and hashed as ever.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from tests.fake_backward import fake_backward
from tests.paths import ROOT

aten = torch.ops.aten
# As they are reached with gradients, and in inference mode
READS = {aten._local_scalar_dense, aten.item}
COPIES = {aten._to_copy, aten.copy_, aten.to}
GATHERED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# Their kernels read sizes or errors back to the host
WAITING = {
    aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten._unique2, aten.unique_dim,
    aten._linalg_eigh, aten._linalg_solve_ex, aten.multinomial,
}  # fmt: skip
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Convolution:
    """A convolution or one of its gradients: FLOPs, whether the clips and gradients that it reads
    are channels-last, and where it was asked for."""

    flops: float
    dimensions: int
    channels_last: bool
    place: str


@dataclass(frozen=True)
class Attention:
    dtype: torch.dtype
    width: int  # of a head
    masked: bool

    @property
    def fused(self) -> bool:
        """Whether a kernel takes it that keeps no T x T matrix: FlashAttention, or the
        memory-efficient one, which takes float32 and heads of any width that is aligned."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return not self.masked and (self.width <= 256 or self.width % 8 == 0)
        return not self.masked and self.dtype == torch.float32 and self.width % 4 == 0


class FakeGPU(FakeTensorMode):
    """Raises RuntimeError where an operation mixes devices, or fills a tensor by another device's
    generator.

    waits: how often the host would wait for the GPU, by operation and place. convolutions,
    attentions: all of them. softmaxes: places of those that are no part of attention. What the host
    reads of the GPU is 1 in float64, in which clips are counted, and 0 in any other type.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.within = False  # an operation on the GPU, made of others
        self.waits: Counter[str] = Counter()
        self.convolutions: list[Convolution] = []
        self.attentions: list[Attention] = []
        self.softmaxes: Counter[str] = Counter()
        self.attending = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        asked = torch.device(kwargs.get("device") or "cpu").type
        if not (self.within or asked == "cuda" or any(isinstance(x, FakeTensor) for x in leaves)):
            return func(*args, **kwargs)
        if self.within:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket in READS:
            return self._read(args[0])
        self._check_index(func, args)
        self.within = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if func in (aten.convolution.default, aten.convolution_backward.default):
                result = _as_cudnn(result, [x for x in args[:3] if isinstance(x, Tensor)])
        finally:
            self.within = False
        self._check_generators(func, leaves, result)
        self._note(func, args, kwargs, result)
        return result

    def _read(self, tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            self._wait("item")
        if tensor.dtype == torch.bool:
            return False
        return float(tensor.dtype == torch.float64) if tensor.is_floating_point() else 0

    def _check_index(self, func: Any, args: Any) -> None:
        """FakeTensorMode lets any index through; a GPU's cannot pick from a tensor of the CPU."""
        if func not in GATHERED:
            return
        devices = {index.device.type for index in args[1] if index is not None}
        if "cuda" in devices and args[0].device.type == "cpu":
            raise RuntimeError(f"{func}: an index on the GPU, its tensor is on the CPU")
        if "cpu" in devices and args[0].device.type == "cuda":
            self._wait("index of the CPU")
        masks = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        # with one number of the CPU a mask is filled, without counting what it picks
        if masks and (func is aten.index.Tensor or args[2].numel() > 1 or args[2].is_cuda):
            self._wait("mask")

    def _check_generators(self, func: Any, leaves: list[Any], result: Any) -> None:
        for generator in (x for x in leaves if isinstance(x, Generator)):
            place = "cuda" if generator.initial_seed() in GPUGenerator.seeds else "cpu"
            filled = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
            if filled != {place}:
                raise RuntimeError(f"{func}: a generator of the {place} fills a tensor on {filled}")

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.overloadpacket in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            names = [argument.name for argument in func._schema.arguments]
            blocking = not {**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking")
            if blocking and source.device.type != result.device.type:
                self._wait(f"copy to the {result.device.type}")
        elif func.overloadpacket in WAITING and args[0].device.type == "cuda":
            self._wait(str(func.overloadpacket))
        elif func is aten.convolution.default:
            flops = 2.0 * result.numel() * args[1][0].numel()
            self._convolution(flops, args[0])
        elif func is aten.convolution_backward.default:
            flops = 2.0 * args[0].numel() * args[2][0].numel()
            self._convolution(flops, *args[:2])
        elif func is aten._softmax.default and not self.attending:
            self.softmaxes[_place()] += 1

    def _convolution(self, flops: float, *tensors: Tensor) -> None:
        layout = LAYOUTS.get(tensors[0].ndim, torch.contiguous_format)
        last = all(tensor.is_contiguous(memory_format=layout) for tensor in tensors)
        self.convolutions.append(
            Convolution(flops, tensors[0].ndim, last, "" if last or flops < 1e9 else _place())
        )

    def _wait(self, what: str) -> None:
        self.waits[f"{what} at {_place()}"] += 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notes calls of scaled_dot_product_attention, which computes as ever."""
        attend = torch.nn.functional.scaled_dot_product_attention

        def noted(query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
            mask = args[0] if args else settings.get("attn_mask")
            self.attentions.append(Attention(query.dtype, query.shape[-1], mask is not None))
            before, self.attending = self.attending, True
            try:
                return attend(query, key, value, *args, **settings)
            finally:
                self.attending = before

        with patch("torch.nn.functional.scaled_dot_product_attention", noted):
            yield


def _as_cudnn(result: Any, inputs: list[Tensor]) -> Any:
    """Returns results of a convolution channels-last where anything that it reads is; without a
    driver torch does not choose cuDNN for bfloat16, and leaves the layout."""
    layout = LAYOUTS.get(inputs[0].ndim)
    if layout is None or not any(
        x.is_contiguous(memory_format=layout) and not x.is_contiguous()
        for x in inputs
        if x.ndim == inputs[0].ndim
    ):
        return result
    if isinstance(result, Tensor):
        return result.to(memory_format=layout)
    return tuple(
        x if x is None or x.ndim != inputs[0].ndim else x.to(memory_format=layout) for x in result
    )


def _place() -> str:
    """Names the innermost lines of our own code, or those of a library that called for it."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frames = [
        frame
        for frame in frames
        if not frame.filename.endswith(("/fake_gpu.py", "/fake_backward.py"))
    ]
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT / "src"))]
    return " < ".join(
        f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
        for frame in (ours or frames)[:-3:-1]
    )


class GPUGenerator(Generator):
    """Stands for one of CUDA, which cannot be made without CUDA; known by its seed to whoever is
    handed it."""

    seeds: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls) if torch.device(device).type == "cuda" else Generator(device)

    def manual_seed(self, seed: int) -> Generator:
        self.seeds.add(seed)
        return super().manual_seed(seed)


def swap_tensors(one: Tensor, other: Tensor) -> None:
    """torch.utils' own refuses tensors that a FakeTensorMode has seen."""
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    gpu = FakeGPU()
    with (
        patch("torch.utils.swap_tensors", swap_tensors),
        patch("acetate.draws.Generator", GPUGenerator),
        # without a driver, autocast would turn itself off
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda: True),
        patch("torch.cuda._cached_device_count", 0),  # else the driver is looked for every time
        fake_backward(),
        gpu.watched(),
        gpu,
    ):
        yield gpu
