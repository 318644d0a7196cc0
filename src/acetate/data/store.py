"""Where shards lie: a local folder, read in place, or a URL of fsspec's, whose tars are fetched whole into a cache."""

import hashlib
import os
import random
import tarfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import fsspec
from filelock import FileLock

from acetate.data.order import Order

FORGET = 300.0  # seconds in which a process does not ask again for a tar that it could not get
STALE = 600.0  # seconds after which a download that stands still was left behind by a killed process
POLL = 0.1  # seconds
AHEAD = 0.75  # share of the cache for tars that are known to be needed; the rest is for ranks behind and validation
LOOK = 1000  # clips that a reader looks through at a time for the next tar

T = TypeVar("T")
Span = tuple[int, int]  # offset and size in a tar


class FetchError(OSError):
    """A file that did not come, or not as promised, in all of its tries."""


class Remote:
    """How shards behind a URL are read: a tar goes whole into `cache_dir` and is checked against its SHA-256.

    All processes of a machine, also of several runs with the same cache_gb, share the cache: it never holds more than
    cache_gb * 2**30 bytes, downloads under way included; tars that were not read for longest go first. What fails,
    comes damaged or brings nothing for `timeout` seconds is tried again `retries` times, after about `backoff`
    seconds, then twice as long each time; a file that does not exist is not. storage_options: of fsspec's file system.
    """

    def __init__(
        self,
        *,
        cache_dir: str | Path,
        cache_gb: float = 20.0,
        retries: int = 5,
        backoff: float = 1.0,
        timeout: float = 60.0,
        storage_options: Mapping[str, Any] | None = None,
    ):
        for name, value in (("cache_gb", cache_gb), ("timeout", timeout)):
            if not value > 0:
                raise ValueError(f"{name}={value}; must be above 0")
        for name, value in (("retries", retries), ("backoff", backoff)):
            if not value >= 0:
                raise ValueError(f"{name}={value}; must be at least 0")
        self.cache_dir, self.max_bytes = Path(cache_dir), int(cache_gb * 2**30)
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self.storage_options = dict(storage_options or {})
        self.members: dict[str, dict[str, Span]] = {}
        self.failed: dict[str, tuple[float, str]] = {}

    def read(self, url: str) -> bytes:
        """A small file. FileNotFoundError where there is none, FetchError past the retries."""

        def once() -> bytes:
            part = self._part(0)
            try:
                self._download(url, part)
                return part.read_bytes()
            finally:
                part.unlink(missing_ok=True)

        return self._persist(once, url)

    def read_member(self, tar: "RemoteTar", name: str) -> bytes:
        """Of a tar, which is fetched if the cache lacks it; OSError if it cannot be."""
        with self.open(tar) as file:
            if tar.sha256 not in self.members:
                self.members[tar.sha256] = dict(find_members(file, tar.size))
            if name not in self.members[tar.sha256]:
                raise FetchError(f"{name} is not in {tar}")
            return read_at(file, self.members[tar.sha256][name])

    def open(self, tar: "RemoteTar") -> BinaryIO:
        """A whole tar; as long as it is open, it can be read even if it has left the cache."""
        path = self._path(tar)
        with suppress(FileNotFoundError):
            return _open_used(path)
        since, reason = self.failed.get(tar.sha256, (-FORGET, ""))
        if time.monotonic() - since < FORGET:
            raise FetchError(reason)
        with self._lock(tar.sha256[:2]):
            with suppress(FileNotFoundError):
                return _open_used(path)  # another process has fetched it
            try:
                return self._persist(lambda: self._fetch(tar, path), str(tar))
            except OSError as error:
                self.failed[tar.sha256] = time.monotonic(), str(error)
                raise

    def has(self, tar: "RemoteTar") -> bool:
        return self._path(tar).exists()

    def keep(self, tars: "Iterable[RemoteTar]") -> None:
        """As if they had just been read: others leave the cache before them."""
        for tar in tars:
            with suppress(FileNotFoundError):
                os.utime(self._path(tar))

    def _path(self, tar: "RemoteTar") -> Path:
        return self.cache_dir / f"{tar.sha256}.tar"

    def _fetch(self, tar: "RemoteTar", path: Path) -> BinaryIO:
        part = self._reserve(tar)
        drop = Finalize(None, part.unlink, (True,), exitpriority=0)  # also if the process ends meanwhile
        try:
            self._download(str(tar), part)
            found = part.stat().st_size
            if found != tar.size:
                raise FetchError(f"{found} bytes came, the manifest says {tar.size}")
            with open(part, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != tar.sha256:
                    raise FetchError("its SHA-256 is not the manifest's")
            with self._lock("cache"):
                part.replace(path)
                return _open_used(path)
        finally:
            drop()

    def _persist(self, once: Callable[[], T], what: str) -> T:
        """`once`, tried again with pauses that are drawn, so that many machines do not come back at the same time."""
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                # Not the global generator, on which others may rely
                time.sleep(self.backoff * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5))
            try:
                return once()
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{what} does not exist") from error
            except Exception as error:  # every file system has its own
                reason = f"{type(error).__name__}: {error}"
        raise FetchError(f"{what} could not be fetched in {self.retries + 1} tries; the last: {reason}")

    def _download(self, url: str, part: Path) -> None:
        """TimeoutError once the file has not grown for `timeout` seconds."""
        # The instance is made here, since fsspec keeps one for every thread that asks.
        files, path = fsspec.url_to_fs(url, **self.storage_options)
        done: Future[None] = Future()

        def work() -> None:
            try:
                done.set_result(files.get_file(path, str(part)))
            except BaseException as error:
                done.set_exception(error)

        # Not every file system knows timeouts: a thread that hangs is left behind, with a file that nobody reads.
        threading.Thread(target=work, daemon=True).start()
        size, since = 0, time.monotonic()
        while not wait([done], timeout=min(1.0, self.timeout / 4)).done:
            grown = part.stat().st_size if part.exists() else 0
            if grown != size:
                size, since = grown, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                raise TimeoutError(f"nothing came for {self.timeout:g} s")
        done.result()

    def _lock(self, name: str) -> FileLock:
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(self.cache_dir / f"{name}.lock")

    def _part(self, size: int) -> Path:
        """A name of its own for every try: one that was left behind may still write."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        return self.cache_dir / f"{uuid4().hex}.{size}.part"

    def _reserve(self, tar: "RemoteTar") -> Path:
        """An empty file, whose name takes the tar's bytes out of what the cache has left."""
        since = time.monotonic()
        while time.monotonic() - since < STALE:
            with self._lock("cache"):
                if self._make_room(tar.size):
                    part = self._part(tar.size)
                    part.touch()
                    return part
            time.sleep(POLL)
        raise FetchError(f"other downloads fill {self.cache_dir}; raise cache_gb")

    def _make_room(self, size: int) -> bool:
        """False where downloads under way leave too little; under the lock."""
        tars: list[tuple[int, int, Path]] = []
        parts = 0
        for path in self.cache_dir.iterdir():
            with suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".tar":
                    tars.append((stat.st_mtime_ns, stat.st_size, path))
                elif path.suffix == ".part" and time.time() - stat.st_mtime > STALE + self.timeout:
                    path.unlink()
                elif path.suffix == ".part":
                    parts += int(path.suffixes[-2][1:])
        if parts + size > self.max_bytes:
            return False
        held = parts + sum(used for _, used, _ in tars)
        for _, used, path in sorted(tars):
            if held + size <= self.max_bytes:
                break
            path.unlink()
            held -= used
        return True


@dataclass(frozen=True)
class RemoteFolder:
    url: str
    remote: Remote

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class RemoteTar:
    """A tar as its manifest describes it."""

    parent: RemoteFolder
    name: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.parent}/{self.name}"

    def read(self, member: str) -> bytes:
        return self.parent.remote.read_member(self, member)


class ReadAhead:
    """Fetches the tars of the clips to come, one at a time in a thread, while a process decodes those before them.

    order: position -> (epoch, clip); tars[clip] is that clip's. step: between the positions that this process's rank
    reads. Tars that are needed from the position reached on take at most AHEAD of the cache, and outlive there those
    that are not. One that does not come is met, with its reason, by whoever reads a clip of it.
    """

    def __init__(self, order: Order, tars: "Sequence[Path | RemoteTar]", step: int):
        self.order, self.tars, self.step = order, tars, step
        self.position = self.end = 0  # looked through between them
        self.needed: dict[RemoteTar, int] = {}  # -> the last position before `end` that needs it
        self.fetch: Future[None] | None = None  # the latest
        self.todo: SimpleQueue | None = None

    def reached(self, position: int) -> None:
        """The clip there is the next to be read. Returns at once."""
        if not self.position <= position <= self.end:
            self.end, self.needed = position, {}
        self.position = position
        self.needed = {tar: last for tar, last in self.needed.items() if last >= position}
        for _ in range(LOOK):
            if self.end >= position + self.order.count or (self.fetch is not None and not self.fetch.done()):
                return
            tar = self.tars[self.order[self.end][1]]
            if isinstance(tar, RemoteTar):
                if tar not in self.needed:
                    remote = tar.parent.remote
                    if sum(other.size for other in self.needed) + tar.size > AHEAD * remote.max_bytes:
                        return
                    remote.keep(self.needed)
                    if not remote.has(tar):
                        self._start(tar)
                self.needed[tar] = self.end
            self.end += self.step

    def _start(self, tar: "RemoteTar") -> None:
        if self.todo is None:
            self.todo = SimpleQueue()
            threading.Thread(target=_fetch_each, args=(self.todo,), daemon=True).start()
            weakref.finalize(self, self.todo.put, None)
        self.fetch = Future()
        self.todo.put((tar, self.fetch))


def _fetch_each(todo: SimpleQueue) -> None:
    """Until None comes."""
    while item := todo.get():
        tar, done = item
        with suppress(OSError):  # Remote.open raises it again for those who read the tar
            tar.parent.remote.open(tar).close()
        done.set_result(None)


Folder = Path | RemoteFolder


def listed(folders: str | Iterable[str]) -> list[str]:
    """One folder or many, as configs name them."""
    return [folders] if isinstance(folders, str) else list(folders)


def open_folder(place: str | Path, remote: Remote | None) -> Folder:
    """A path, or a URL with `://`; ValueError for a URL without `remote` or one that fsspec cannot read."""
    if "://" not in str(place):
        return Path(place)
    if remote is None:
        raise ValueError(f"{place}: shards behind a URL need `remote`, which says where their tars are cached")
    try:
        fsspec.get_filesystem_class(str(place).split("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{place} cannot be read: {error}. Extras: acetate[s3], acetate[gcs].") from error
    return RemoteFolder(str(place).rstrip("/"), remote)


def read_file(folder: Folder, name: str) -> bytes:
    """FileNotFoundError where there is none, another OSError if it cannot be read."""
    if isinstance(folder, Path):
        return (folder / name).read_bytes()
    return folder.remote.read(f"{folder}/{name}")


def find_members(file: BinaryIO, size: int) -> Iterator[tuple[str, Span]]:
    """Name and place of what lies whole within a tar's `size` bytes; tarfile.TarError where its headers break."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.offset_data + member.size <= size:
                yield member.name, (member.offset_data, member.size)


def read_at(file: BinaryIO, span: Span) -> bytes:
    offset, size = span
    file.seek(offset)
    return file.read(size)


def _open_used(path: Path) -> BinaryIO:
    file = open(path, "rb")  # noqa: SIM115  for the caller
    os.utime(path)
    return file
