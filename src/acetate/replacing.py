"""A file or folder in the place of another, so that a whole one can be found at any moment."""

import os
import shutil
from contextlib import suppress
from pathlib import Path


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
    return OSError(
        f"{path} could not be written ({error}); {free:.0f} MiB are free there. Earlier checkpoints are whole: make "
        "room and go on with resume=last."
    )


def _aside(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")
