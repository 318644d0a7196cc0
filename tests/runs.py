"""train.py in processes of their own that start at once: they are forked from one that has imported everything."""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests.paths import ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["acetate.tasks.vae", "acetate.tasks.dit", "acetate.formats.rgba_vae", "acetate.callbacks.samples",
     "acetate.callbacks.throughput", "acetate.callbacks.guard", "acetate.callbacks.preemption", "acetate.commands",
     "lightning.pytorch.loggers", "diffusers", "hydra", "tests.runs"]
)  # fmt: skip


def train(log: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Starts `python train.py ARGUMENTS`, a session of its own; what it prints goes on in `log`."""
    process = FORKS.Process(target=_main, args=(log, arguments, dict(environment or {})))
    process.start()
    return process


def two_ranks(log: Path, *arguments: str) -> list[BaseProcess]:
    """The same as two DDP ranks, as torchrun starts them, without its agent."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    arguments = (*arguments, "trainer.accelerator=cpu", "trainer.devices=2", "++trainer.strategy=ddp")
    return [
        train(
            log.with_name(f"{log.name}_{rank}"),
            *arguments,
            environment={**where, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        )
        for rank in range(2)
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ended(*processes: BaseProcess, within: float = 240) -> list[int | None]:
    """Their exit codes once all have ended; those that have not in `within` seconds are killed and have None."""
    codes = []
    for process in processes:
        process.join(within)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def _main(log: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a program of its own
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out, and wandb ends its run in
