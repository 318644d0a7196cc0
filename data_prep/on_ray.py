"""Workers of data_prep.executor on a Ray cluster; needs the extra acetate[ray]."""

import os
from collections.abc import Callable
from typing import Any

import ray

from data_prep.executor import OVERRAN, Answer, WorkerLost, attempt, bind


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


def start_ray(workers: int, gpus: float) -> None:
    """Connects, or starts Ray on this machine for so many workers; ValueError where it has too little for them."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        address = os.environ.get("RAY_ADDRESS")
        size = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address or "local", logging_level="warning", **size)
    there = ray.cluster_resources()
    for what, each in (("CPU", 1), ("GPU", gpus)):
        if workers * each > there.get(what, 0):
            raise ValueError(
                f"workers={workers} need {workers * each:g} {what}s; this Ray cluster has {there.get(what, 0):g}. "
                "Use fewer workers or a larger cluster."
            )
