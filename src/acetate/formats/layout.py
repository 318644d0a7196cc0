"""The layout of a checkpoint that is a folder of shards."""

from pathlib import Path

INDEX, REST = ".metadata", "meta.pt"  # which tensor lies where; all that is no tensor


def is_sharded(path: Path) -> bool:
    """Returns whether the folder holds a whole checkpoint of shards."""
    return (path / INDEX).is_file()
