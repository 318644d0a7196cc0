"""Rectified flow with Wan's settings: 1000 training steps, shift 5 (Wan2.1; method of Liu et al.
2022)."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn


class NoiseLevels(nn.Module):
    """Training noise levels in float32: bf16 would collapse 1000 steps to 294 values. They go to a
    device with the module that they are part of.

    sigmas (N,) fall from 1, timesteps = N * sigma, weights (N,) sum to N.
    """

    bits: Tensor

    def __init__(self, sigmas: Tensor, timesteps: Tensor, weights: Tensor) -> None:
        super().__init__()
        # Integers of the same bits, (3, N), which no cast of a whole module reaches
        bits = torch.stack([sigmas, timesteps, weights]).view(torch.int32)
        self.register_buffer("bits", bits, persistent=False)

    @property
    def sigmas(self) -> Tensor:
        return self.bits[0].view(torch.float32)

    @property
    def timesteps(self) -> Tensor:
        return self.bits[1].view(torch.float32)

    @property
    def weights(self) -> Tensor:
        return self.bits[2].view(torch.float32)

    def __len__(self) -> int:
        return self.bits.shape[1]

    def seen(self, ids: Tensor) -> Tensor:
        """Returns the ids of levels (B,) that training sees for drawn ones, on their device."""
        return ids

    def timestep(self, ids: Tensor) -> Tensor:
        """Returns the timesteps (B,) in [0, N] that the DiT is told."""
        return self.timesteps[ids]


L = TypeVar("L", bound=NoiseLevels)


def schedule(steps: int = 1000, shift: float = 5.0, kind: type[L] = NoiseLevels) -> L:
    """Returns the levels sigma = s*u / (1 + (s-1)*u), u = linspace(1, 0, N+1)[:-1]; w = N*y/sum(y),
    y = exp(-2((t-N/2)/N)^2) - min."""
    u = torch.linspace(1, 0, steps + 1)[:-1]
    sigmas = shift * u / (1 + (shift - 1) * u)
    timesteps = steps * sigmas
    y = torch.exp(-2 * ((timesteps - steps / 2) / steps) ** 2)
    y = y - y.min()
    weights = y * (steps / y.sum())
    return kind(sigmas, timesteps, weights)


def per_clip(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) to (B, 1, 1, 1, 1), to scale a batch of clips."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns x_t = sigma * noise + (1 - sigma) * z, sigma (B,)."""
    sigma = per_clip(sigma, latents)
    return sigma * noise + (1 - sigma) * latents


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """Returns dx_t / dsigma = noise - z."""
    return noise - latents


def squared_error(
    latents: Tensor,
    noise: Tensor,
    levels: NoiseLevels,
    ids: Tensor,
    field: Callable[..., Tensor],
    *context: Tensor,
) -> Tensor:
    """Returns |v_hat - (noise - z)|^2 at every place, in float32; v_hat = field(x_t, t, *context).

    latents z and noise (B, C, F, h, w); ids (B,) of the levels, as `levels.seen` gives them,
    on their device.
    """
    x_t = interpolate(latents, noise, levels.sigmas[ids])
    v_hat = field(x_t, levels.timestep(ids), *context)
    return (v_hat.float() - velocity(latents, noise).float()).square()


def mean_shift(noise: Tensor, guide: Tensor, shift: float) -> Tensor:
    """Returns noise + mu (1 - G): outside of the guide every channel starts brighter (Wan-Alpha,
    section 3.3).

    noise (B, C, F, h, w); guide G (B, 1, F, h, w) in [0, 1], as of `regions.gaussian`.
    """
    return noise + shift * (1 - guide)
