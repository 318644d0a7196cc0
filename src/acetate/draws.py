"""Randomness as a function of its purpose: (seed, step or epoch, clip key), never of hidden
generator state."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def stable_hash(*parts: object) -> int:
    """Returns 63 bits that depend on the parts' text alone: the same in every process, version and
    machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(*parts: object, device: torch.device | str = "cpu") -> Generator:
    return Generator(device).manual_seed(stable_hash(*parts))


class ClipDraws:
    """One generator per clip of a batch; its draws are the same whatever the rank, the batch or the
    order."""

    def __init__(self, keys: Sequence[str], *parts: object, device: torch.device) -> None:
        self.generators = [generator_for(*parts, key, device=device) for key in keys]
        self.device = device

    def integers(self, below: int) -> Tensor:
        """Draws (B,) in 0..below-1, on the device."""
        draws = [
            torch.randint(below, (1,), generator=g, device=self.device) for g in self.generators
        ]
        return torch.cat(draws)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draws (B, *shape), standard normal, fp32."""
        draws = [
            torch.randn(tuple(shape), generator=g, device=self.device) for g in self.generators
        ]
        return torch.stack(draws)
