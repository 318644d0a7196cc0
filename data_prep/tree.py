"""Every file and folder below a folder, each found once, whichever links lead to it."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from acetate.console import printable

APPLE_DOUBLE = "macOS's notes on another file (AppleDouble)"
NOWHERE = "a link that leads nowhere"
Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class Tree:
    """folders: what is in each, in the order of names, without what is hidden. ignored: name,
    relative to the source -> why."""

    source: Path
    folders: dict[Path, list[Path]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """Returns how a report calls it."""
        inside = path.relative_to(self.source) if path.is_relative_to(self.source) else path
        return printable(inside)

    def files(self) -> Iterator[Path]:
        for paths in self.folders.values():
            yield from (path for path in paths if path not in self.folders)


def walk(source: Path, leave_out: Collection[Path] = ()) -> Tree:
    """Links are followed after all that is really there, to any depth; one that leads nowhere, back
    or to what was found already is ignored with that reason. FileNotFoundError if it is none."""
    if not source.is_dir():
        raise FileNotFoundError(
            f"source={printable(source)} is not a folder; name the folder that holds the media."
        )
    tree = Tree(source)
    above = {_identity(folder) for folder in source.resolve().parents}
    found: dict[Identity, Path] = {}
    folders, links = [source], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        identity = _identity(folder)
        if identity in above:
            tree.ignored[tree.name(folder)] = "a link to a folder that the source lies in"
        elif identity in found:
            there = tree.name(found[identity])
            tree.ignored[tree.name(folder)] = f"leads to what is found already: {there}"
        else:
            found[identity] = folder
            inside = _listed(tree, folder, leave_out)
            tree.folders[folder] = inside
            below = [path for path in inside if path.is_dir()]
            folders += [path for path in below if not path.is_symlink()]
            links = sorted([*links, *(path for path in below if path.is_symlink())])
    ordered = sorted(tree.folders)
    contents = {
        folder: [p for p in tree.folders[folder] if p in tree.folders or not p.is_dir()]
        for folder in ordered
    }
    return Tree(source, contents, tree.ignored)


def _listed(tree: Tree, folder: Path, leave_out: Collection[Path]) -> list[Path]:
    """Files and folders of one folder; what is neither, or hidden, is noted as ignored."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        tree.ignored[tree.name(folder)] = f"cannot be listed ({error.strerror})"
        return []
    kept = []
    for path in paths:
        if path in leave_out:
            continue
        if path.name.startswith("."):
            for file in _all_below(path):
                apple = file.name.startswith("._")
                tree.ignored[tree.name(file)] = APPLE_DOUBLE if apple else "hidden"
        elif path.is_dir() or path.is_file():
            kept.append(path)
        elif path.is_symlink():
            target = printable(os.readlink(path))
            tree.ignored[tree.name(path)] = f"{NOWHERE}: {target}"
        else:
            tree.ignored[tree.name(path)] = "neither a file nor a folder"
    return kept


def _all_below(path: Path) -> list[Path]:
    if path.is_symlink() or not path.is_dir():
        return [path]
    return [Path(root, name) for root, _, names in os.walk(path) for name in names]


def _identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino
