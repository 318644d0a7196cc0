"""Fetches the tars that a reader will need, while it works on those before them."""

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from acetate.data.store import RemoteTar

# share of the cache for tars that are known to be needed; the rest is for ranks behind and
# validation
AHEAD = 0.75
LOOK = 100  # samples that a reader looks through at a time for the next tar


class ReadAhead:
    """Fetches the tars of the samples to come, one at a time in a thread, while a process decodes
    those before them.

    coming: place -> (place, tar) of the samples from there on, in the order in which this process's
    rank reads them; places only grow. horizon: places that are looked ahead at most. Tars that are
    needed from the place reached on take at most AHEAD of the cache, and outlive there those that
    are not. One that does not come is met, with its reason, by whoever reads a sample of it.
    """

    def __init__(
        self, coming: "Callable[[int], Iterator[tuple[int, Path | RemoteTar]]]", horizon: int
    ):
        self.coming, self.horizon = coming, horizon
        self.place = 0
        self.samples: Iterator[tuple[int, Path | RemoteTar]] | None = None
        self.needed: dict[RemoteTar, int] = {}  # -> the last place looked at that needs it
        self.fetch: Future[None] | None = None  # the latest
        self.todo: SimpleQueue | None = None

    def reached(self, place: int) -> None:
        """Notes that the sample at this place is the next to be read. Returns at once."""
        if self.samples is None or place < self.place:
            self.samples, self.needed = self.coming(place), {}
            self.next = next(self.samples)  # the first that was not looked at
        while self.next[0] < place:
            self.next = next(self.samples)
        self.place = place
        self.needed = {tar: last for tar, last in self.needed.items() if last >= place}
        for _ in range(LOOK):
            if self.next[0] >= place + self.horizon or (
                self.fetch is not None and not self.fetch.done()
            ):
                return
            last, tar = self.next
            if isinstance(tar, RemoteTar):
                if tar not in self.needed:
                    remote = tar.parent.remote
                    if (
                        sum(other.size for other in self.needed) + tar.size
                        > AHEAD * remote.max_bytes
                    ):
                        return
                    if not remote.has(tar):
                        remote.keep(self.needed)
                        self._start(tar)
                self.needed[tar] = last
            self.next = next(self.samples)

    def _start(self, tar: "RemoteTar") -> None:
        if self.todo is None:
            self.todo = SimpleQueue()
            threading.Thread(target=_fetch_each, args=(self.todo,), daemon=True).start()
            weakref.finalize(self, self.todo.put, None)
        self.fetch = Future()
        self.todo.put((tar, self.fetch))


def _fetch_each(todo: SimpleQueue) -> None:
    """Fetches tars until None comes."""
    while item := todo.get():
        tar, done = item
        with suppress(OSError):  # Remote.open raises it again for those who read the tar
            tar.parent.remote.open(tar).close()
        done.set_result(None)
