"""One function over many items, in processes of this machine or of a Ray cluster."""

import ctypes
import logging
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import parent_process
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

START = "spawn"  # of local processes, with nothing of this one
OVERRAN = "took more than {:g} s, so that its worker process was stopped"
OVERRUN_SIGNALS = ("SIGPROF", "SIGALRM")  # of a process that set itself a time limit
# glibc's mallopt: freed pieces from so many bytes on go back at once; of smaller ones, what lies
# free beyond so many
M_MMAP_THRESHOLD, GIVEN_BACK = -3, 2**24
M_TRIM_THRESHOLD, KEPT = -1, 2**26
AHEAD = 4  # items per worker that are begun before their results are asked for
Item = TypeVar("Item")
Result = TypeVar("Result")
Answer = tuple[bool, Any]  # (True, result), or (False, (exception, its traceback as text))
log = logging.getLogger(__name__)


class WorkerLost(RuntimeError):
    """A worker process that ended, or was ended, before it gave the result of an item."""


class Overran(WorkerLost):
    """It was ended because the item took too long."""


class SetupLost(WorkerLost):
    """It ended before it took any item, so that no item is to blame."""


class NoPlace(WorkerLost):
    """No process could be started, while others of the team run."""


class Worker(Protocol):
    """A process that takes one item at a time; it starts with the first, and anew after it was
    lost."""

    def ask(self, item: Any, time_limit: float | None) -> Answer:
        """Returns the answer for an item. Raises WorkerLost with the reason if no answer comes;
        NoPlace only while another worker of the team runs."""
        ...

    def stop(self) -> None:
        """Ends at once, also from another thread, which then meets WorkerLost."""
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
    """Yields function(item) for each item, in the order of the items, which are taken as they are
    needed.

    executor: local, spawned processes; or ray, processes that Ray places, on the cluster of
    RAY_ADDRESS or one that is started on this machine. workers: processes; with local, 0 is this
    one; on Ray at most as many as it has room for. function, setup, items and results are pickled.
    setup: each process calls it once with its number from 0 to workers - 1, and function is then
    function(what setup returned, item). name: of an item, for errors. time_limit: seconds that an
    item may take before its process is killed. lost: (item, reason) -> the result of an item that
    overran it, or whose process was killed or died twice: another may have taken the memory, or the
    machine; without it, that is WorkerLost, and so is a process that ends twice in its setup. gpus:
    that Ray keeps for each process.

    What function or setup raises is raised here, with its type. Leaving the iterator early stops
    the processes when it is closed: use contextlib.closing. Raises ValueError for settings that
    contradict each other, ImportError without Ray.
    """
    check(executor, workers)
    if workers == 0 and time_limit is not None:
        raise ValueError(
            f"time_limit={time_limit} kills the process that overruns it; use workers=1 or more"
        )
    if workers == 0:
        return _here(function, items, setup)
    team: Sequence[Worker]
    if executor == "ray":
        try:
            from data_prep.on_ray import start_team
        except ImportError as error:
            raise ImportError(
                f"executor=ray: {error}. In the clone: pip install -e '.[ray]'; or use "
                "executor=local."
            ) from error
        team = start_team(function, setup, workers, gpus)
    else:
        team = [LocalWorker(function, setup, number) for number in range(workers)]
    return Team(team, name, time_limit, lost).results(items)


@contextmanager
def progress(
    function: Callable[..., Result],
    items: Sequence[Item],
    *,
    desc: str | None = None,
    done: int = 0,
    **settings: Any,
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Pairs of a clip and its result under a progress bar; leaving the block ends the processes.

    settings: of `parallel`. done: clips of an earlier run, where the bar begins.
    """
    with closing(parallel(function, items, **settings)) as results:
        total = done + len(items)
        bar = tqdm(results, total=total, initial=done, unit="clip", desc=desc)
        yield zip(items, bar, strict=True)


def check(executor: str, workers: int) -> None:
    """Raises ValueError for settings that contradict each other: for commands, before they load or
    write anything."""
    if workers == 0 and executor == "ray":
        raise ValueError("executor=ray, workers=0; Ray needs at least workers=1")


def _here(
    function: Callable[..., Result], items: Iterable[Item], setup: Callable[[int], Any] | None
) -> Generator[Result, None, None]:
    call = bind(function, setup, 0)
    for item in items:
        yield call(item)


@dataclass
class Team(Generic[Item, Result]):
    """Workers, and the items that they are asked about in threads, so that none waits for the
    caller.

    name, time_limit, lost: as in `parallel`.
    """

    workers: Sequence[Worker]
    name: Callable[[Item], str]
    time_limit: float | None
    lost: Callable[[Item, str], Result] | None

    def __post_init__(self) -> None:
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.closed = threading.Event()

    def results(self, items: Iterable[Item]) -> Generator[Result, None, None]:
        """Yields results in the order of the items; closing it ends the processes."""
        threads = ThreadPoolExecutor(len(self.workers), thread_name_prefix="parallel")
        begun: deque[Future[Result]] = deque()
        try:
            for item in items:
                begun.append(threads.submit(self.result, item))
                if len(begun) == AHEAD * len(self.workers):
                    begun[0].result()
                    yield begun.popleft().result()
            while begun:
                begun[0].result()
                yield begun.popleft().result()
        finally:
            self.closed.set()
            threads.shutdown(wait=False, cancel_futures=True)
            while True:  # a process that was just being started is met the second time
                for worker in self.workers:
                    worker.stop()
                if all(future.done() for future in begun):
                    break
                time.sleep(0.05)

    def result(self, item: Item) -> Result:
        try:
            good, value = self.ask(item)
        except WorkerLost as error:
            if self.lost is None or self.closed.is_set() or isinstance(error, SetupLost):
                raise type(error)(f"{self.name(item)}: {error}") from None
            return self.lost(item, str(error))
        if good:
            return value
        error, trace = value
        error.add_note(f"In a worker process:\n{trace}")
        raise error

    def ask(self, item: Item) -> Answer:
        """Asks a worker, and once more a new process of it, if the first was lost."""
        worker, again = self.idle.get(), False
        try:
            while not self.closed.is_set():
                try:
                    return worker.ask(item, self.time_limit)
                except NoPlace as error:
                    log.warning("%s; its work goes to the others", error)
                    worker = self.idle.get()  # the one without a place does not come back
                except WorkerLost as error:
                    if again or self.closed.is_set() or isinstance(error, Overran):
                        raise
                    log.warning("%s: %s; tried once more", self.name(item), error)
                    again = True
            raise WorkerLost("the run was stopped")
        finally:
            self.idle.put(worker)


def bind(
    function: Callable[..., Result], setup: Callable[[int], Any] | None, number: int
) -> Callable[[Any], Result]:
    if setup is None:
        return function
    state = setup(number)
    return lambda item: function(state, item)


def alone_and_lean() -> None:
    """Prepares a process that reads pictures beside others: torch takes one thread.

    And glibc, which learns to keep freed pieces of up to 32 MB and twice as much in sum, gives
    those back that are larger than a picture of 1080p (8.3 MB; as floats 33), and keeps those of a
    few pictures for the next ones: where each goes back, as from 1 MB on, fetching it anew page by
    page is a third of the time.
    """
    import torch  # which not all programs here need

    torch.set_num_threads(1)
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def attempt(function: Callable[..., Any], *arguments: Any) -> Answer:
    try:
        return True, function(*arguments)
    except Exception as error:
        return False, (portable(error), traceback.format_exc())


def portable(error: Exception) -> Exception:
    """Returns the error, or RuntimeError for one that does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class LocalWorker:
    """A spawned process: torch and FFmpeg keep threads, which a fork would leave behind locked."""

    def __init__(
        self, function: Callable[..., Any], setup: Callable[[int], Any] | None, number: int
    ):
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
            reason = self._gone()
            raise (Overran if any(name in reason for name in OVERRUN_SIGNALS) else WorkerLost)(
                reason
            ) from None
        self.process.kill()
        self._gone()
        raise Overran(OVERRAN.format(time_limit))

    def _start(self) -> Answer:
        """Returns the answer of its setup."""
        context = get_context(START)
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *self.task), daemon=True)
        process.start()
        theirs.close()
        self.process = process
        try:
            good, failure = self.pipe.recv()
        except (EOFError, OSError):
            raise SetupLost(f"{self._gone()} at its start") from None
        if not good:
            self._gone()
        return good, failure

    def _gone(self) -> str:
        """Returns how the process ended; the next item starts another."""
        process, self.process = self.process, None
        process.join()
        self.pipe.close()
        if process.exitcode >= 0:
            return f"its worker process ended with exit code {process.exitcode}"
        name = signal.Signals(-process.exitcode).name
        reason = (
            " (by the kernel, if memory ran out: use fewer workers)" if name == "SIGKILL" else ""
        )
        return f"its worker process was ended by {name}{reason}"

    def stop(self) -> None:
        process = self.process
        if process is not None:
            process.kill()


def end_with_parent() -> None:
    """Ends this process with its parent: one that was killed cannot end its processes, which would
    go on writing into the folder of a restart."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def serve(
    pipe: Connection, function: Callable[..., Any], setup: Callable[[int], Any] | None, number: int
) -> None:
    """Answers items until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
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
