"""Golden vectors: numbers that the released Wan-Alpha code produced on tiny random weights.

ACETATE_REFERENCE names another folder of the same files; every size, name and setting is read from
them.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor


class Golden:
    """One file: metadata values by name, tensors by name, float8 and float16 weights as float32."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.metadata = {key: json.loads(value) for key, value in file.metadata().items()}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below `prefix/`, as float32, without the prefix."""
        start = f"{prefix}/"
        return {
            name[len(start) :]: value.float()
            for name, value in self.tensors.items()
            if name.startswith(start)
        }


def reference_folder() -> Path:
    return Path(os.environ.get("ACETATE_REFERENCE", Path(__file__).parent / "data"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    cache: dict[str, Golden] = {}

    def load(name: str) -> Golden:
        if name not in cache:
            cache[name] = Golden(reference_folder() / f"{name}.safetensors")
        return cache[name]

    return load
