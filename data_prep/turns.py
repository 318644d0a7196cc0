"""Says which made-up clip comes when, and what code decides its pictures."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from acetate.data import synthetic


def sha256_of_files(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Kinds take turns, and so do sizes after each round of kinds. sizes: (height, width).
    ValueError for no number."""

    clips: int
    frames: int
    sizes: tuple[tuple[int, int], ...]
    seed: int
    kinds: tuple[str, ...] = synthetic.KINDS

    def __post_init__(self) -> None:
        numbers = [("clips", self.clips), ("frames", self.frames)]
        for name, value in [*numbers, *(("size", side) for size in self.sizes for side in size)]:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value}; a whole number of at least 1")

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
    """Returns (height, width) of each. Raises ValueError for what is neither a side nor a pair."""
    pairs = [(size, size) if isinstance(size, int) else size for size in sizes]
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"size={list(sizes)}; give a side, or [[height, width], ...]")
    return tuple((height, width) for height, width in pairs)


def sides(sizes: Sequence[tuple[int, int]]) -> list[int | tuple[int, int]]:
    """Returns sizes as a command takes them."""
    return [height if height == width else (height, width) for height, width in sizes]
