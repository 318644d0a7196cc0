"""Writes LoRA files for ComfyUI: a merged DoRA as plain LoRA by SVD, and DoRA as it is."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from acetate.formats.wan_alpha import dora_parts

PREFIX = "diffusion_model."
OVERSAMPLING = 16  # extra directions of the randomised SVD


class LowRank(NamedTuple):
    """A LoRA under ComfyUI's names, and its error |D - B A| / |D| (Frobenius) per layer and over
    all."""

    tensors: dict[str, Tensor]
    errors: dict[str, float]
    error: float


def svd_lora(deltas: Iterable[tuple[str, Tensor]], rank: int, dtype: torch.dtype) -> LowRank:
    """Returns the closest B A of `rank` to every D = W' - W (Eckart and Young 1936), as lora_B,
    lora_A and no alpha: scale 1.

    deltas: (original layer name, D (out, in) fp32). Randomised SVD with power iterations (Halko et
    al. 2011), the same for the same input; errors are measured on the tensors as stored, rounding
    included.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; a LoRA has at least rank 1. 64 or 128 are usual.")
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    missed = whole = 0.0
    for layer, delta in deltas:
        width = min(rank, *delta.shape)
        with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, min(width + OVERSAMPLING, *delta.shape), niter=4)
        root = s[:width].sqrt()
        up, down = (u[:, :width] * root).to(dtype), (v[:, :width] * root).T.contiguous().to(dtype)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = down.cpu()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = up.cpu()
        left, norm = float((delta - up.float() @ down.float()).norm()), float(delta.norm())
        errors[layer] = left / norm if norm else 0.0
        missed, whole = missed + left**2, whole + norm**2
    return LowRank(tensors, errors, math.sqrt(missed / whole) if whole else 0.0)


def native_dora(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Renames PEFT's DoRA on the diffusers DiT to ComfyUI's names, values untouched.

    dora_scale is (out, 1): as (out,) it broadcasts over the wrong axis there.
    """
    tensors: dict[str, Tensor] = {}
    for layer, part, value in dora_parts(state):
        if part == "magnitude_vector":
            tensors[f"{PREFIX}{layer}.dora_scale"] = value[:, None]
            tensors[f"{PREFIX}{layer}.alpha"] = torch.tensor(float(alpha))
        else:
            tensors[f"{PREFIX}{layer}.lora_{part}.weight"] = value
    return tensors
