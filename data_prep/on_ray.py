"""Workers of data_prep.executor on a Ray cluster; needs the extra acetate[ray]."""

import logging
import os
from collections.abc import Callable
from typing import Any

import ray

from data_prep.executor import OVERRAN, Answer, WorkerLost, attempt, bind

log = logging.getLogger(__name__)


class RayWorker:
    """A data_prep.executor.Worker that Ray places."""

    def __init__(self, function: Callable[..., Any], setup: Callable[[int], Any] | None, number: int, gpus: float):
        self.task, self.gpus = (function, setup, number), gpus
        self.actor: Any = None

    def ask(self, item: Any, time_limit: float | None) -> Answer:
        if self.actor is None:
            self.actor = ray.remote(RayProcess).options(num_cpus=1, num_gpus=self.gpus).remote()
            good, failure = self._wait(self.actor.start.remote(*self.task), None)
            if not good:
                self.stop()
                return good, failure
        return self._wait(self.actor.answer.remote(item), time_limit)

    def _wait(self, reference: Any, time_limit: float | None) -> Answer:
        try:
            return ray.get(reference, timeout=time_limit)
        except ray.exceptions.RayTaskError:
            raise  # the result cannot be pickled
        except ray.exceptions.GetTimeoutError:
            self.stop()
            raise WorkerLost(OVERRAN.format(time_limit)) from None
        except ray.exceptions.RayError as error:
            self.actor = None
            raise WorkerLost(f"its Ray worker was lost ({type(error).__name__}): {error}") from None

    def stop(self) -> None:
        actor, self.actor = self.actor, None
        if actor is not None:
            ray.kill(actor)


class RayProcess:
    """What runs in a Ray worker."""

    def start(self, function: Callable[..., Any], setup: Callable[[int], Any] | None, number: int) -> Answer:
        good, self.call = attempt(bind, function, setup, number)
        return good, None if good else self.call

    def answer(self, item: Any) -> Answer:
        return attempt(self.call, item)


def start_ray(workers: int, gpus: float) -> int:
    """Connects, or starts Ray on this machine for so many workers; how many of them the cluster has room for.

    More would wait for a place that those before them never leave. ValueError where there is room for none.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        address = os.environ.get("RAY_ADDRESS")
        size = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address or "local", logging_level="warning", **size)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        min(int(node.get("CPU", 0)), int(node.get("GPU", 0) / gpus + 1e-6) if gpus else workers) for node in nodes
    )
    there = ", ".join(f"{sum(node.get(what, 0) for node in nodes):g} {what}s" for what in ("CPU", "GPU"))
    if room == 0:
        raise ValueError(
            f"A worker needs 1 CPU and {gpus:g} GPUs of one node; this Ray cluster has {there} on {len(nodes)} nodes. "
            "Use a larger cluster, or fewer GPUs for each worker."
        )
    if room < workers:
        log.warning("workers=%d; this Ray cluster (%s) has room for %d, which are used", workers, there, room)
    return min(workers, room)
