"""A GPU without one: its tensors have shapes and no numbers, and what a real one refuses is
refused.

Tensors of the CPU keep their numbers, so that files are read and hashed as ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves


class FakeGPU(FakeTensorMode):
    """Raises RuntimeError where an operation mixes devices, or fills a tensor by another device's
    generator."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.within = False  # an operation on the GPU, made of others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        asked = torch.device(kwargs.get("device") or "cpu").type
        if not (self.within or asked == "cuda" or any(isinstance(x, FakeTensor) for x in leaves)):
            return func(*args, **kwargs)
        before, self.within = self.within, True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.within = before
        for generator in (x for x in leaves if isinstance(x, Generator)):
            place = "cuda" if generator.initial_seed() in GPUGenerator.seeds else "cpu"
            filled = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
            if filled != {place}:
                raise RuntimeError(f"{func}: a generator of the {place} fills a tensor on {filled}")
        return result


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
def fake_gpu() -> Iterator[None]:
    with (
        patch("torch.utils.swap_tensors", swap_tensors),
        patch("acetate.draws.Generator", GPUGenerator),
        FakeGPU(),
    ):
        yield
