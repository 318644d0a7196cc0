"""Which kernels a training step of the published width runs, from PyTorch's profiler."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.gpu.published import batch_of, config_of, loss_of, task_of

pytestmark = pytest.mark.gpu
SIZES = {
    "vae_rgba_wan21": ["data.frames=9", "data.height=128", "data.width=128", "data.batch_size=1"],
    "dit_dora_wan21_1b": ["wan.frames=9", "wan.height=256", "wan.width=256"],
}
FUSED = ("flash", "cudnn", "efficient")
BLOCKS = 2  # of a DiT


class Profiled(NamedTuple):
    operations: set[str]
    kernels: Counter[str]  # microseconds, by name


def profiled(experiment, folder, device) -> Profiled:
    """The forward and backward pass of a step, once all is warm."""
    config = config_of(folder, experiment, *SIZES[experiment])
    task = task_of(config, device, blocks=BLOCKS)
    batch = batch_of(task, config, device)
    loss_of(task, batch, device).backward()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        loss_of(task, batch, device).backward()
        if device == "cuda":
            torch.cuda.synchronize()
    operations, kernels = set(), Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:
            operations.add(event.key)
        else:
            kernels[event.key] += event.self_device_time_total
    return Profiled(operations, kernels)


def check_attention(operations: set[str]) -> None:
    """A kernel that keeps no T x T matrix, there and back."""
    attention = {name for name in operations if "_scaled_dot_product" in name}
    fused = {name for name in attention if any(kind in name for kind in FUSED)}
    assert fused == attention, attention
    assert {name.endswith("_backward") for name in fused} == {False, True}, fused


def check_layouts(kernels: Counter[str]) -> None:
    total = sum(kernels.values())
    turned = {name: time for name, time in kernels.items() if "tonhwc" in name.lower()}
    turned |= {name: time for name, time in kernels.items() if "tonchw" in name.lower()}
    share = sum(turned.values()) / total
    print(f"{share:.2%} of {total / 1e3:.1f} ms in {turned}; most time in")
    for name, time in kernels.most_common(12):
        print(f"{time / 1e3:9.2f} ms  {name[:110]}")
    assert share < 0.05, f"{share:.1%} of the time turns layouts: {turned}"


def check_softmax(kernels: Counter[str]) -> None:
    assert not [name for name in kernels if "softmax" in name.lower()]


def test_convolutions_find_their_layout(tmp_path):
    found = profiled("vae_rgba_wan21", tmp_path, "cuda")
    assert found.kernels
    check_layouts(found.kernels)


def test_attention_is_fused(tmp_path):
    found = profiled("dit_dora_wan21_1b", tmp_path, "cuda")
    assert found.kernels
    check_attention(found.operations)
    check_softmax(found.kernels)
