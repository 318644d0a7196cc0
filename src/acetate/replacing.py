"""A file or folder in the place of another, so that a whole one can be found at any moment."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def rename_over(temporary: Path, path: Path) -> None:
    """Atomic for files. Folders cannot be renamed over, nor over files: what is there steps aside first, where
    `standing` finds it, and comes back if the second rename fails."""
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
    """The path; or what was to be replaced there, where a process was killed between the two renames."""
    return _aside(path) if not path.exists() and _aside(path).exists() else path


def remove(path: Path) -> None:
    """Whatever is there, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unwritten(path: Path, error: object) -> OSError:
    """What to say of a checkpoint, or the adapters beside it, that could not be written."""
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
    if standing(path.with_name("last.ckpt")).exists():
        advice = "Earlier checkpoints are whole: make room and go on with resume=last."
    else:
        advice = "There is no earlier checkpoint: make room and start again."
    return OSError(f"{path} could not be written ({error}); {free:.0f} MiB are free there. {advice}")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """safetensors' save_file, which makes private files and writes metadata in any order: here the umask
    decides, and equal contents are equal bytes."""
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
    """The mode of a file, or of a folder and all that is in it: what open and mkdir would have given."""
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        if not each.is_symlink():
            each.chmod(new_mode(folder=each.is_dir()))


def new_mode(folder: bool = False) -> int:
    """Of what this process creates."""
    mask = os.umask(0o077)  # the only way to ask
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def _aside(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")
