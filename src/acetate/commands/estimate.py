"""acetate estimate experiment=NAME [...]: parameters and memory per GPU, before a run is
started."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from acetate import memory
from acetate.blank import BLANK, blank_vae
from acetate.cli import run
from acetate.commands import as_on_gpu
from acetate.commands.checkpointing import automatic, forced, settled
from acetate.models.wan import Geometry
from acetate.replacing import check_out, write_json
from acetate.tasks.example import MeasuredTask

GPUS = (1, 2, 4, 8)
SHARDED = "trainer=fsdp; with trainer=ddp every GPU needs column 1"
CARDS = (24, 40, 48, 80, 139)  # GiB; 139 are what a card sold as 141 GB has


def without_weights(node: Any) -> Any:
    """Returns the config with targets that read no weights."""
    if isinstance(node, list):
        return [without_weights(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        name: BLANK.get(value, value) if name == "_target_" else without_weights(value)
        for name, value in node.items()
    }


def blank_task(config: DictConfig) -> MeasuredTask:
    """Builds the task of the composed config without weights; `auto` is on, which takes the
    least."""
    settings = without_weights(OmegaConf.to_container(settled(config, True).task, resolve=True))
    # a metric, weights of the same shape, and what takes minutes
    unused = {"lpips": False, "init_from": None, "compile": False, "fused_norm": False}
    optimizer = settings.get("optimizer", "AdamW")
    if optimizer.startswith(("bitsandbytes.", "schedulefree.")):  # which need not be installed here
        unused["optimizer"] = "AdamW"
    task: Any = instantiate(
        settings | {name: value for name, value in unused.items() if name in settings}
    )
    task.optimizer = optimizer
    memory.build(task)
    return task


def footprint(config: DictConfig) -> tuple[memory.Load, memory.Footprint]:
    """Measures a training step of the composed run. Downloads nothing, reads configs only.

    Raises ValueError for a batch without clips.
    """
    wan, data = config.get("wan"), config.data
    if data.batch_size < 1:
        raise ValueError(f"data.batch_size={data.batch_size}; every GPU takes at least 1 clip")
    clip = data if "frames" in data else wan
    load = memory.Load(
        batch_size=data.batch_size,
        frames=clip.frames,
        height=clip.height,
        width=clip.width,
        prompt_length=0 if wan is None else wan.prompt_length,
    )
    with memory.one_of(clip_ranks(config)):
        return load, memory.measure(
            blank_task(config),
            load,
            precision=config.trainer.precision,
            ema=config.callbacks.get("ema") is not None,
            geometry=None if wan is None else Geometry.of(blank_vae(wan.vae)),
        )


def clip_ranks(config: DictConfig) -> int:
    """Returns how many ranks share a clip."""
    return (config.get("task") or {}).get("context_parallel", 1)


def counts(found: memory.Footprint) -> tuple[int, ...]:
    """Returns the numbers of GPUs that a run can be sharded over, and 1: whole on each."""
    return tuple(sorted({1, *(found.clip_ranks * n for n in GPUS)} if found.shards else {1}))


def table(found: memory.Footprint) -> Table:
    alone = "1 GPU" if found.clip_ranks == 1 else f"{found.clip_ranks} GPUs, trainer=ddp"
    heads = (alone if n == 1 else f"{n} GPUs, trainer=fsdp" for n in counts(found))
    view = Table("GiB per GPU", *heads)
    columns = [found.per_gpu(n) for n in counts(found)]
    for row in columns[0]:
        if row == "total":
            view.add_section()
        view.add_row(row, *(f"{column[row] / 2**30:.2f}" for column in columns))
    return view


def verdict(found: memory.Footprint, card: int) -> str:
    """Says how many GPUs of a card a run takes, or which share of the activations fits the most of
    them."""
    enough = [n for n in counts(found) if found.per_gpu(n)["total"] <= memory.room(card)]
    alone = "one GPU" if found.clip_ranks == 1 else f"the {found.clip_ranks} of a clip"
    if 1 in enough:
        return f"fits {alone}"
    if enough:
        return f"does not fit {alone}; fits {enough[0]}, {SHARDED}"
    most = found.per_gpu(counts(found)[-1])
    named = f"{counts(found)[-1]}, even sharded" if found.shards else alone
    clip = most["activations"] + most["working peak"]
    room = memory.room(card) - (most["total"] - clip)
    if room <= 0:
        named = named.removesuffix(", even sharded")
        return f"does not fit {named}: the weights alone are too large"
    return f"does not fit {named}: room for {room / clip:.0%} of activations and working peak"


def choices(found: memory.Footprint, without: memory.Footprint) -> dict[int, bool]:
    """Returns what `auto` becomes on each card: off where the step without it fits as many GPUs as
    the one with it needs, one at least."""
    chosen = {}
    for card in CARDS:
        room = memory.room(card)
        enough = [n for n in counts(found) if found.per_gpu(n)["total"] <= room]
        chosen[card] = without.per_gpu(enough[0] if enough else 1)["total"] > room
    return chosen


def remedies(config: DictConfig, load: memory.Load) -> list[str]:
    """Returns settings that take less memory, largest effect first; activations grow with clips,
    frames and pixels."""
    found = []
    for part in ("task", "model"):
        if (config.get(part) or {}).get("checkpointing") is False:
            found.append(f"{part}.checkpointing=true")
    task = config.get("task") or {}
    if task.get("checkpointing") and task.get("keep_attention"):
        found.append("task.keep_attention=false")
    base = task.get("base") or {}
    if base.get("weights") == "full":
        found.append("task.base.weights=fp8 (one GPU)")
    if base.get("offload") is False and task.get("checkpointing"):
        found.append("task.base.offload=true (one GPU)")
    if task.get("checkpointing") is True and "keep_attention" in task:
        found.append("task.checkpointing=offload")
    if "context_parallel" in task and "rgb_attends_alpha" not in task:  # which refuses it
        found.append(f"task.context_parallel={2 * task.context_parallel} (GPUs that share a clip)")
    if load.batch_size > 1:
        found.append(f"data.batch_size={load.batch_size // 2}")
    if "frames" in config.data:
        found.append("smaller data.frames, data.height, data.width")
    else:
        found.append("latents cached with fewer frames or a smaller area")
    return found


@as_on_gpu()
def main(config: DictConfig) -> None:
    if config.out is not None:
        check_out(Path(config.out))
    name = automatic(config)
    load, found = footprint(config)
    without = footprint(settled(config, False))[1] if name and forced(config) is None else None
    config = settled(config, True)
    verdicts = {card: verdict(found, card) for card in CARDS}
    chosen = choices(found, without) if without else {}
    console = Console(width=120, highlight=False)
    console.print(
        f"{config.name}: {found.parameters:,} parameters, {found.trainable_parameters:,} of them "
        f"train\na step per GPU: {load.batch_size} clip{'s' * (load.batch_size > 1)} of "
        f"{load.frames} frames, {load.height}x{load.width}, {config.trainer.precision}"
    )
    if found.clip_ranks > 1:
        console.print(f"{found.clip_ranks} GPUs share them (task.context_parallel)")
    for way, one in ((True, found), (False, without)):
        if one is not None:
            view = table(one)
            view.title = f"{name}={str(way).lower()}" if without else None
            console.print(view)
    if found.host:
        console.print(f"frozen weights in the host's memory: {found.host / 2**30:.2f} GiB per GPU")
    sharded = (
        "trainer=fsdp shards weights, gradients, optimizer and average: the other columns."
        if found.shards
        else "trainer=fsdp cannot shard such weights."
    )
    console.print(
        "trainer=ddp: however many GPUs, each holds column 1 and the gradients again. " + sharded
    )
    for card, text in verdicts.items():
        auto = f"; {name}=auto is {str(chosen[card]).lower()}" if chosen else ""
        console.print(f"{card:>4} GiB  {text}{auto}")
    console.print(f"less memory: {'; '.join(remedies(config, load))}")
    if config.out is not None:
        write_json(
            Path(config.out),
            {
                "name": config.name,
                **asdict(load),
                **asdict(found),
                "bytes_per_gpu": bytes_per_gpu(found),
                "cards": verdicts,
                **({"without_checkpointing": bytes_per_gpu(without)} if without else {}),
                **({"checkpointing": chosen} if chosen else {}),
            },
        )


def bytes_per_gpu(found: memory.Footprint) -> dict[str, dict[str, int]]:
    return {str(n): found.per_gpu(n) for n in counts(found)}


if __name__ == "__main__":
    run("estimate")
