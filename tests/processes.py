"""Processes that start at once, forked from one that has imported everything: programs, and
functions on many ranks.

Ranks find each other as under torchrun, whose store this process serves.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.paths import ROOT

TIMEOUT = 900.0  # seconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["acetate.commands.train", "acetate.tasks.vae", "acetate.tasks.dit", "acetate.formats.rgba_vae",
     "acetate.callbacks.samples", "acetate.callbacks.panels", "acetate.callbacks.curves",
     "acetate.data.clips",
     "acetate.data.latents", "diffusers", "hydra", "gcsfs", "lpips", "matplotlib.pyplot", "s3fs",
     "tensorboard",
     "torch.distributed.fsdp", "torch.utils.tensorboard", "wandb", "tests.processes"]
)  # fmt: skip
# of every launch, as long as this process: its ranks may ask at any time
STORES: list[dist.TCPStore] = []


def train(log: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Starts `python train.py ARGUMENTS`, a session of its own; what it prints goes on in `log`."""
    given = (log, "train.py", arguments, dict(environment or {}))
    process = FORKS.Process(target=_run, args=given)
    process.start()
    return process


def program(
    log: Path,
    name: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    code: Sequence[Path] = (),
) -> tuple[int, str]:
    """`python NAME ARGUMENTS`, or `python -m NAME ARGUMENTS`, to its end: exit code and all that it
    printed. It is started in `folder`, a clone of this repository unless `code` says where the code
    lies that it runs."""
    places = [*code] or [folder / "src", folder]
    given = (log, name, arguments, dict(environment or {}), folder, places)
    process = FORKS.Process(target=_run, args=given)
    process.start()
    (code,) = ended(process)
    assert code is not None, f"{name} does not end: {log.read_text()[-2000:]}"
    return code, log.read_text()


def train_ranks(
    world: int, log: Path, *arguments: str, of_each: Sequence[str] = ()
) -> list[BaseProcess]:
    """The same on `world` ranks of the CPU; that of each prints to its own log, NAME_0, NAME_1,
    ..., and may have an argument of its own."""
    return [
        train(
            log.with_name(f"{log.name}_{rank}"), "trainer.accelerator=cpu", *arguments,
            *of_each[rank : rank + 1],
            environment=environment,
        )
        for rank, environment in enumerate(_environments(world))
    ]  # fmt: skip


def launch(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(*arguments) on `world` ranks of one process group; what each returns."""
    pipes, processes = [], []
    for environment in _environments(world):
        receiver, sender = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=_call, args=(environment, sender, function, arguments))
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
        codes = ended(*processes, within=10)
    assert codes == [0] * world
    return results


def alone(function: Callable[..., Any], *arguments: Any, within: float) -> Any:
    """What function(*arguments) returns in a process that no test has run in: one that is to fork
    has no threads of autograd or of a pool. within: seconds."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        assert wait([receiver], within), f"{function.__name__} gives no answer"
        return receiver.recv()
    finally:
        assert ended(process, within=10) == [0], f"{function.__name__} failed; see its traceback"


def ended(*processes: BaseProcess, within: float = TIMEOUT) -> list[int | None]:
    """Their exit codes once all have ended; those that have not in `within` seconds are killed and
    have None."""
    codes = []
    for process in processes:
        process.join(within)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def _environments(world: int) -> list[dict[str, str]]:
    """Of each rank, as torchrun's agent makes it."""
    STORES.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(STORES[-1].port), "WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _run(
    log: Path,
    name: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path = ROOT,
    code: Sequence[Path] = (),
) -> None:
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # of data workers, as in a program of its own
    multiprocessing.set_start_method("fork", force=True)
    # which a shell's & takes from all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("WANDB_SERVICE", None)  # a test's that ran before: this one starts its own
    if folder != ROOT:
        _import_from(code)
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [name, *arguments]
    try:
        if name.endswith(".py"):
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out, and wandb ends its run in


def _import_from(places: Sequence[Path]) -> None:
    """Of the modules that were imported before, only those of other packages stay."""
    os.environ.pop("ACETATE_ROOT", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, places))
    sys.path[:0] = map(str, places)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("acetate", "data_prep"):
            del sys.modules[name]


def _answer(sender: Any, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    sender.send(function(*arguments))


def _call(
    environment: Mapping[str, str], sender: Any, function: Callable, arguments: tuple
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sender.send(function(*arguments))
    dist.destroy_process_group()  # its threads abort a rank that ends with them running
