"""What was trained, out of any checkpoint that a run writes: whole, sharded, or an adapter file."""

import json
import pathlib
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as sharded_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.serialization import _get_layout

from acetate.models.adapters import ADAPTER_SCHEMA, read_adapter_file

KINDS = ("rgba_vae", "dit_dora")
INDEX, REST = ".metadata", "meta.pt"  # of a sharded checkpoint: where tensors lie; all that is no tensor


@dataclass(frozen=True)
class Trained:
    """Tensors named as in the model (RGBAVAE, or the DiT with PEFT's adapters), and what the run says of them."""

    path: Path
    kind: str  # rgba_vae or dit_dora
    state: dict[str, Tensor]
    facts: dict[str, Any]


def read_trained(source: str, ema: bool | None = None) -> Trained:
    """What `source` trained: a .ckpt file or sharded folder, an adapter .safetensors, or a folder of runs (newest).

    ema: True the average, False the raw weights, None the average where there is one. Raises FileNotFoundError
    (nothing there) and ValueError (not readable, no average, another kind of file), naming the file.
    """
    path = _newest(Path(source).expanduser())
    if path.suffix == ".safetensors":
        state, facts = read_adapter_file(path)
        averaged = bool(facts.get("averaged", False))
        if ema is not None and ema != averaged:
            holds = "the average" if averaged else "no average, but the raw weights"
            raise ValueError(
                f"{path} holds {holds}; ema={str(ema).lower()} needs the .ckpt beside it, or leave out ema."
            )
    else:
        checkpoint = _read_sharded(path) if path.is_dir() else _read_pickled(path)
        state, facts, averaged = _choose(checkpoint, path, ema)
    kind = facts.get("kind")
    if kind not in KINDS or facts.get("schema") != ADAPTER_SCHEMA:
        raise ValueError(
            f"{path} is of kind {kind!r}, schema {facts.get('schema')!r}; needed: {' or '.join(KINDS)}, schema "
            f"{ADAPTER_SCHEMA}. Give a checkpoint of experiment=vae_rgba or dit_dora."
        )
    prefix = "vae." if kind == "rgba_vae" else "transformer."
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    return Trained(path, kind, state, {**facts, "averaged": averaged})


def _newest(path: Path) -> Path:
    """The file or sharded folder itself, or the newest last checkpoint below a folder."""
    if path.is_file() or (path / INDEX).is_file():
        return path
    found = sorted(path.glob("**/checkpoints/last.*"), key=lambda file: file.stat().st_mtime)
    found = [file for file in found if file.suffix in (".ckpt", ".safetensors")]
    if not found:
        raise FileNotFoundError(
            f"{path}: no checkpoint there. Give a .ckpt (a file or a sharded folder), the .safetensors beside it, or "
            "the folder of a run, which has checkpoints/last.ckpt."
        )
    whole = found[-1].with_suffix(".ckpt")  # holds the raw weights and the average
    return whole if whole.exists() else found[-1]


def _choose(checkpoint: dict[str, Any], path: Path, ema: bool | None) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """State, facts, and whether the state is the average."""
    if "adapter_metadata" not in checkpoint:
        raise ValueError(
            f"{path} does not say what model it belongs to: it is of another task, or older than acetate's "
            "adapter_metadata. Give the .safetensors beside it."
        )
    facts = {name: json.loads(value) for name, value in checkpoint["adapter_metadata"].items()}
    facts["step"] = checkpoint["global_step"]
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("average")  # where callbacks.ema.EMA keeps it
    if ema and not average:
        raise ValueError(f"{path} holds no average: its run had no EMA (callbacks=ema). Leave out ema, or ema=false.")
    if average and ema is not False:
        return average, facts, True
    return checkpoint["state_dict"], facts, False


def _read_pickled(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}). Give another one of its run.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a dict. Give a run's .ckpt.")
    return checkpoint


def _read_sharded(folder: Path) -> dict[str, Any]:
    """A folder of Lightning's ModelParallelStrategy, whole, in this one process. Optimizer states are left there."""
    reader = _SafeReader(folder)
    try:
        index = reader.read_metadata().state_dict_metadata
        state = {
            name.removeprefix("state_dict."): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in index.items()
            if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
            dcp.load({"state_dict": state}, storage_reader=reader, no_dist=True)
    except (dcp.CheckpointException, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read as a sharded checkpoint ({error}). Give another one.") from error
    return {**_read_pickled(folder / REST), "state_dict": state}


class _SafeReader(FileSystemReader):
    """torch's reader, with an index that may name nothing but what an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} holds a {type(index).__name__}, no index")
        index.storage_meta = sharded_metadata.StorageMeta(load_id=self.load_id)
        return index


class _IndexUnpickler(pickle.Unpickler):
    METADATA = ("Metadata", "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata", "ChunkStorageMetadata",
                "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module == sharded_metadata.__name__ and name in self.METADATA:
            return getattr(sharded_metadata, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath
        known = {
            ("torch.serialization", "_get_layout"): _get_layout,
            (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which is no part of an index")
        return known[module, name]
