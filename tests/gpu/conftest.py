"""What only a GPU can settle. Every test's body takes a device, so that it can be rehearsed."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.gpu.training import STAGES, Train, trainer_of

# cuBLAS reads it once in a process, before any of these tests; deterministic runs need it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def card():
    """Skips before anything is made for the tests."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def torch_as_before():
    """Whatever a run has set."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
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
