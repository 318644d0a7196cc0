"""Workers of data_prep.executor on a Ray cluster; needs the extra ray."""

import logging
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

import acetate
from data_prep.executor import Answer, LocalWorker, NoPlace, SetupLost, WorkerLost, attempt, bind

# seconds without a place after which that is said, and work goes to workers that have one
PATIENCE = 60
ROOTS = [str(Path(__file__).resolve().parents[1]), str(Path(acetate.__path__[0]).resolve().parent)]
log = logging.getLogger(__name__)


class RayWorker:
    """A data_prep.executor.Worker that Ray places. placed: the numbers of those of its team that
    have a place."""

    def __init__(self, task: bytes, gpus: float, number: int, placed: set[int]):
        self.task, self.gpus, self.number, self.placed = task, gpus, number, placed
        self.actor: Any = None

    def ask(self, item: Any, time_limit: float | None) -> Answer:
        actor = self.actor or self._start()
        try:
            answer = ray.get(actor.ask.remote(pickle.dumps(item), time_limit))
        except ray.exceptions.RayTaskError:
            raise  # it could not even start a process
        except ray.exceptions.RayError as error:
            self.stop()  # one that only cannot be reached would keep its place
            log.warning("Ray worker %d: %s", self.number, error)
            # Without Ray's text, which names processes and machines: a reason is the same in every
            # run.
            raise WorkerLost(f"its Ray worker was lost ({type(error).__name__})") from None
        if isinstance(answer, WorkerLost):
            raise answer
        good, value = answer
        return pickle.loads(value) if good else (good, value)

    def _start(self) -> Any:
        """Returns the actor, once it has a place. Raises NoPlace if another worker has one."""
        # Nodes need not have been started where this program was.
        paths = {"env_vars": {"PYTHONPATH": os.pathsep.join([*ROOTS, "${PYTHONPATH}"])}}
        options = {"num_cpus": 1, "num_gpus": self.gpus, "runtime_env": paths}
        main = {
            name: value
            for name, value in spawn.get_preparation_data("").items()
            if name.startswith("init_main")
        }
        self.actor = actor = (
            ray.remote(RayProcess).options(**options).remote(main, os.getcwd(), self.task)
        )
        while True:
            try:
                ray.get(actor.ready.remote(), timeout=PATIENCE)
                break
            except ray.exceptions.GetTimeoutError:
                pass
            except ray.exceptions.RayError as error:
                self.stop()
                raise SetupLost(
                    f"its Ray worker could not start ({type(error).__name__}): {error}"
                ) from None
            free, there = ray.available_resources(), ray.cluster_resources()
            taken = " and ".join(
                f"{there[what] - free.get(what, 0):g} of {there[what]:g} {what}s are taken"
                for what in ("CPU", "GPU")
                if there.get(what)
            )
            if self.placed:
                self.stop()
                raise NoPlace(
                    f"no room on the Ray cluster for worker {self.number} in {PATIENCE} s: {taken}"
                )
            log.warning("waiting for room on the Ray cluster: %s", taken)
        self.placed.add(self.number)
        return actor

    def stop(self) -> None:
        actor, self.actor = self.actor, None
        self.placed.discard(self.number)
        if actor is not None:
            ray.kill(actor)


class RayProcess:
    """The process in a Ray worker: a LocalWorker, so that limits, and reasons of what was lost, are
    those of one machine.

    It passes on bytes and imports nothing that the work needs; `load` is the process's setup.
    """

    def __init__(self, main: dict[str, str], folder: str, task: bytes):
        self.worker = LocalWorker(answer, partial(load, main, folder, task), 0)

    def ready(self) -> None:
        """Returns once the process is there."""

    def ask(self, item: bytes, time_limit: float | None) -> Answer | WorkerLost:
        try:
            return self.worker.ask(item, time_limit)
        except WorkerLost as error:
            return error


def load(main: dict[str, str], folder: str, task: bytes, _: int) -> Callable[[Any], Any]:
    """Loads what a process needs. main: where multiprocessing finds the driver's __main__. folder:
    the driver's, for paths that begin there."""
    with suppress(FileNotFoundError):
        os.chdir(folder)
    spawn.prepare(main)
    return bind(*pickle.loads(task))


def answer(function: Callable[[Any], Any], item: bytes) -> bytes:
    return pickle.dumps(attempt(function, pickle.loads(item)))


def start_team(
    function: Callable[..., Any], setup: Callable[[int], Any] | None, workers: int, gpus: float
) -> list[RayWorker]:
    placed: set[int] = set()
    numbers = range(start_ray(workers, gpus))
    return [
        RayWorker(pickle.dumps((function, setup, number)), gpus, number, placed)
        for number in numbers
    ]


def start_ray(workers: int, gpus: float) -> int:
    """Connects, or starts Ray on this machine for so many workers; returns how many of them the
    cluster has room for.

    More would wait for a place that those before them never leave. Raises ValueError where there is
    room for none.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        address = os.environ.get("RAY_ADDRESS")
        check_address(address or "")
        if address:
            ray.init(address, logging_level="warning")
        else:
            init_alone(workers)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        min(int(node.get("CPU", 0)), int(node.get("GPU", 0) / gpus + 1e-6) if gpus else workers)
        for node in nodes
    )
    there = ", ".join(
        f"{sum(node.get(what, 0) for node in nodes):g} {what}s" for what in ("CPU", "GPU")
    )
    if room == 0:
        raise ValueError(
            f"A worker needs 1 CPU and {gpus:g} GPUs of one node; this Ray cluster has {there} on "
            f"{len(nodes)} nodes. Use a larger cluster, or fewer GPUs for each worker."
        )
    if room < workers:
        log.warning(
            "workers=%d; this Ray cluster (%s) has room for %d, which are used",
            workers,
            there,
            room,
        )
    return min(workers, room)


def init_alone(workers: int) -> None:
    """Starts Ray for this machine alone: all of its processes listen on loopback.

    Ray takes an address of the network in the place of 127.0.0.1, but where it knows no clusters.
    """
    knows, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(
            "local",
            logging_level="warning",
            num_cpus=workers,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = knows


def check_address(address: str) -> None:
    """Raises ConnectionError if nothing listens at host:port, for which Ray would look for
    minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(
            f"RAY_ADDRESS={address}: nothing answers there ({error}). Start it (ray start --head), "
            "correct the address, or unset it to start Ray on this machine."
        ) from error
