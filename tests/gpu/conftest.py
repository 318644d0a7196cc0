"""What only a GPU can settle. Every test's body takes a device, so that it can be rehearsed."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.gpu.training import STAGES, Train, needs_card, trainer_of

# cuBLAS reads it once in a process, before any of these tests; deterministic runs need it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def card():
    """Skips where there is none; leaves torch as it was, whatever a run has set."""
    needs_card()
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield torch.cuda.get_device_name()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.cuda.empty_cache()


@pytest.fixture
def without_tf32(monkeypatch):
    """fp32 products with all of their bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(params=STAGES)
def train(request, many_shards, cached) -> Train:
    """Trains either tiny stage on the GPU."""
    return trainer_of(request.param, many_shards, cached, "cuda")
