"""Keeps in the CPU's memory what a forward pass keeps for its backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PLACE = "cpu"  # `memory` puts it where nothing is counted


@contextmanager
def kept_in(place: str) -> Iterator[None]:
    """Keeps what is offloaded in another place than the CPU's memory."""
    global PLACE
    before, PLACE = PLACE, place
    try:
        yield
    finally:
        PLACE = before


def inputs_offloaded(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns run(block, x, *others) with what it keeps of x's shape, which is x itself where the
    block is computed again, on the CPU until the backward pass: pinned memory, and copies that
    nothing waits for.

    Others, such as the prompt's embedding, are small and the same for all blocks: they stay.
    """

    def offloaded(block: Callable[..., Any], x: Tensor, *others: Any, **named: Any) -> Any:
        shape = x.shape  # x itself would live as long as `pack`

        def pack(kept: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if kept.shape != shape:
                return kept
            if not kept.is_cuda:
                return kept.device, kept.to(PLACE)
            away = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
            return kept.device, away.copy_(kept, non_blocking=True)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            return packed[1].to(packed[0], non_blocking=True)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return run(block, x, *others, **named)

    return offloaded
