"""Shared by the parts of commands.benchmark: the clock, the memory, and failures that cost one way
alone."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DisagreementError(RuntimeError):
    """Ways do not compute the same step, so their speeds cannot be compared."""


def set_up(threads: int, cudnn_benchmark: bool) -> None:
    """Sets what a process holds for all ways alike. float32 means float32: TF32 is off."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = cudnn_benchmark


def now(device: str) -> float:
    """Returns the seconds of the clock once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], object], device: str) -> float:
    """Returns the seconds of one call: by the card's own events, or by the clock on a CPU."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def median_of(call: Callable[[], object], device: str, repeats: int) -> float:
    """Returns the median of the seconds of a call, after three that do not count."""
    return statistics.median([timed(call, device) for _ in range(3 + repeats)][3:])


@contextmanager
def peak_beyond(results: dict[str, Any], device: str) -> Iterator[None]:
    """Notes in `peak_memory` the bytes that a card holds at most within it, beyond those before it,
    and in `held_before` those before it; nothing on a CPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results["held_before"] = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    results["peak_memory"] = torch.cuda.max_memory_allocated() - results["held_before"]


def release(device: str) -> None:
    """Hands back to the card what no tensor needs any longer."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def failures_in(results: dict[str, Any], device: str) -> Iterator[None]:
    """Notes in `error` why the code within it failed, and goes on behind it: a way without memory
    or compiler does not cost the figures of the others."""
    try:
        yield
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        place = traceback.extract_tb(error.__traceback__)[-1]
        results["error"] = (
            f"{type(error).__name__}: {message[0][:300]} ({place.filename}:{place.lineno})"
        )
        error.__traceback__ = None  # its frames hold tensors
        release(device)


def failures_of(results: Any, path: str = "") -> Iterator[str]:
    """Yields every noted failure with the place of its way in the results."""
    if isinstance(results, Mapping):
        if "error" in results:
            yield f"{path}: {results['error']}"
        for name, value in results.items():
            yield from failures_of(value, f"{path}.{name}" if path else name)
    elif isinstance(results, list):
        for i, value in enumerate(results):
            yield from failures_of(value, f"{path}[{i}]")


def share_of(rates: Mapping[str, float], flops: Mapping[str, float], seconds: float) -> float:
    """Returns the seconds that the FLOPs of each kind take at their measured rate, over the seconds
    measured. Raises KeyError for a kind without a rate."""
    return sum(count / rates[kind] for kind, count in flops.items() if count) / seconds
