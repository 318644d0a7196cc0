"""What the ranks of the distributed tests do."""

import csv
import os
import resource
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from acetate.callbacks.metrics_file import MetricsFile
from acetate.data.clips import ClipDataModule
from acetate.formats.sharded import read_sharded, write_sharded
from acetate.models.dit import add_dora, checkpoint_blocks, compile_blocks, velocity
from acetate.models.ulysses import ClipRanks, share_tokens
from tests.compose import composed

GLOBAL_BATCH = 4


class Losses(Callback):
    """Of every step, the mean over all ranks; and the bytes of the weights that this rank holds
    between steps."""

    def __init__(self):
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss)
        self.losses.append(float(loss) / dist.get_world_size())
        self.held = sum(p.nbytes for p in map(local, pl_module.parameters()))


def local(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def fit(
    folder: Path, trainer: str, overrides: Sequence[str], resume: Path | None = None
) -> dict[str, Any]:
    """A run that writes below the folder, always on the same global batches."""
    config = composed(
        folder, f"trainer={trainer}", "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "trainer.enable_model_summary=false", "callbacks.throughput=null",
        "callbacks.progress=null", "data.num_workers=0",
        f"data.batch_size={GLOBAL_BATCH // dist.get_world_size()}",
        *overrides,
    )  # fmt: skip
    seed_everything(0, verbose=False)
    losses = Losses()
    callbacks = [
        losses,
        *(callback for callback in instantiate(config.callbacks).values() if callback is not None),
    ]
    shared = config.task.get("context_parallel", 1)
    run: Trainer = instantiate(
        config.trainer, callbacks=callbacks, logger=MetricsFile(str(folder)),
        context_parallel=config.trainer.get("context_parallel", shared),
    )  # fmt: skip
    run.fit(instantiate(config.task), instantiate(config.data), ckpt_path=resume, weights_only=True)
    metrics = {
        name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val")
    }
    return {
        "losses": losses.losses,
        "metrics": metrics,
        "held": losses.held,
        "logged": logged(folder),
    }


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, on rank 0, without the times."""
    if dist.get_rank() > 0:
        return []
    with (folder / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if value and "perf/" not in name}
            for row in csv.DictReader(file)
        ]


def fits(runs: dict[str, tuple]) -> dict[str, dict[str, Any]]:
    """fit(*arguments) of each, one after the other."""
    return {name: fit(*arguments) for name, arguments in runs.items()}


def refused(*arguments: Any) -> str:
    """The error of such a run."""
    try:
        fit(*arguments)
    except (ValueError, InstantiationException) as error:
        return str(error)
    raise AssertionError("it ran")


def refusals(arguments: Sequence[tuple]) -> list[str]:
    """The error of each of several runs."""
    return [refused(*given) for given in arguments]


class Seen(LightningModule):
    """The keys of every batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.train_keys: list[list[str]] = []
        self.val_keys: list[str] = []

    def training_step(self, batch, batch_idx):
        self.train_keys.append(batch["key"])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.val_keys += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def keys(folders: Sequence[Path], workers: int, batches: int, batch_size: int) -> list[tuple]:
    """For each folder of shards, what this rank's loaders give in training and in one
    validation."""
    found = []
    for folder in folders:
        seen = Seen()
        data = ClipDataModule(
            shards=str(folder), frames=5, height=16, width=16, batch_size=batch_size, seed=0,
            num_workers=workers,
            val_batch_size=1, val_clips=100, bad_clip_budget=0, space_multiple=8,
        )  # fmt: skip
        Trainer(
            accelerator="cpu", devices=dist.get_world_size(), strategy="ddp", max_steps=batches,
            max_epochs=-1,
            val_check_interval=batches, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            logger=False,
            use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(seen, data)  # fmt: skip
        found.append((seen.train_keys, seen.val_keys))
    return found


def anonymous() -> int:
    """Bytes in memory of this process that are no pages of files, which the system takes back when
    it needs them."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def peak_of_loading(folder: Path) -> int:
    """Bytes by which this rank's memory grows at most while it makes its part of the folder's DiT,
    with DoRA."""
    config = composed(
        folder, "experiment=dit_dora", "rgba_vae=x", f"wan.transformer={folder}", "task.rank=4"
    )
    task = instantiate(config.task)
    task._device_mesh = init_device_mesh(
        "cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",)
    )
    before, seen, done = anonymous(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    task.configure_model()
    done.set()
    watcher.join()
    return max(*seen, anonymous()) - before


def full_disk(folder: Path) -> tuple[str, list[str], Any]:
    """A sharded checkpoint, then one for which there is no room: its error, what is there, and its
    step."""
    path = folder / "last.ckpt"
    write_sharded(
        {"state_dict": {"w": torch.zeros(10)}, "optimizer_states": [], "global_step": 1}, path
    )
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (64 * 1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )
    large = {"state_dict": {"w": torch.zeros(10**6)}, "optimizer_states": [], "global_step": 2}
    try:
        write_sharded(large, path)
    except OSError as error:
        said = str(error)
    dist.barrier()
    return said, sorted(os.listdir(folder)), read_sharded(path)["global_step"]


def unwritten(folder: Path) -> list[str]:
    """The errors of a sharded checkpoint of which each rank writes its part to a disk of its own,
    and of one with what cannot be written at all."""
    state = {
        "state_dict": {"v": torch.zeros(10), "w": torch.zeros(10)},
        "optimizer_states": [],
        "global_step": 1,
    }
    said = []
    for path, checkpoint in (
        (folder / str(dist.get_rank()) / "last.ckpt", state), (folder / "last.ckpt", {**state,
        "more": lambda: None}),
    ):  # fmt: skip
        try:
            write_sharded(checkpoint, path)
        except OSError as error:
            said.append(str(error))
    return said


def clip_step(
    count: int, config: dict[str, Any], latents: Sequence[int], way: str
) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of a DiT with DoRA, which `count` ranks run on one clip, as DDP averages
    them over all ranks."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**config)
    add_dora(transformer, 4, 4.0)
    for parameter in transformer.parameters():
        if parameter.requires_grad:  # at B = 0, A would have no gradient
            parameter.data += torch.randn(parameter.shape, generator=generator) / 50
    x, context = (
        torch.randn(1, *shape, generator=generator)
        for shape in (latents, (8, transformer.config.text_dim))
    )
    if count > 1:
        share_tokens(transformer, ClipRanks(count))
    if way == "compiled":
        compile_blocks(transformer, checkpointing=True, backend="eager")
    elif way == "recomputed":
        checkpoint_blocks(transformer.train())
    loss = (velocity(transformer, x, torch.tensor([700.0]), context) - x).square().mean()
    loss.backward()
    found = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return float(loss.detach()), {name: value.numpy() for name, value in found.items()}


def clip_steps(cases: dict[Any, tuple]) -> dict[Any, tuple[float, dict[str, Any]]]:
    """clip_step(*arguments) of each, on rank 0."""
    found = {name: clip_step(*arguments) for name, arguments in cases.items()}
    return found if dist.get_rank() == 0 else {}
