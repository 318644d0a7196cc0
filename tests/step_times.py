"""python -m tests.step_times [ranks=[2,4]] [repeats=5]: the cost model's step times against those
of real processes.

A DoRA stage of 35 M parameters in fp32 on gloo, one thread each. The model is told what the same
processes reach just before, all at once: the FLOP/s of the same step where nothing is sent, and
bandwidth and latency of the collective that carries most of a strategy's bytes. Nothing is assumed
to be hidden under the compute.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from acetate import memory
from acetate.blank import blank_vae
from acetate.commands.estimate import blank_task, footprint
from acetate.cost import Assumptions, Gpu, cost, payload, trained_groups
from acetate.models.wan import Geometry
from tests.compose import composed
from tests.processes import launch
from tests.test_cost import Loss

LOADS = ((1, 9, 48), (2, 9, 64))  # clips of a process, their frames, their height and width


def main(ranks: Sequence[int] = (2, 4), repeats: int = 5) -> None:
    table = Table("processes", "strategy", "clips, frames, size", "GFLOP/s", "GB/s", "compute, s",
        "communication, s",
                  "predicted, s", "measured, s", "predicted / measured")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(0)
        WanTransformer3DModel(
            num_attention_heads=8, attention_head_dim=64, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=64,
            ffn_dim=2048, num_layers=8, rope_max_seq_len=64,
        ).save_pretrained(folder / "transformer")  # fmt: skip
        needs = {load: footprint(config_of(folder, load))[1] for load in LOADS}
        any_load = needs[LOADS[0]]
        trained = trained_groups(blank_task(config_of(folder, LOADS[0])))
        sizes = {
            "ddp": min(25 * 2**20, payload(any_load, "ddp", 0).reduced),
            "fsdp": payload(any_load, "fsdp", 0).gathered // 2 // (any_load.groups - 1),
        }
        for world in tqdm(ranks, unit="launch"):
            for (strategy, load), (alone, seconds, rate, latency) in launch(
                world, measured, folder, sizes, repeats
            )[0]:
                speed = needs[load].flops / alone
                gpu = Gpu(
                    "a process",
                    speed / 1e12,
                    1000,
                    gpus_per_node=world,
                    link_gb_s=rate,
                    node_gb_s=rate,
                )
                expected = cost(
                    world, needs[load], strategy, payload(needs[load], strategy, trained), gpu=gpu,
                    assumed=Assumptions(efficiency=1.0, bandwidth_share=1.0, overlap=0.0,
                    latency_us=1e6 * latency),
                    batch_size=load[0], clip_bytes=0.0,
                )  # fmt: skip
                table.add_row(
                    str(world), strategy, "{}, {}, {}".format(*load), f"{speed / 1e9:.1f}",
                    f"{rate:.2f}",
                    f"{expected.compute:.3f}", f"{expected.communication:.3f}",
                    f"{expected.step:.3f}",
                    f"{seconds:.3f}", f"{expected.step / seconds:.2f}",
                )  # fmt: skip
    Console(width=140).print(table)


def measured(folder: Path, sizes: dict[str, int], repeats: int) -> list[tuple]:
    """((strategy, load), (seconds of a step that sends nothing, of one that does, GB/s, seconds of
    a message))."""
    alone = {load: step_time(folder, None, load, repeats) for load in LOADS}
    links = {strategy: link(strategy, size, repeats) for strategy, size in sizes.items()}
    return [
        (
            (strategy, load),
            (alone[load], step_time(folder, strategy, load, repeats), *links[strategy]),
        )
        for strategy in sizes
        for load in LOADS
    ]


def config_of(folder: Path, load: tuple[int, int, int]) -> DictConfig:
    clips, frames, size = load
    return composed(
        folder, "experiment=dit_dora", "rgba_vae=x", "data.latents=x", f"wan.transformer={folder}",
        "task.rank=32",
        f"data.batch_size={clips}", f"wan.frames={frames}", f"wan.height={size}",
        f"wan.width={size}",
        "wan.prompt_length=8", "trainer.precision=32-true",
    )  # fmt: skip


def step_time(
    folder: Path, strategy: str | None, load: tuple[int, int, int], repeats: int
) -> float:
    """Seconds of a whole training step on this rank; the ranks start each together."""
    config = config_of(folder, load)
    task = instantiate(config.task)
    if strategy == "fsdp":
        task._device_mesh = init_device_mesh(
            "cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",)
        )
    task.configure_model()
    loss = Loss(task)
    if strategy == "ddp":
        loss = DistributedDataParallel(loss)
    clips, frames, size = load
    shape = memory.Load(clips, frames, size, size, config.wan.prompt_length)
    made = task.example_batch(shape, Geometry.of(blank_vae(config.wan.vae)))
    batch = {
        name: torch.randn_like(value) if isinstance(value, Tensor) else value
        for name, value in made.items()
    }
    trains = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = task.configure_optimizers()["optimizer"]

    def step() -> None:
        loss(batch).backward()
        clip_grad_norm_(trains, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return median_of(step, repeats)


def link(strategy: str, size: int, repeats: int) -> tuple[float, float]:
    """GB/s of the strategy's ring for tensors of `size` bytes, and seconds of a message."""
    world = dist.get_world_size()
    messages = (world - 1) * (2 if strategy == "ddp" else 1)

    def seconds(numbers: int) -> float:
        whole, part = torch.zeros(numbers * world), torch.zeros(numbers)
        if strategy == "ddp":
            return median_of(lambda: dist.all_reduce(whole), 5 * repeats)
        return median_of(lambda: dist.all_gather_single(whole, part), 5 * repeats)

    least, numbers = seconds(1), size // (4 * world)
    return messages * 4 * numbers / (seconds(numbers) - least) / 1e9, least / messages


def median_of(work: Callable[[], object], repeats: int) -> float:
    """Seconds, after two turns that do not count."""
    found = []
    for _ in range(2 + repeats):
        dist.barrier()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


if __name__ == "__main__":
    main(**OmegaConf.from_cli(sys.argv[1:]))  # pyright: ignore[reportCallIssue]
