"""Made-up clips: which one comes when, what code decides its pictures, and the shards of them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from acetate.data import synthetic
from acetate.data.shards import read_head
from acetate.data.splits import split_rule
from acetate.data.writer import EncodedClip, ShardWriter
from data_prep.executor import check, progress
from data_prep.folders import check_folder, making

LICENCE = "CC0-1.0"


def sha256_of_files(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Kinds take turns, and so do sizes after each round of kinds. sizes: (height, width)."""

    clips: int
    frames: int
    sizes: tuple[tuple[int, int], ...]
    seed: int
    kinds: tuple[str, ...] = synthetic.KINDS

    def kind(self, index: int) -> str:
        return self.kinds[index % len(self.kinds)]

    def key(self, index: int) -> str:
        return f"{self.kind(index)}-{index:06d}"

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index // len(self.kinds) % len(self.sizes)]

    def area(self) -> float:
        """Returns the area of a clip on average, as a share of the first size's."""
        first = self.sizes[0][0] * self.sizes[0][1]
        return sum(height * width for height, width in self.sizes) / len(self.sizes) / first


def squares(sizes: Sequence[int | Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Returns (height, width) of each."""
    pairs = ((size, size) if isinstance(size, int) else size for size in sizes)
    return tuple((height, width) for height, width in pairs)


def sides(sizes: Sequence[tuple[int, int]]) -> list[int | tuple[int, int]]:
    """Returns sizes as a command takes them."""
    return [height if height == width else (height, width) for height, width in sizes]


def sides_of(config: DictConfig) -> list[Any]:
    """Returns the setting `size` as a list of sides or of (height, width)."""
    found: Any = OmegaConf.to_container(config, resolve=True)
    return found["size"] if isinstance(found["size"], list) else [found["size"]]


@dataclass(frozen=True)
class Made:
    """A clip that was made, and its prompt. done: how it was made, for its JSON."""

    key: str
    clip: EncodedClip
    prompt: str
    done: Mapping[str, str] | None = None


def write_clips(
    plan: Plan,
    make: Callable[..., Made],
    *,
    made_by: Mapping[str, Any],
    source: str,
    out: Path,
    executor: str,
    workers: int,
    replace: bool,
    setup: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Writes the shards of a plan's clips and returns their manifest without its list of clips.

    The clips of finished tars are kept when a run was interrupted. A folder that already holds
    these very clips is left as it is; one that holds others is made anew with `replace`, else
    ShardError. The memory that this takes does not depend on the number of clips. make: from an
    index, and what `setup` has made before it, if that is given.
    """
    check(executor, workers)
    check_folder(out)
    settings = made_by["settings"]
    split_of = split_rule(map(plan.key, range(plan.clips)), settings["val_fraction"])
    limits = {name: settings[name] for name in ("max_clips", "max_bytes")}
    with making(out, made_by, replace) as folder:
        if folder:
            with ShardWriter(folder, made_by=made_by, **limits) as writer:
                todo, run = range(writer.clips, plan.clips), {"setup": setup, "name": plan.key}
                with progress(
                    make, todo, done=writer.clips, executor=executor, workers=workers, **run
                ) as results:
                    for _, made in results:
                        writer.add(
                            made.key, made.clip, split=split_of(made.key), prompt=made.prompt,
                            source=source, licence=LICENCE, lossy=False,
                            premultiplied_source=False, done=made.done,
                        )  # fmt: skip
    return read_head(out)


def print_written(out: str, head: Mapping[str, Any]) -> None:
    """Prints how many clips a folder holds. head: of its manifest."""
    train, val = head["splits"]["train"], head["splits"]["val"]
    print(f"{out}: {train} clips to train and {val} to validate on, {head['frames']} frames")


def print_tried(table: Table, said: str) -> None:
    """Prints what a preview found."""
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(f"{said} Nothing was written.", soft_wrap=True)
