"""The backward pass without autograd's own engine, which asks the driver for every GPU that a graph
names, fake ones too."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


def _needed(roots: Sequence[Any]) -> Counter[Any]:
    """Counts how many nodes hand a gradient to each node below the roots."""
    waiting: Counter[Any] = Counter()
    seen, queue = set(roots), list(dict.fromkeys(roots))
    while queue:
        for child, _ in queue.pop().next_functions:
            if child is not None:
                waiting[child] += 1
                if child not in seen:
                    seen.add(child)
                    queue.append(child)
    return waiting


def _fitting(grad: Tensor | None, metadata: Any) -> Tensor | None:
    """Returns a gradient in the shape and precision that a node reads. Raises RuntimeError for one
    on another device, as the engine does."""
    if grad is None:
        return None
    if grad.device != metadata.device:
        raise RuntimeError(f"a gradient on {grad.device}, its tensor is on {metadata.device}")
    if grad.shape != metadata.shape:
        grad = grad.sum_to_size(metadata.shape)
    return grad.to(metadata.dtype)


def _run(node: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Returns the gradients of the inputs of a node; a leaf keeps its own."""
    if type(node).__name__ == "AccumulateGrad":
        leaf, (grad,) = node.variable, grads
        if grad is not None:
            leaf.grad = grad.detach() if leaf.grad is None else leaf.grad + grad
        return ()
    found = node.apply(*grads) if isinstance(node, BackwardCFunction) else node(*grads)
    return found if isinstance(found, tuple) else (found,)


def _backward(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    retain: bool,
    create: bool,
    *_: Any,
    **__: Any,
) -> tuple[()]:
    """Fills the .grad of every leaf below the outputs; the later an operation ran, the earlier its
    node does."""
    roots, order = [output.grad_fn for output in outputs], itertools.count()
    waiting, given = _needed(roots), defaultdict[Any, dict[int, Tensor]](dict)
    ready: list[tuple[int, int, Any]] = []
    for output, grad in zip(outputs, grads, strict=True):
        given[output.grad_fn][output.output_nr] = grad
        heappush(ready, (-output.grad_fn._sequence_nr(), next(order), output.grad_fn))
    while ready:
        *_, node = heappop(ready)
        incoming, edges = given.pop(node, {}), node.next_functions
        fitting = [_fitting(incoming.get(i), x) for i, x in enumerate(node._input_metadata)]
        found = _run(node, fitting) if incoming else [None] * len(edges)
        for (child, place), grad in zip(edges, found, strict=False):
            if child is None:
                continue
            if grad is not None:
                before = given[child].get(place)
                given[child][place] = grad if before is None else before + grad
            waiting[child] -= 1
            if not waiting[child]:
                heappush(ready, (-child._sequence_nr(), next(order), child))
    return ()


@contextmanager
def fake_backward() -> Iterator[None]:
    """Lets Tensor.backward run node by node, here. Checkpoints learn of it by the number of the
    pass."""
    numbers = itertools.count(1)
    number = -1

    def run(outputs: Any, *rest: Any, **settings: Any) -> tuple[()]:
        nonlocal number
        before, number = number, next(numbers)
        try:
            with torch.no_grad():
                return _backward(outputs, *rest, **settings)
        finally:
            number = before

    with (
        patch("torch.autograd._engine_run_backward", run),
        patch("torch._C._current_graph_task_id", lambda: number),
    ):
        yield
