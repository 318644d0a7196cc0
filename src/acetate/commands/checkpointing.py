"""Chooses `checkpointing: auto` of a run: off where the step without it fits the card, else on."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from omegaconf import DictConfig, OmegaConf

from acetate.commands.recorded import run_of
from acetate.commands.runs import RECORD, rank
from acetate.data.latents import LatentDataModule
from acetate.data.shards import read_manifest
from acetate.replacing import written

log = logging.getLogger(__name__)
GIB = 2**30
# Settings that may be `auto`, of the DiT stage and of the VAE stage
CHECKPOINTING = ("task.checkpointing", "model.checkpointing")


def automatic(config: DictConfig) -> str | None:
    """Returns the name of the setting of checkpointing that is `auto`; None where none is."""
    names = (name for name in CHECKPOINTING if OmegaConf.select(config, name) == "auto")
    return next(names, None)


def forced(config: DictConfig) -> bool | None:
    """Returns the flag that other settings leave of `auto`: blocks in the host's memory need
    checkpointing, clips in chunks cannot have it. None: either."""
    if OmegaConf.select(config, "task.base.offload"):
        return True
    return None if OmegaConf.select(config, "model.chunk") is None else False


def settled(config: DictConfig, value: bool) -> DictConfig:
    """Returns the config with a flag in the place of `auto`: the value, unless another is
    forced."""
    name, only = automatic(config), forced(config)
    if name is None:
        return config
    config = config.copy()
    OmegaConf.update(config, name, value if only is None else only)
    return config


def card(trainer: DictConfig) -> tuple[float, int] | None:
    """Returns the GiB of the smallest card of this machine that the trainer takes, and how many it
    takes of all machines; None where it trains on a CPU."""
    if trainer.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return None
    wanted = -1 if trainer.devices == "auto" else trainer.devices
    wanted = list(wanted) if OmegaConf.is_list(wanted) else wanted
    devices = CUDAAccelerator.parse_devices(wanted) or [0]
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in devices]
    return min(sizes) / GIB, len(devices) * trainer.num_nodes


def settle_checkpointing(config: DictConfig, checkpoint: str | None, data: Any) -> DictConfig:
    """Returns the config with a flag in the place of `auto`, which it says and records.

    What the run has recorded is kept, and what that of the checkpoint has. data: of the run, whose
    largest clips count where it reads a cache.
    """
    name = automatic(config)
    if name is None:
        return config
    only = forced(config)
    if only is not None:
        value, why = only, "task.base.offload and model.chunk leave no other"
    else:
        value, why = _recorded(config, name, checkpoint) or _chosen(config, data)
    _record(name, value)
    if rank() == 0:
        log.info("%s=%s (auto): %s", name, str(value).lower(), why)
    return settled(config, value)


def _chosen(config: DictConfig, data: Any) -> tuple[bool, str]:
    """Returns what fits the card, and why."""
    from acetate import memory  # and all tasks, of which most runs need one
    from acetate.commands.estimate import footprint

    there = card(config.trainer)
    if there is None:
        return False, "no card, whose memory would count"
    gib, gpus = there
    sharded = "Sharded" in str(OmegaConf.select(config, "trainer.strategy._target_"))
    try:
        load, found = footprint(settled(_with_largest(config, data), False))
    except ValueError as error:  # a base whose shape is known when it is loaded
        return True, f"what a step takes without it is not known ({error})"
    needed, room = found.held(gpus, sharded) / GIB, memory.room(gib) / GIB
    clips = f"{load.batch_size} x {load.frames} frames of {load.height}x{load.width}"
    said = f"without it a step takes {needed:.1f} GiB ({clips}), of {room:.1f} on this card"
    return needed > room, said


def _with_largest(config: DictConfig, data: Any) -> DictConfig:
    """Returns the config with the size of the largest clips of the cache that is trained on."""
    if not isinstance(data, LatentDataModule):
        return config
    manifests = [read_manifest(folder, "latents") for folder in data.folders]
    samples = [s for one in manifests for shard in one["shards"] for s in shard["samples"]]
    if not samples:  # which the data module tells
        return config
    from acetate.blank import blank_vae
    from acetate.models.wan import Geometry

    geometry = Geometry.of(blank_vae(config.wan.vae))
    frames, height, width = max((s["shape"] for s in samples), key=math.prod)
    config = config.copy()
    config.wan.frames = 1 + (frames - 1) * geometry.time_stride
    config.wan.height, config.wan.width = (n * geometry.space_stride for n in (height, width))
    return config


def _recorded(config: DictConfig, name: str, checkpoint: str | None) -> tuple[bool, str] | None:
    """Returns the flag that this run has recorded, or that of the checkpoint, and where."""
    runs = [Path(config.paths.run), *([run_of(checkpoint)] if checkpoint else [])]
    for run in runs:
        if run is not None and (file := run / RECORD / "config.yaml").is_file():
            value = OmegaConf.select(OmegaConf.load(file), name)
            if isinstance(value, bool):
                return value, f"as {run} has it; another with {name}=..."
    return None


def _record(name: str, value: bool) -> None:
    """Writes the flag into the config that Hydra has recorded of this run."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or hydra.output_subdir is None:  # another rank has
        return
    file = Path(hydra.runtime.output_dir) / hydra.output_subdir / "config.yaml"
    held = OmegaConf.load(file)
    OmegaConf.update(held, name, value)
    with written(file) as text:
        text.write(OmegaConf.to_yaml(held))
