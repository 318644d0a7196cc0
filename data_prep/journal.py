"""JSON lines that a run appends one by one, so that the next run goes on after the last of them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from acetate.documents import parse
from acetate.replacing import writing, written

Line = dict[str, Any]


def encode(line: Mapping[str, Any]) -> str:
    """Writes a line; names of files that are not Unicode are kept by escapes of JSON."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(line)
    return text + "\n"


def read_journal(path: Path) -> list[Line]:
    """Reads the lines of a journal; none without a file. A last line that was cut off is left out.
    Raises ValueError for any other that is not JSON."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = parse(text)
            if not isinstance(line, dict):
                raise ValueError("no object of names and values")
            lines.append(line)
        except ValueError as error:
            raise ValueError(
                f"{path}:{number} is not JSON ({error}). Repair the line or remove the file."
            ) from error
    return lines


@contextmanager
def open_journal(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Appends lines, each on the disk before the next; a last one that was cut off goes first."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+")  # noqa: SIM115  closed below
    with file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def append(line: Mapping[str, Any]) -> None:
            with writing(path):
                file.write(encode(line).encode())
                file.flush()

        yield append


def lock_of(out: Path, rank: int = 0) -> Path:
    """Returns the lock beside `out`, which holds nothing but what was made; it is there while that
    is made."""
    out = out.absolute()
    return out.with_name(f".{out.name}.{rank}.lock")


@contextmanager
def only_writer(out: Path, rank: int = 0) -> Iterator[None]:
    """Locks a file or folder. Raises RuntimeError at once if another process writes it. Who is
    killed loses the lock."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_of(out, rank))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"out={out} is being written by another process. Wait for it or end it, or name "
            "another place."
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes lines, whole or not at all."""
    with written(path) as file:
        file.writelines(map(encode, lines))
