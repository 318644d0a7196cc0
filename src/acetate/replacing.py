"""Puts a file or folder in the place of another, so that a whole one can be found at any moment."""

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:  # importing torch takes seconds
    from torch import Tensor


def check_out(path: Path, *, folder: bool = False, name: str = "out") -> None:
    """Checks that a file, or a folder, can be made there. Raises OSError before any work, which
    names the setting.

    Parents that are missing are no fault; whoever writes makes them.
    """
    if not folder and path.is_dir():
        raise IsADirectoryError(
            f"{name}={path} is a folder; name a file, such as {name}={path / 'NAME'}"
        )
    if folder and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{name}={path} is a file; name a folder, which may be new")
    inside = path if folder else path.parent
    there = next(place for place in (inside, *inside.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"{name}={path}: {there} is a file, so that nothing can be made in it"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}={path}: {there} cannot be written to; name another place")


@contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Raises OSError with the path, the room there and the way out for one that the block raises;
    it only writes."""
    try:
        yield
    except OSError as error:
        there = next(place for place in path.absolute().parents if place.exists())
        free = shutil.disk_usage(there).free / 2**20
        raise OSError(
            f"{path} could not be written ({error.strerror or error}); {free:,.0f} MiB are free "
            "there. Make room or name another place and run the same command again, which keeps "
            "what is finished."
        ) from error


@contextmanager
def written(path: Path) -> Generator[TextIO, None, None]:
    """Yields a text file that takes the path's place when the block ends, whole or not at all.
    Raises OSError as `writing`."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                yield file
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file that takes the path's place, whole or not at all; makes its folder."""
    with written(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def rename_over(temporary: Path, path: Path) -> None:
    """Renames atomically for files. Folders cannot be renamed over, nor over files: the old one
    steps aside first, where `standing` finds it, and comes back if the second rename fails."""
    if not os.path.lexists(path) or not (temporary.is_dir() or path.is_dir()):
        os.replace(temporary, path)
        return
    old = _aside(path)
    remove(old)
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(old, path)
        raise
    with suppress(OSError):
        remove(old)


def standing(path: Path) -> Path:
    """Returns the path, or what was to be replaced there, where a process was killed between the
    two renames."""
    return _aside(path) if not path.exists() and _aside(path).exists() else path


def remove(path: Path) -> None:
    """Removes a file or folder, if there is any."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unwritten(path: Path, error: object) -> OSError:
    """Returns the message for a checkpoint, or the adapters beside it, that could not be
    written."""
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
    if standing(path.with_name("last.ckpt")).exists():
        advice = "Earlier checkpoints are whole: make room and go on with resume=last."
    else:
        advice = "There is no earlier checkpoint: make room and start again."
    return OSError(
        f"{path} could not be written ({error}); {free:.0f} MiB are free there. {advice}"
    )


def write_tensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors as safetensors' save_file, which makes private files and writes metadata in
    any order: here the umask decides, and equal contents are equal bytes."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  its PathLike

    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))
    as_umask_says(path)


def as_umask_says(path: Path) -> None:
    """Sets the mode of a file, or of a folder and all that is in it, to that of open and mkdir."""
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        if not each.is_symlink():
            each.chmod(new_mode(folder=each.is_dir()))


def new_mode(folder: bool = False) -> int:
    """Returns the mode of files or folders that this process creates."""
    mask = os.umask(0o077)  # the only way to ask
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def _aside(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")
