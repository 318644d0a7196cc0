"""acetate cost experiment=NAME [...]: time, communication and data of a run on 1 to 512 GPUs."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from acetate import memory
from acetate.blank import blank_transformer, blank_vae
from acetate.cli import run
from acetate.commands import as_on_gpu
from acetate.commands.checkpointing import automatic, settled
from acetate.commands.estimate import blank_task, clip_ranks, footprint
from acetate.cost import Assumptions, Cost, Gpu, cost, latent_sample_bytes, payload, trained_groups
from acetate.models.image_encoder import TOKENS
from acetate.models.wan import Geometry
from acetate.replacing import check_out, write_json

# a footprint that says no to `shards`
UNSHARDED = "no base that is rounded, offloaded (task.base) or widened for a given picture"
DOUBLINGS = [2**n for n in range(21)]  # to a million GPUs, more than anyone has


def card(config: DictConfig) -> Gpu:
    """Returns the card of the config, with its peak in the precision that the run computes in."""
    presets = {**config.cost.gpu}
    fp32 = presets.pop("fp32_tflops")
    return Gpu(**presets | ({"peak_tflops": fp32} if config.trainer.precision == "32-true" else {}))


def sample_bytes(config: DictConfig, load: memory.Load) -> float:
    """Returns the bytes that a GPU reads for each clip: a sample of the latent cache, or the whole
    clip in its shard, whatever is cut from it."""
    if "latents" not in config.data:
        return config.cost.clip_mb * 1e6
    shape = Geometry.of(blank_vae(config.wan.vae)).latent_shape(
        load.frames, load.height, load.width
    )
    dit = blank_transformer(config.wan.transformer, torch.float32).config
    tokens = min(config.cost.prompt_tokens, load.prompt_length)
    given = "condition_dropout" in config.task  # of image to video
    image = (TOKENS, dit.image_dim) if given and dit.image_dim else None
    return latent_sample_bytes(shape, tokens, dit.text_dim, condition=given, image=image)


def limit(at: Callable[[int], Cost], least: float, shared: int = 1) -> Cost | None:
    """Returns the first of 1, 2, 4, ... GPUs where less than `least` of a step computes; None where
    there is none. shared: GPUs of a clip, which are counted as one."""
    return next((one for n in DOUBLINGS if (one := at(shared * n)).scaling < least), None)


def shares(batch: int, batch_size: int, gpus: Iterable[int], shared: int = 1) -> dict[int, int]:
    """Returns the numbers of GPUs that share a batch of clips in whole passes, with the passes of
    each GPU; the last number is the most. shared: GPUs of a pass."""
    most = batch // batch_size
    readers = sorted({*(n // shared for n in gpus if n % shared == 0), most})
    return {shared * n: most // n for n in readers if most % n == 0}


def verdicts(
    bad: Cost | None, fixed: list[Cost], least: float, batch: int, batch_size: int
) -> tuple[str, str]:
    """Says where a run stops scaling, with a batch for every GPU and with one over all of them."""
    if bad is None:
        weak = f"at least {least:.0%} of a step computes up to {DOUBLINGS[-1]:,} GPUs"
    else:
        weak = (
            f"stops scaling at {bad.gpus:,} GPUs: {bad.scaling:.1%} of a step computes, less than "
            f"{least:.0%}"
        )
    times = ", ".join(f"{digits(one.step)} s on {one.gpus:,}" for one in fixed)
    most = fixed[-1].gpus
    return (
        f"where every GPU gets {batch_size} clip{'s' * (batch_size > 1)} at a time: {weak}",
        f"where all GPUs share {batch:,} clips a step (cost.global_batch): a step takes {times}; "
        f"stops scaling at {most:,} GPU{'s' * (most > 1)}, as no clips are left for more",
    )


def digits(value: float) -> str:
    """Writes three significant digits: a message takes microseconds, a step minutes."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def table(costs: list[Cost]) -> Table:
    view = Table("GPUs", "step, s", "compute, s", "communication, s", "sent per GPU, GB", "clips/s",
        "computes",
                 *(["exchange, s"] if costs[0].exchange else []),
                 "data per node, MB/s", "fits")  # fmt: skip
    for one in costs:
        view.add_row(
            str(one.gpus), digits(one.step), digits(one.compute), digits(one.communication),
            digits(one.sent / 1e9),
            digits(one.clips_per_second), f"{one.scaling:.0%}",
            *([digits(one.exchange)] if costs[0].exchange else []), digits(one.data_per_node / 1e6),
            "yes" if one.fits else "no",
        )  # fmt: skip
    return view


def check(config: DictConfig) -> None:
    """Raises ValueError for numbers of GPUs and clips that do not divide, and for a card that is
    none."""
    settings, shared = config.cost, clip_ranks(config)
    gpus = settings.gpus
    if not any(n % shared == 0 for n in gpus):
        raise ValueError(
            f"cost.gpus={gpus}: none is a multiple of task.context_parallel={shared}, the GPUs "
            "of a clip"
        )
    if not OmegaConf.is_dict(settings.gpu):
        raise ValueError(
            f"cost.gpu={settings.gpu}; a preset is chosen with gpu@cost.gpu={settings.gpu}"
        )
    batch, size = settings.global_batch, config.data.batch_size
    if batch is not None and batch % size:
        raise ValueError(
            f"cost.global_batch={batch}; a multiple of data.batch_size={size}, the clips of a GPU, "
            "or null for a node's"
        )


def storage(config: DictConfig, sample: float) -> tuple[float, str]:
    """Returns the bytes of a data set of `cost.clips` clips and a text about it; sample: bytes of
    one."""
    clips, each = config.cost.clips, digits(sample / 1e6)
    if "latents" in config.data:
        samples = config.cost.samples_per_clip
        windows = f"{samples} (cost.samples_per_clip: windows times variants) of a clip"
        return clips * samples * sample, f"latent cache: {each} MB a sample, {windows}"
    named = "cost.clip_mb; 81 frames at 480x832 take about 13 in FFV1"
    return clips * sample, f"clip shards: {each} MB a clip ({named}), read whole for every crop"


def for_card(config: DictConfig, gpu: Gpu) -> tuple[DictConfig, memory.Load, memory.Footprint]:
    """Returns the config with checkpointing as it is on a card where it is `auto`, and what a step
    takes then."""
    chosen = settled(config, False)
    load, found = footprint(chosen)
    if automatic(config) and found.held(1, False) > memory.room(gpu.memory_gib):
        chosen = settled(config, True)
        load, found = footprint(chosen)
    return chosen, load, found


@as_on_gpu()
def main(config: DictConfig) -> None:
    if config.out is not None:
        check_out(Path(config.out))
    settings = config.cost
    check(config)
    gpu = card(config)
    assumed = Assumptions(**{of.name: settings[of.name] for of in fields(Assumptions)})
    config, load, found = for_card(config, gpu)
    shared = found.clip_ranks
    with memory.one_of(shared):
        trained = trained_groups(blank_task(config))
    read = sample_bytes(config, load)
    console = Console(width=120, highlight=False)
    console.print(
        f"{config.name} on {gpu.name}: {found.flops / 1e12:,.2f} TFLOP a step and GPU "
        f"({load.batch_size} clip{'s' * (load.batch_size > 1)} of {load.frames} frames, "
        f"{load.height}x{load.width}; recomputation included)\nassumed: {assumed.efficiency:.0%} "
        f"of {gpu.peak_tflops:g} TFLOP/s ({config.trainer.precision}), "
        f"{assumed.bandwidth_share:.0%} of {gpu.link_gb_s:g} GB/s in a node and {gpu.node_gb_s:g} "
        f"GB/s between nodes of {gpu.gpus_per_node}, communication hidden under "
        f"{assumed.overlap:.0%} of the compute"
    )
    passes = config.trainer.accumulate_grad_batches
    batch = settings.global_batch or load.batch_size * passes * max(1, gpu.gpus_per_node // shared)
    results: dict[str, Any] = {"global_batch": batch, "limit": {}, "fixed_batch": {}}
    for strategy in settings.strategies:
        if strategy == "fsdp" and not found.shards:
            console.print(f"FSDP2 left out: it shards {UNSHARDED}")
            continue
        sent = payload(found, strategy, trained)
        at = partial(
            cost, found=found, strategy=strategy, sent=sent, gpu=gpu, assumed=assumed,
            batch_size=load.batch_size,
            clip_bytes=read,
        )  # fmt: skip
        costs = [at(n, accumulate=passes) for n in sorted(settings.gpus) if n % shared == 0]
        fixed = [
            at(gpus, accumulate=n)
            for gpus, n in shares(batch, load.batch_size, settings.gpus, shared).items()
        ]
        bad = limit(partial(at, accumulate=passes), settings.least_scaling, shared)
        view = table(costs)
        view.title = {"ddp": "DDP", "fsdp": "FSDP2"}[strategy]
        console.print(view)
        for text in verdicts(bad, fixed, settings.least_scaling, batch, load.batch_size):
            console.print(f"{view.title}, {text}")
        results[strategy] = [{**asdict(one), "scaling": one.scaling} for one in costs]
        results["limit"][strategy] = bad and bad.gpus
        results["fixed_batch"][strategy] = [asdict(one) for one in fixed]
    stored, kind = storage(config, read)
    console.print(f"{kind}, {digits(stored / 1e12)} TB for {settings.clips:,} clips")
    if config.out is not None:
        figures = {
            "gpu": asdict(gpu),
            **asdict(assumed),
            "flops": found.flops,
            "sample_bytes": read,
        }
        figures["stored_bytes"] = stored
        write_json(Path(config.out), {"name": config.name, **asdict(load), **figures, **results})


if __name__ == "__main__":
    run("cost")
