"""Writes the folder of an export: whole or not there, and never over files that are not its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from acetate.models.wan import replace_folder

MARK = "export.json"  # says what the folder holds


def check_replaceable(folder: Path) -> None:
    """Raises FileExistsError unless `folder` is new, empty, or an earlier export to which nothing
    was added."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    listed = _listed(folder / MARK)
    others = [name for name in _files(folder) if name not in listed]
    if others or not listed:
        shown = f" ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
        raise FileExistsError(
            f"out={folder} holds what no export wrote{shown}; only an earlier export is replaced. "
            "Give another out=, or move those files away."
        )


def write_export(
    folder: Path, writers: dict[str, Callable[[Path], object]], facts: dict[str, Any]
) -> dict[str, int]:
    """Runs each writer on its path below `folder`, which appears when all are done; returns bytes
    by file.

    Raises FileExistsError as `check_replaceable`, and OSError that says how much room there is;
    what stood at `folder` is then as it was.
    """
    check_replaceable(folder)
    sizes: dict[str, int] = {}

    def write(temporary: str) -> None:
        root = Path(temporary)
        for name, writer in writers.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            writer(root / name)
        sizes.update(_files(root))
        (root / MARK).write_text(json.dumps({**facts, "files": sizes}, indent=1))

    try:
        replace_folder(folder, write)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch turns a full disk into a RuntimeError
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise OSError(
            f"{folder} could not be written ({error}); {free:.0f} MiB are free there. What stood "
            "there before is untouched: make room, or give another out=."
        ) from error
    return sizes


def _listed(mark: Path) -> dict[str, int]:
    """Returns the files that an earlier export wrote; none where the mark is not there, or is no
    such file's."""
    try:
        files = json.loads(mark.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _files(folder: Path) -> dict[str, int]:
    """Returns bytes by name of every file but the mark."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files.pop(MARK, None)
    return files
