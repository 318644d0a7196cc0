"""One function over many items, in processes of this machine or of a Ray cluster."""

import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

EXECUTORS = ("local", "ray")
OVERRAN = "took more than {:g} s, so that its worker process was stopped"
AHEAD = 4  # items per worker that are begun before their results are asked for
Item = TypeVar("Item")
Result = TypeVar("Result")
Answer = tuple[bool, Any]  # (True, result), or (False, (exception, its traceback as text))


class WorkerLost(RuntimeError):
    """A worker process that ended, or was ended, before it gave the result of an item."""


class Worker(Protocol):
    """A process that takes one item at a time; it starts with the first, and anew after it was lost."""

    def ask(self, item: Any, time_limit: float | None) -> Answer:
        """WorkerLost with the reason if no answer comes."""
        ...

    def stop(self) -> None:
        """At once, also from another thread, which then meets WorkerLost."""
        ...


def parallel(
    function: Callable[..., Result],
    items: Iterable[Item],
    *,
    executor: str,
    workers: int,
    setup: Callable[[int], Any] | None = None,
    name: Callable[[Item], str] = str,
    time_limit: float | None = None,
    lost: Callable[[Item, str], Result] | None = None,
    gpus: float = 0,
) -> Generator[Result, None, None]:
    """function(item) for each item, in the order of the items, which are taken as they are needed.

    executor: local, spawned processes; or ray, processes that Ray places, on the cluster of RAY_ADDRESS or one that is
    started on this machine. workers: processes; with local, 0 is this one; on Ray at most as many as it has room for.
    function, setup, items and results are pickled. setup: each process calls it once with its number from 0 to
    workers - 1, and function is then function(what setup returned, item). name: of an item, for errors. time_limit:
    seconds that an item may take before its process is killed. lost: (item, reason) -> the result of an item whose
    process was killed or died; without it, that is WorkerLost. gpus: that Ray keeps for each process.

    What function or setup raises is raised here, with its type. Leaving the iterator early stops the processes when
    it is closed: use contextlib.closing. Raises ValueError for settings that contradict each other, ImportError
    without Ray.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor}; choose {' or '.join(EXECUTORS)}")
    if workers < 0:
        raise ValueError(f"workers={workers}; must be at least 0")
    if workers == 0 and executor == "ray":
        raise ValueError("executor=ray, workers=0; Ray needs at least workers=1")
    if workers == 0 and time_limit is not None:
        raise ValueError(f"time_limit={time_limit} kills the process that overruns it; use workers=1 or more")
    if workers == 0:
        return _here(function, items, setup)
    team: list[Worker]
    if executor == "ray":
        try:
            from data_prep.on_ray import RayWorker, start_ray
        except ImportError as error:
            raise ImportError(f"executor=ray: {error}. Install acetate[ray] or use executor=local.") from error
        team = [RayWorker(function, setup, number, gpus) for number in range(start_ray(workers, gpus))]
    else:
        team = [LocalWorker(function, setup, number) for number in range(workers)]
    return _spread(team, items, name, time_limit, lost)


def _here(
    function: Callable[..., Result], items: Iterable[Item], setup: Callable[[int], Any] | None
) -> Generator[Result, None, None]:
    call = bind(function, setup, 0)
    for item in items:
        yield call(item)


def _spread(
    team: list[Worker],
    items: Iterable[Item],
    name: Callable[[Item], str],
    time_limit: float | None,
    lost: Callable[[Item, str], Result] | None,
) -> Generator[Result, None, None]:
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in team:
        idle.put(worker)
    closed = threading.Event()

    def serve_one(item: Item) -> Result:
        """In a thread of its own for each worker, so that none waits for the caller."""
        worker = idle.get()
        try:
            good, value = worker.ask(item, time_limit)
        except WorkerLost as error:
            if lost is not None and not closed.is_set():
                return lost(item, str(error))
            raise WorkerLost(f"{name(item)}: {error}") from None
        finally:
            idle.put(worker)
        if good:
            return value
        error, trace = value
        error.add_note(f"In a worker process:\n{trace}")
        raise error

    threads = ThreadPoolExecutor(len(team), thread_name_prefix="parallel")
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(threads.submit(serve_one, item))
            if len(begun) == AHEAD * len(team):
                begun[0].result()
                yield begun.popleft().result()
        while begun:
            begun[0].result()
            yield begun.popleft().result()
    finally:
        closed.set()
        threads.shutdown(wait=False, cancel_futures=True)
        while True:  # a process that was just being started is met the second time
            for worker in team:
                worker.stop()
            if all(future.done() for future in begun):
                break
            time.sleep(0.05)


def bind(function: Callable[..., Result], setup: Callable[[int], Any] | None, number: int) -> Callable[[Any], Result]:
    if setup is None:
        return function
    state = setup(number)
    return lambda item: function(state, item)


def attempt(function: Callable[..., Any], *arguments: Any) -> Answer:
    try:
        return True, function(*arguments)
    except Exception as error:
        return False, (portable(error), traceback.format_exc())


def portable(error: Exception) -> Exception:
    """RuntimeError for one that does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class LocalWorker:
    """A spawned process: torch and FFmpeg keep threads, which a fork would leave behind locked."""

    def __init__(self, function: Callable[..., Any], setup: Callable[[int], Any] | None, number: int):
        self.task = function, setup, number
        self.process: Any = None

    def ask(self, item: Any, time_limit: float | None) -> Answer:
        if self.process is None:
            good, failure = self._start()
            if not good:
                return good, failure
        try:
            self.pipe.send(item)
            if self.pipe.poll(time_limit):
                return self.pipe.recv()
        except (EOFError, OSError):
            raise WorkerLost(self._gone()) from None
        self.process.kill()
        self._gone()
        raise WorkerLost(OVERRAN.format(time_limit))

    def _start(self) -> Answer:
        """The answer of its setup."""
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *self.task), daemon=True)
        process.start()
        theirs.close()
        self.process = process
        try:
            good, failure = self.pipe.recv()
        except (EOFError, OSError):
            raise WorkerLost(f"{self._gone()} at its start") from None
        if not good:
            self._gone()
        return good, failure

    def _gone(self) -> str:
        """How the process ended; the next item starts another."""
        process, self.process = self.process, None
        process.join()
        self.pipe.close()
        if process.exitcode >= 0:
            return f"its worker process ended with exit code {process.exitcode}"
        name = signal.Signals(-process.exitcode).name
        reason = " (by the kernel, if memory ran out: use fewer workers)" if name == "SIGKILL" else ""
        return f"its worker process was ended by {name}{reason}"

    def stop(self) -> None:
        process = self.process
        if process is not None:
            process.kill()


def serve(pipe: Connection, function: Callable[..., Any], setup: Callable[[int], Any] | None, number: int) -> None:
    """Answers items until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    good, call = attempt(bind, function, setup, number)
    pipe.send((good, None if good else call))
    with suppress(EOFError, BrokenPipeError):
        while good:
            answer = attempt(call, pipe.recv())
            try:
                pipe.send(answer)
            except BrokenPipeError:
                return
            except Exception as error:  # the result cannot be pickled
                pipe.send((False, (portable(error), traceback.format_exc())))
