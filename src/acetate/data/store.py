"""Places where shards lie: a local folder, read in place, or a URL of fsspec's, whose tars are
fetched whole into a cache."""

import fcntl
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import fsspec
from filelock import FileLock

from acetate.data.downloads import Bounded, FetchError, MoreThanSaid, TooLarge, in_one_stream
from acetate.data.members import Span, find_members, read_at
from acetate.documents import read_plain, too_large
from acetate.redaction import redacted, scrubbed, secrets_of

FORGET = 300.0  # seconds in which a process does not ask again for a tar that it could not get
STALE = 600.0  # seconds for which a download waits for room, others of which may end
POLL = 0.1  # seconds
MOST_BYTES = 2**29  # of a manifest; a million clips take about a quarter of a GiB
INDEXED = 64  # tars of which a process remembers where their members lie
# others are no files of ours
TAR, PART = re.compile(r"[0-9a-f]{64}\.tar"), re.compile(r"[0-9a-f]{32}\.(\d+)\.part")

T = TypeVar("T")


class Remote:
    """Reads shards behind a URL: a tar goes whole into `cache_dir` and is checked against its
    SHA-256.

    All processes of a machine, also of several runs with the same cache_gb, share the cache: it
    never holds more than cache_gb * 2**30 bytes, downloads under way included; tars that were not
    read for longest go first. What fails, comes damaged or brings nothing for `timeout` seconds is
    tried again `retries` times, after about `backoff` seconds, then twice as long each time; a file
    that does not exist is not. A tar that did not come is not asked for again for FORGET seconds,
    by any process of the run. storage_options: of fsspec's file systems; below the name of a
    protocol, as {s3: {...}}, or of an origin, as {https://HOST: {...}}, of that one alone.
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
        self.secrets = [*secrets_of({"storage_options": self.storage_options})]
        self.members: dict[str, dict[str, Span]] = {}  # of the tars read last
        self.made = time.time()

    def __getstate__(self) -> dict[str, Any]:
        # a reference to a clip that goes to another process takes it along
        return self.__dict__ | {"members": {}}

    def read(self, url: str, most: int) -> bytes:
        """Reads a small file. Raises FileNotFoundError where there is none, FetchError past the
        retries or for more than `most` bytes."""

        def once() -> bytes:
            with self._part(0) as part:
                try:
                    self._download(url, part, most)
                except MoreThanSaid:
                    raise TooLarge(too_large(url, most)) from None
                return part.read_bytes()

        return self._persist(once, url)

    def read_member(self, tar: "RemoteTar", name: str, most: int) -> bytes:
        """Reads a member of a tar, which is fetched if the cache lacks it; OSError if it cannot be,
        ValueError for more than `most` bytes."""
        with self.open(tar) as file:
            if tar.sha256 not in self.members:
                self.members[tar.sha256] = dict(find_members(file, tar.size))
                if len(self.members) > INDEXED:
                    del self.members[next(iter(self.members))]
            if name not in self.members[tar.sha256]:
                raise FetchError(f"{name} is not in {tar}")
            return read_at(file, self.members[tar.sha256][name], most)

    def open(self, tar: "RemoteTar") -> BinaryIO:
        """Opens a whole tar; as long as it is open, it can be read even if it has left the
        cache."""
        with suppress(FileNotFoundError):
            return self._open_cached(tar)
        self._check_failed(tar)
        with self._lock(tar.sha256[:2]):
            with suppress(FileNotFoundError):
                return self._open_cached(tar)  # another process has fetched it
            self._check_failed(tar)  # or has failed to
            try:
                return self._persist(lambda: self._fetch(tar), str(tar))
            except OSError as error:
                self._failure(tar).write_text(str(error))
                raise

    def has(self, tar: "RemoteTar") -> bool:
        return self._path(tar).exists()

    def keep(self, tars: "Iterable[RemoteTar]") -> None:
        """Marks tars as if they had just been read: others leave the cache before them."""
        for tar in tars:
            with suppress(OSError):
                os.utime(self._path(tar))

    def _path(self, tar: "RemoteTar") -> Path:
        return self.cache_dir / f"{tar.sha256}.tar"

    def _failure(self, tar: "RemoteTar") -> Path:
        return self.cache_dir / f"{tar.sha256}.failed"

    def _check_failed(self, tar: "RemoteTar") -> None:
        """Raises FetchError where a process of this run could not get it a moment ago."""
        with suppress(FileNotFoundError):
            when = self._failure(tar).stat().st_mtime
            if when > max(self.made, time.time() - FORGET):
                raise FetchError(self._failure(tar).read_text())

    def _open_cached(self, tar: "RemoteTar") -> BinaryIO:
        """Opens a tar of the cache. Raises FileNotFoundError also for what is shorter: the machine
        lost its power as it was written."""
        file = open(self._path(tar), "rb")  # noqa: SIM115  for the caller
        if os.fstat(file.fileno()).st_size != tar.size:
            file.close()
            raise FileNotFoundError(f"{self._path(tar)} is not the whole tar")
        self.keep([tar])
        return file

    def _fetch(self, tar: "RemoteTar") -> BinaryIO:
        with self._part(tar.size) as part:
            self._download(tar.url, part, tar.size)
            found = part.stat().st_size
            if found != tar.size:
                raise FetchError(f"{found} bytes came, the manifest says {tar.size}")
            with open(part, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != tar.sha256:
                    raise FetchError("its SHA-256 is not the manifest's")
                os.fsync(file.fileno())
            with self._lock("cache"):
                part.replace(self._path(tar))
                self._failure(tar).unlink(missing_ok=True)
                return self._open_cached(tar)

    def _persist(self, once: Callable[[], T], what: str) -> T:
        """Tries `once` again with pauses that are drawn, so that many machines do not come back at
        the same time."""
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                # Not the global generator, on which others may rely
                time.sleep(
                    self.backoff * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                )
            try:
                return once()
            except FileNotFoundError:
                raise FileNotFoundError(f"{redacted(what)} does not exist") from None
            except TooLarge:
                raise
            except Exception as error:  # every file system has its own
                reason = f"{type(error).__name__}: {error}"
        said = f"{what} could not be fetched in {self.retries + 1} tries; the last: {reason}"
        raise FetchError(scrubbed(said, self.secrets))

    def _download(self, url: str, part: Path, size: float = float("inf")) -> None:
        """Downloads a tar. Raises TimeoutError once the file has not grown for `timeout` seconds,
        MoreThanSaid once it has more than `size` bytes."""
        # The instance is made here, since fsspec keeps one for every thread that asks.
        options, arguments = in_one_stream(url, self.timeout)
        files, path = fsspec.url_to_fs(url, **options | self._options(url))
        done: Future[None] = Future()
        given_up = threading.Event()
        bound = Bounded(size, given_up)

        def work() -> None:
            try:
                files.get_file(path, str(part), callback=bound, **arguments)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
            if given_up.is_set():
                part.unlink(missing_ok=True)  # which it may have made anew

        # Not every file system knows timeouts: a thread that hangs is left behind, with a file that
        # nobody reads.
        threading.Thread(target=work, daemon=True).start()
        try:
            grown, since = 0, time.monotonic()
            while not wait([done], timeout=min(1.0, self.timeout / 4)).done:
                found = part.stat().st_size if part.exists() else 0
                bound.absolute_update(found)  # not every file system calls it
                if found != grown:
                    grown, since = found, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    raise TimeoutError(f"nothing came for {self.timeout:g} s")
        except OSError:
            given_up.set()
            raise
        done.result()

    def _options(self, url: str) -> dict[str, Any]:
        protocol, _, place = url.partition("://")
        origin = f"{protocol}://{place.partition('/')[0].rpartition('@')[2]}"
        others = set(fsspec.available_protocols())
        found = {
            name: value
            for name, value in self.storage_options.items()
            if name not in others and "://" not in name
        }
        for name in (protocol, origin):
            found |= self.storage_options.get(name) or {}
        return found

    def _lock(self, name: str) -> FileLock:
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        return FileLock(self.cache_dir / f"{name}.lock")

    @contextmanager
    def _part(self, size: int) -> Iterator[Path]:
        """Makes a file whose name takes its bytes out of what the cache has left, for one try: one
        that was left behind may still write. It is gone afterwards, also where the process ends
        meanwhile."""
        since = time.monotonic()
        while (file := self._reserve(size)) is None:
            if time.monotonic() - since > STALE:
                raise FetchError(f"other downloads fill {self.cache_dir}; raise cache_gb")
            time.sleep(POLL)
        part = Path(file.name)
        drop = Finalize(None, part.unlink, (True,), exitpriority=0)
        with file:
            try:
                yield part
            finally:
                drop()

    def _reserve(self, size: int) -> BinaryIO | None:
        """Returns the file, which this process locks as long as it has it open; None where
        downloads leave too little room."""
        with self._lock("cache"):
            if not self._make_room(size):
                return None
            file = open(self.cache_dir / f"{uuid4().hex}.{size}.part", "xb")  # noqa: SIM115  for the caller
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
            return file

    def _make_room(self, size: int) -> bool:
        """Removes tars, under the lock; False where downloads under way leave too little room."""
        tars: list[tuple[int, int, Path]] = []
        parts = 0
        for path in self.cache_dir.iterdir():
            with suppress(FileNotFoundError):
                stat = path.stat()
                if TAR.fullmatch(path.name):
                    tars.append((stat.st_mtime_ns, stat.st_size, path))
                elif found := PART.fullmatch(path.name):
                    if _left_behind(path, stat.st_mtime, self.timeout):
                        path.unlink()
                    else:
                        parts += int(found[1])
        if parts + size > self.max_bytes:
            return False
        held = parts + sum(used for _, used, _ in tars)
        for _, used, path in sorted(tars):
            if held + size <= self.max_bytes:
                break
            path.unlink()
            held -= used
        return True


def _left_behind(part: Path, written: float, timeout: float) -> bool:
    """Tells whether the process that downloaded it is gone; where there are no locks, whether it
    stands still for long."""
    try:
        with part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - written > STALE + timeout


@dataclass(frozen=True)
class RemoteFolder:
    url: str = field(repr=False)
    remote: Remote

    def __str__(self) -> str:
        return redacted(self.url)

    def file(self, name: str) -> str:
        """Returns its URL, with what the folder's is signed with."""
        place, mark, query = self.url.partition("?" if self.url.startswith("http") else "\0")
        return f"{place.rstrip('/')}/{name}{mark}{query}"


@dataclass(frozen=True)
class RemoteTar:
    """A tar as its manifest describes it."""

    parent: RemoteFolder
    name: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.parent}/{self.name}"

    @property
    def url(self) -> str:
        return self.parent.file(self.name)

    def read(self, member: str, most: int) -> bytes:
        return self.parent.remote.read_member(self, member, most)


Folder = Path | RemoteFolder


def listed(folders: str | Iterable[str]) -> list[str]:
    """Lists one folder or many, as configs name them."""
    return [folders] if isinstance(folders, str) else list(folders)


def open_folder(place: str | Path, remote: Remote | None) -> Folder:
    """Returns a path, or the folder of a URL with `://`. Raises ValueError for a URL without
    `remote` or one that fsspec cannot read."""
    if "://" not in str(place):
        return Path(place)
    shown = redacted(str(place))
    if remote is None:
        raise ValueError(
            f"{shown}: shards behind a URL need `remote`, which says where their tars are cached"
        )
    try:
        fsspec.get_filesystem_class(str(place).split("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{shown} cannot be read: {error}. In the clone: pip install -e '.[s3]' or '.[gcs]'."
        ) from error
    if not str(place).split("://")[1].strip("/"):
        raise ValueError(f"{shown} names no bucket or host; as in s3://bucket/clips")
    return RemoteFolder(str(place).rstrip("/"), remote)


def read_file(folder: Folder, name: str, most: int = MOST_BYTES) -> bytes:
    """Reads a file. Raises FileNotFoundError where there is none, another OSError if it cannot be
    read, is no plain file or has more than `most` bytes."""
    if isinstance(folder, Path):
        return read_plain(folder / name, most)
    return folder.remote.read(folder.file(name), most)
