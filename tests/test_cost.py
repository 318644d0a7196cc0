import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from acetate import memory
from acetate.blank import blank_vae
from acetate.commands.estimate import blank_task, footprint
from acetate.cost import (
    Assumptions,
    Gpu,
    Payload,
    bandwidth,
    cost,
    latent_sample_bytes,
    payload,
    ring,
    trained_groups,
)
from acetate.data.shards import MANIFEST
from acetate.models.text import TextEncoder
from acetate.models.wan import Geometry
from tests.compose import composed
from tests.paths import ROOT
from tests.processes import launch

GPU = Gpu(name="x", peak_tflops=1e-9, memory_gib=1, gpus_per_node=8, link_gb_s=1e-6, node_gb_s=5e-7)
EXACT = Assumptions(efficiency=1.0, bandwidth_share=1.0, overlap=0.0, latency_us=0.0)
FOUND = memory.Footprint(
    parameters=30, trainable_parameters=10, frozen=800, trainable=40, gradients=40, optimizer=80,
    ema=0,
    activations=1000, working=50, replicated=100, gathered=300, groups=3, flops=5000,
)  # fmt: skip
LOAD = memory.Load(batch_size=2, frames=5, height=24, width=24, prompt_length=8)
TINY = ["experiment=dit_dora", "rgba_vae=x", "data.latents=x", "data.batch_size=2", "wan.frames=5",
    "wan.height=24",
        "wan.width=24", "wan.prompt_length=8", "trainer.precision=32-true"]  # fmt: skip


VAE = ["experiment=vae_rgba", "data.shards=x", "data.batch_size=2", "data.frames=5",
    "data.height=24", "data.width=24",
       "wan.prompt_length=8", "trainer.precision=32-true"]  # fmt: skip


def tiny_task(stage=TINY, folder=ROOT):
    """A task on the shipped base, with weights, and its VAE's geometry. folder: for what it
    writes."""
    config = composed(folder, *stage)
    torch.manual_seed(0)
    task = instantiate(config.task)
    task.configure_model()
    return task, Geometry.of(blank_vae(config.wan.vae))


def tiny_batch(task, geometry, load=LOAD):
    batch = task.example_batch(load, geometry)
    return {
        name: torch.zeros_like(value) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def test_ring_by_hand():
    """Four GPUs all-reduce 100 bytes: six messages of 25."""
    assert ring(4, Payload(reduced=100, gathered=0, scattered=0, collectives=1)) == (150, 6)
    assert ring(4, Payload(reduced=0, gathered=100, scattered=60, collectives=2)) == (120, 6)
    assert ring(1, Payload(reduced=100, gathered=100, scattered=60, collectives=5)) == (0, 0)


def test_a_ring_is_as_quick_as_its_slowest_link():
    assert bandwidth(8, GPU, EXACT) == pytest.approx(1000)
    assert bandwidth(9, GPU, EXACT) == pytest.approx(500)
    assert bandwidth(
        9, replace(GPU, node_gb_s=1.0), replace(EXACT, bandwidth_share=0.5)
    ) == pytest.approx(500)


def test_payloads():
    assert payload(FOUND, "ddp", 2) == Payload(reduced=40, gathered=0, scattered=0, collectives=1)
    sharded = payload(FOUND, "fsdp", 2)
    assert sharded == Payload(reduced=0, gathered=2 * (700 + 40), scattered=40, collectives=8)


def test_a_step_by_hand():
    """1000 FLOP/s, 1000 bytes/s: 5 s of compute; 4 GPUs send 2 * 3/4 * 40 bytes."""
    sent = payload(FOUND, "ddp", 2)
    settings = {"gpu": GPU, "batch_size": 2, "clip_bytes": 10.0}
    one = cost(1, FOUND, "ddp", sent, assumed=EXACT, **settings)
    assert (one.compute, one.communication, one.step, one.sent, one.scaling) == pytest.approx(
        (5, 0, 5, 0, 1)
    )
    four = cost(4, FOUND, "ddp", sent, assumed=replace(EXACT, latency_us=1e6), **settings)
    assert four.sent == 60 and four.communication == pytest.approx(0.06 + 6)
    assert four.step == pytest.approx(11.06) and four.scaling == pytest.approx(5 / 11.06)
    assert four.clips_per_second == pytest.approx(
        8 / 11.06
    ) and four.data_per_node == pytest.approx(80 / 11.06)
    hidden = cost(
        4, FOUND, "ddp", sent, assumed=replace(EXACT, overlap=0.1, latency_us=1e5), **settings
    )
    assert hidden.step == pytest.approx(5 + 0.66 - 0.5)


def test_ranks_of_a_clip_by_hand():
    """Two share a clip: half of 800 bytes leave each, in four messages, and nothing hides them."""
    found = replace(FOUND, clip_ranks=2, exchanged=800, exchanges=4)
    sent = payload(found, "ddp", 2)
    four = cost(
        4, found, "ddp", sent, gpu=GPU, assumed=replace(EXACT, latency_us=1e5, overlap=1.0),
        batch_size=2, clip_bytes=10.0, accumulate=3,
    )  # fmt: skip
    assert four.exchange == pytest.approx(3 * (400 / 1000 + 4 * 0.1))
    assert four.step == pytest.approx(15 + four.exchange) and four.sent == 60 + 3 * 400
    assert four.clips_per_second == pytest.approx(2 * 2 * 3 / four.step)
    assert four.data_per_node == pytest.approx(4 * 2 * 3 / four.step * 10)


@pytest.mark.slow
def test_what_ranks_of_a_clip_hold_and_exchange(tmp_path):
    """q, k, v and output of every block, forward, recomputed and backward, and the velocity once
    each way."""
    whole, part = (
        footprint(
            composed(
                tmp_path, *TINY, f"task.context_parallel={n}", "task.checkpointing=true",
                "wan.height=96", "wan.width=96",
            )
        )[1]
        for n in (1, 2)
    )  # fmt: skip
    tokens, width, blocks = 2 * 2 * 12 * 12, 128, 8  # of two clips
    each = tokens // 2 * width * 4
    assert part.exchanged == blocks * 3 * 4 * each + 2 * tokens * 64 * 4
    assert (part.exchanges, part.clip_ranks) == (blocks * 3 * 2 + 2, 2)
    assert (whole.exchanged, whole.clip_ranks) == (0, 1)
    assert part.activations == pytest.approx(whole.activations / 2, rel=0.1)
    assert part.flops == pytest.approx(whole.flops / 2, rel=0.1)
    assert part.trainable == whole.trainable


def test_accumulation_reduces_once_and_gathers_every_time():
    settings = {"gpu": GPU, "assumed": EXACT, "batch_size": 1, "clip_bytes": 1.0, "accumulate": 3}
    for strategy, times in (("ddp", 1), ("fsdp", 3)):
        sent = payload(FOUND, strategy, 2)
        found = cost(2, FOUND, strategy, sent, **settings)
        assert found.compute == pytest.approx(15) and found.sent == times * ring(2, sent)[0]


def test_a_node_reads_for_its_own_gpus():
    sent = Payload(reduced=0, gathered=0, scattered=0, collectives=0)
    settings = {"gpu": GPU, "assumed": EXACT, "batch_size": 1, "clip_bytes": 10.0}
    assert cost(64, FOUND, "ddp", sent, **settings).data_per_node == pytest.approx(8 / 5 * 10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("stage", "setting"), [(TINY, "task.checkpointing"), (VAE, "model.checkpointing")]
)
def test_flops_are_those_of_a_real_step(stage, setting, checkpointing, tmp_path, two_blocks):
    """Counted by torch on real tensors; for a CPU's attention it has to be told its own
    formulas."""
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    chosen = [*stage, f"{setting}={checkpointing}", two_blocks]
    task, geometry = tiny_task(chosen, tmp_path)
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        task.example_loss(tiny_batch(task, geometry)).backward()
    _, found = footprint(composed(tmp_path, *chosen))
    assert found.flops == counter.get_total_flops() > 0


def test_bytes_of_a_sample_are_those_of_real_shards(cached):
    folder = cached[0]
    manifest = json.loads((folder / MANIFEST).read_text())
    channels = manifest["geometry"]["channels"]
    for shard in manifest["shards"]:
        text_dim = TextEncoder(str(ROOT / "assets/wan-tiny"), 64)("").shape[1]
        sizes = [
            latent_sample_bytes((channels, *one["shape"]), one["tokens"], text_dim)
            for one in shard["samples"]
        ]
        # a tar ends on two blocks and fills its record
        assert 0 <= shard["bytes"] - sum(sizes) < 1024 + 10240


def test_groups_that_train(tmp_path):
    """The DiT's eight blocks have adapters, what lies in none has not; three parts of the VAE, and
    not its judge."""
    for stage, groups, trained in ((TINY, 9, 8), (VAE, 12, 3)):
        config = composed(tmp_path, *stage)
        assert (footprint(config)[1].groups, trained_groups(blank_task(config))) == (
            groups,
            trained,
        )


class Loss(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, batch):
        return self.task.example_loss(batch)


class Collectives(TorchDispatchMode):
    """Bytes of whole tensors, by collective."""

    def __init__(self):
        super().__init__()
        self.bytes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0}
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if name in self.bytes:
            self.bytes[name] += max(
                x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor)
            )
            self.calls += 1
        return func(*args, **kwargs or {})


def sent_in_a_step(stage, folder):
    """What DDP and FSDP2 really hand to their collectives."""
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().nbytes)
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda done: done.value()[0])
        )

    task, geometry = tiny_task(stage, folder)
    batch = tiny_batch(task, geometry)
    whole = DistributedDataParallel(Loss(task))
    whole.register_comm_hook(None, hook)
    whole(batch).backward()

    task = instantiate(composed(folder, *stage).task)
    # as ShardedStrategy gives it
    task._device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    task.configure_model()
    with Collectives() as sharded:
        task.example_loss(batch).backward()
    return {
        "reduced": sum(reduced),
        "gathered": sharded.bytes["_allgather_base_"],
        "scattered": sharded.bytes["_reduce_scatter_base_"],
        "collectives": sharded.calls,
    }


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("stage", [TINY, VAE])
@pytest.mark.long
def test_payloads_are_those_of_real_processes(stage, tmp_path, two_blocks):
    stage = [*stage, two_blocks]
    real, _ = launch(2, sent_in_a_step, stage, tmp_path)
    config = composed(tmp_path, *stage)
    trained, (_, found) = trained_groups(blank_task(config)), footprint(config)
    assert real["reduced"] == payload(found, "ddp", trained).reduced
    sharded = asdict(payload(found, "fsdp", trained))
    for name in ("gathered", "scattered"):
        # shards are filled up to equal sizes
        assert real[name] == pytest.approx(sharded[name], rel=0.02), name
    assert real["collectives"] == sharded["collectives"]
