"""Runs of training on many processes of this machine, from a server that has imported everything once."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 180  # seconds of a launch
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.runs"])


def launch(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(*arguments) on `world` ranks that know each other, as torchrun starts them; what each returns."""
    pipes, processes = [], []
    for rank in range(world):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank, args=(rank, world, folder, sender, function, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: list[Any] = []
    try:
        for rank, pipe in enumerate(pipes):
            assert wait([pipe], TIMEOUT), f"rank {rank} of {world} gives no answer"
            results.append(pipe.recv())
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return results


def _rank(rank: int, world: int, folder: Path, sender: Any, function: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store_{world}", rank=rank, world_size=world)
    sender.send(function(*arguments))
    dist.destroy_process_group()  # its threads abort a rank that ends with them running
