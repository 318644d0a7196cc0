"""Reads and writes a training checkpoint as a folder that all ranks write: shards of its tensors,
and one file of all the rest.

In memory it is the one of a single file, `state_dict` and `optimizer_states` by name and number of
the parameter, so that either kind goes on on any number of ranks, sharded or not.
"""

import os
import pathlib
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as sharded_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.serialization import _get_layout

from acetate.formats.layout import INDEX, REST
from acetate.models.adapters import listed
from acetate.models.sharding import shard_like
from acetate.models.weights import load_data, reason
from acetate.replacing import rename_over, unwritten

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AttributeError,
    KeyError, IndexError,
              TypeError)  # fmt: skip
# name in the index -> the tensor in whose manner it is sharded
Like = Callable[[str], Tensor | None]


def write_sharded(checkpoint: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint from all ranks, which all call it; the folder has its name when
    everything is in it, and an older one is there until then (`replacing.standing`).

    Raises OSError on all ranks.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    tensors, rest = split(checkpoint)

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        shards = {
            place.relative_path
            for place in _SafeReader(temporary).read_metadata().storage_data.values()
        }
        if missing := [name for name in sorted(shards) if not (temporary / name).exists()]:
            raise OSError(
                f"no {listed(missing)}, which another rank has written: all machines must share "
                "the folder"
            )
        with (temporary / REST).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        rename_over(temporary, folder)

    try:
        _on_first_rank(prepare)
        dcp.save(tensors, storage_writer=FileSystemWriter(temporary))
        _on_first_rank(finish)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise unwritten(folder, _cause(error)) from error


def _on_first_rank(action: Callable[[], None]) -> None:
    """Runs an action on the first rank. The others wait, and all raise OSError for whatever it
    raises."""
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failed = error
    said = [None if failed is None else repr(failed)]
    dist.broadcast_object_list(said)
    if said[0] is not None:
        raise OSError(said[0]) from failed


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Divides a checkpoint into tensors of the model and its optimizers, named as in the index, and
    all the rest; `join` puts them together."""
    tensors = {f"state_dict.{name}": value for name, value in checkpoint["state_dict"].items()}
    optimizers = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for index, values in optimizer["state"].items():
            tensors |= {
                f"optimizer_states.{number}.{index}.{key}": value for key, value in values.items()
            }
        optimizers.append({**optimizer, "state": {}})
    return tensors, {**checkpoint, "state_dict": {}, "optimizer_states": optimizers}


def join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    checkpoint = {**rest, "state_dict": {}}
    for name, value in tensors.items():
        part, _, name = name.partition(".")
        if part == "state_dict":
            checkpoint[part][name] = value
            continue
        number, index, key = name.split(".")
        checkpoint[part][int(number)]["state"].setdefault(int(index), {})[key] = value
    return checkpoint


def shard_whole(checkpoint: dict[str, Any], like: Like) -> dict[str, Any]:
    """Returns a checkpoint of whole tensors with this rank's shards in their place."""
    tensors, rest = split(checkpoint)
    likes = {name: like(name) for name in tensors}
    return join(
        {n: v if likes[n] is None else shard_like(v, likes[n]) for n, v in tensors.items()}, rest
    )


def read_sharded(
    folder: Path,
    like: Like | None = None,
    parts: Iterable[str] = ("state_dict", "optimizer_states"),
):
    """Reads a checkpoint: whole in this one process, or, where all ranks call it with `like`, in
    shards as those.

    parts: which tensors. Raises ValueError for a folder that cannot be read, or would run code on
    the way.
    """
    reader = _SafeReader(folder)
    try:
        index = reader.read_metadata().state_dict_metadata
        found = {
            name: entry
            for name, entry in index.items()
            if name.partition(".")[0] in parts and isinstance(entry, TensorStorageMetadata)
        }
        if not any(name.startswith("state_dict.") for name in found):
            raise ValueError(f"{INDEX} names no tensor of a state_dict")
        if holes := [name for name, entry in found.items() if not _covered(entry)]:
            raise ValueError(f"{INDEX} has no shards for all of {listed(holes)}")
        tensors = {
            name: _empty(entry, None if like is None else like(name))
            for name, entry in found.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
            dcp.load(tensors, storage_reader=reader, no_dist=like is None)
    except (dcp.CheckpointException, *UNREADABLE) as error:
        raise ValueError(
            f"{folder} cannot be read as a sharded checkpoint ({_cause(error)}). Give another one."
        ) from error
    rest = load_data(folder / REST)
    if not isinstance(rest, dict):
        raise ValueError(
            f"{folder / REST} holds a {type(rest).__name__}, no dict. Give another checkpoint."
        )
    return join(tensors, rest)


def _cause(error: Exception) -> object:
    cause: object = error
    if isinstance(error, dcp.CheckpointException):
        cause = next(iter(error.failures.values()))[0]
    return f"{type(cause).__name__}: {reason(cause)}" if isinstance(cause, Exception) else cause


def _empty(entry: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    if isinstance(like, DTensor) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _covered(entry: TensorStorageMetadata) -> bool:
    """Returns whether a tensor's shards leave out no number: such numbers would be whatever was in
    memory."""
    covered = torch.zeros(entry.size, dtype=torch.bool)
    for chunk in entry.chunks:
        covered[
            tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        ] = True
    return bool(covered.all())


class _SafeReader(FileSystemReader):
    """Reads as torch's reader does, with an index that may name nothing but the parts of an
    index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} holds a {type(index).__name__}, no index")
        index.storage_meta = sharded_metadata.StorageMeta(load_id=self.load_id)
        return index


class _IndexUnpickler(pickle.Unpickler):
    METADATA = ("Metadata", "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata",
        "ChunkStorageMetadata",
                "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module == sharded_metadata.__name__ and name in self.METADATA:
            return getattr(sharded_metadata, name)
        if module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath
        known = {
            ("torch.serialization", "_get_layout"): _get_layout,
            (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"{INDEX} names {module}.{name}, which is no part of an index"
            )
        return known[module, name]
