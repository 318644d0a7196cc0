"""Finds and checks files of weights, and reads them without running code and without a second copy
in memory."""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from acetate.documents import parse, read_plain
from acetate.models.adapters import check_fit, listed
from acetate.models.sharding import shard_like

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# what diffusers and transformers call a single file
STANDARD = ("diffusion_pytorch_model", "model", "pytorch_model")
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.\w+")
M = TypeVar("M", bound=nn.Module)
MOST_JSON = 2**26  # bytes of a config or an index
REMAP = 2**26  # bytes to convert before a file is mapped anew, which gives its pages back


@dataclass(frozen=True)
class Weights:
    """The tensors of a file or a folder by name: shapes and types as meta tensors, and the file in
    which each value lies."""

    path: Path
    meta: dict[str, Tensor]
    files: dict[str, Path]

    def shape(self, name: str) -> torch.Size:
        if name not in self.meta:
            raise ValueError(
                f"{self} lacks {name}: not Wan2.1's original weights, or a truncated file."
            )
        return self.meta[name].shape

    def label(self, name: str) -> str:
        """Returns the name of a tensor for an error."""
        return f"{name} in {self.files[name].name}" if len(set(self.files.values())) > 1 else name

    def __str__(self) -> str:
        files = set(self.files.values())
        return str(files.pop() if len(files) == 1 else self.path)


def open_weights(path: Path) -> Weights:
    """Opens a file, or a folder: one file of a standard name, or all that an index names, or all
    shards.

    No values are read. Raises FileNotFoundError for a folder without weights, and ValueError for
    files that are damaged, hold objects other than tensors, are several without an index, or do not
    agree with their index.
    """
    meta, files = {}, {}
    index = _index(path)
    for file in _files(path, index):
        held = _open(file)
        if index is not None:
            _check_index(index, file, held)
        if twice := [name for name in held if name in files]:
            raise ValueError(
                f"{listed(twice)}: in {files[twice[0]]} and in {file} too. Remove the file that is "
                "stale."
            )
        meta |= {name: torch.empty_like(value, device="meta") for name, value in held.items()}
        files |= dict.fromkeys(held, file)
    return Weights(path, meta, files)


def read_weights(path: Path, wrapped: bool = False) -> dict[str, Tensor]:
    """Reads all tensors by name, mapped from their files. Raises as `open_weights` does.

    wrapped: takes the `state_dict` of a training checkpoint, where the file has one, in the place
    of the whole.
    """
    if path.is_dir():
        opened = {file: _open(file) for file in _files(path, _index(path))}
        return {name: opened[file][name] for name, file in open_weights(path).files.items()}
    return _open(_files(path, None)[0], wrapped)


def assign(
    model: M,
    weights: Weights,
    names: Mapping[str, str],
    dtype_of: Callable[[str], torch.dtype],
    prepare: Callable[[M], object] | None = None,
) -> None:
    """Puts the file's tensors in the place of a meta model's, each in dtype_of(its name).

    names: the model's name -> the file's, for every tensor of the file. One tensor at a time is
    held twice, and only where its type changes; the others stay mapped. prepare: what becomes of
    the meta model before, such as adapters on it or shards of it, of which each gets its part.
    Raises ValueError as `check_fit`, and for values that are not finite, and puts nothing then.
    """
    found = {name: weights.meta[key] for name, key in names.items()}
    labels = {name: weights.label(key) for name, key in names.items()}
    check_fit(dict(model.state_dict()), found, str(weights), labels)
    if prepare is not None:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype_of(name))
        prepare(model)
    # PEFT moves a layer that it adapts one name further down
    places = {
        name.replace(".base_layer.", "."): (name, tensor)
        for name, tensor in model.state_dict().items()
    }
    by_file: dict[Path, dict[str, str]] = {}
    for name, key in names.items():
        by_file.setdefault(weights.files[key], {})[name] = key

    def convert(name: str, value: Tensor) -> Tensor:
        return shard_like(value, places[name][1]).to(dtype_of(name))

    values = (pair for file, part in by_file.items() for pair in _converted(file, part, convert))
    model.load_state_dict(
        {places[name][0]: value for name, value in values}, strict=prepare is None, assign=True
    )


def _converted(
    file: Path, names: Mapping[str, str], convert: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    held, done, converted = _open(file), {}, 0
    for name, key in names.items():
        if key not in done:
            if converted > REMAP and _mappable(file):
                held, converted = _open(file), 0
            done[key] = convert(name, held[key])
            _check_finite(file, key, done[key])
            converted += 0 if done[key] is held[key] else held[key].nbytes
        yield name, done[key]


def _check_finite(file: Path, name: str, value: Tensor) -> None:
    """Raises ValueError where this rank's part is not finite. Its sum tells, at the speed of memory
    and without a mask of its size, unless it overflows."""
    part = value.to_local() if isinstance(value, DTensor) else value
    if part.is_meta or not part.is_floating_point() or bool(part.sum().isfinite()):
        return
    if not bool(part.isfinite().all()):
        raise ValueError(
            f"{file}: {name} has values that are not finite (NaN or infinity) as "
            f"{str(part.dtype).removeprefix('torch.')}. Fetch the file anew, or give another file "
            "or precision (wan.dtype)."
        )


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object of a JSON file. Raises ValueError that names the file for one that holds
    none."""
    try:
        value = parse(read_plain(file, MOST_JSON))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}). Fetch it anew.") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Fetch it anew.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{file} holds a {type(value).__name__}; a config is an object of names and values."
        )
    return value


def _index(path: Path) -> Path | None:
    found = sorted(path.glob("*.index.json")) if path.is_dir() else []
    if len(found) > 1:
        raise ValueError(
            f"{path} holds {listed([file.name for file in found])}; keep one index, or name a file."
        )
    return found[0] if found else None


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in names.values()
    ):
        raise ValueError(
            f"{index}: its weight_map must give a file of the same folder for every tensor. Fetch "
            "it anew."
        )
    return names


def _files(path: Path, index: Path | None) -> list[Path]:
    if index is not None:
        named = sorted(set(_weight_map(index).values()))
        if absent := [file for file in named if not (path / file).is_file()]:
            raise ValueError(
                f"{path} lacks {listed(absent)}, which {index.name} names. Fetch what is missing."
            )
        return [path / file for file in named]
    if path.is_file() and path.suffix in SUFFIXES:
        return [path]
    if path.is_file():
        raise ValueError(f"{path}: a file of weights ends in {', '.join(SUFFIXES)}.")
    files = next((found for suffix in SUFFIXES if (found := sorted(path.glob(f"*{suffix}")))), [])
    if not files:
        raise FileNotFoundError(f"{path} holds no weights ({', '.join(SUFFIXES)}).")
    for name in STANDARD:
        if path / f"{name}{files[0].suffix}" in files:
            return [path / f"{name}{files[0].suffix}"]
    shards = [match for file in files if (match := SHARD.fullmatch(file.name))]
    sets = {(match["stem"], int(match["count"])) for match in shards}
    if len(shards) == len(files) and len(sets) == 1:
        (_, count), *_ = sets
        if len(files) != count:
            raise ValueError(
                f"{path} holds {len(files)} of {count} shards: {listed([f.name for f in files])}."
            )
        return files
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {listed([file.name for file in files])}, and no index. Name the file."
        )
    return files


def _check_index(index: Path, file: Path, held: dict[str, Tensor]) -> None:
    named = {name for name, place in _weight_map(index).items() if place == file.name}
    if absent := sorted(named - held.keys()):
        raise ValueError(
            f"{file} lacks {listed(absent)}, which {index.name} places there. Fetch both anew."
        )
    if more := sorted(held.keys() - named):
        raise ValueError(
            f"{file} holds {listed(more)}, which {index.name} does not place there. Fetch both "
            "anew."
        )


def _mappable(file: Path) -> bool:
    """Returns whether a file can be mapped: those of torch before 1.6 are no zip archives and have
    to be read whole."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _open(file: Path, wrapped: bool = False) -> dict[str, Tensor]:
    held = load_data(file)
    if wrapped and isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict):
        raise ValueError(
            f"{file} holds a {type(held).__name__}, no state dict. Give a file of weights."
        )
    if others := [str(name) for name, value in held.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{file} holds {listed(others)}: no tensor. A training checkpoint rather than weights? "
            "Give the file of weights that was exported from it."
        )
    return dict(held)


def load_data(file: Path) -> object:
    """Loads all data of a file. Raises ValueError for a file that cannot be read, would run code on
    the way, or claims to be larger than it is; nothing is run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        mappable = _mappable(file)
        if mappable:
            _check_packed(file)
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
        _check_claims(held, file.stat().st_size)
        return held
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{file} cannot be read: it holds {match[1]}, code rather than tensors, which was "
                "not run. Give a file of nothing but tensors, best a .safetensors."
            ) from error
        raise _damaged(file, error) from error
    except Exception as error:  # of any kind, where pickles are damaged
        raise _damaged(file, error) from error


def _check_packed(file: Path) -> None:
    """Raises ValueError for an archive that holds more than itself: torch.save packs nothing."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, which torch.save does not do")
    if sum(member.file_size for member in members) > file.stat().st_size:
        raise ValueError("its members are larger than the file")


def _check_claims(held: object, size: int) -> None:
    """Raises ValueError for a tensor of more bytes than the file has."""
    seen: set[int] = set()
    level = [held]
    while level:
        value = level.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.numel() * value.itemsize > size:
                raise ValueError(
                    f"a tensor of {value.layout} {tuple(value.shape)} in a file of {size} bytes"
                )
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            level += value.values() if isinstance(value, Mapping) else value


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read ({reason(error)}). It is truncated or no weight file: fetch it "
        "anew."
    )


def reason(error: Exception) -> str:
    """Returns one line of the error, without torch's advice to run the code."""
    said = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    plain = not isinstance(error, pickle.UnpicklingError) or "Weights only" not in str(error)
    return (
        said[1] if said else str(error).partition("\n")[0] if plain else "not written by torch.save"
    )
