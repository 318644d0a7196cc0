"""Rectified flow with Wan's settings: 1000 training steps, shift 5 (Wan2.1; method of Liu et al.
2022)."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from acetate.draws import ClipDraws


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

    def at_least(self, share: float) -> int:
        """Returns how many levels have a timestep of at least share * N: the first ones."""
        return int((self.timesteps >= share * len(self)).sum())

    def seen(self, ids: Tensor) -> Tensor:
        """Returns the ids of levels (B,) that training sees for drawn ones, on their device."""
        return ids

    def timestep(self, ids: Tensor) -> Tensor:
        """Returns the timesteps (B,) in [0, N] that the DiT is told."""
        return self.timesteps[ids]


normal_of: Any = torch.special  # which has no types
DENSITIES = ("uniform", "logit_normal")
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


class NoiseDraws:
    """Says how training draws noise levels.

    shift: of the schedule; where shift_tokens is given it is that of clips of so many latent cells,
    and one of n cells has shift * sqrt(n / shift_tokens), so that large and small ones lose as much
    of their signal (Esser et al. 2024, arXiv 2403.03206, equation 23). density: `uniform` over the
    schedule's levels, as Wan, or `logit_normal`, u = sigmoid(mean + deviation * normal) (section
    3.1 there). weighted: errors count w(t), Wan's weights. Raises ValueError for another density.
    """

    def __init__(
        self,
        *,
        shift: float = 5.0,
        shift_tokens: int | None = None,
        density: str = "uniform",
        mean: float = 0.0,
        deviation: float = 1.0,
        weighted: bool = True,
    ) -> None:
        if density not in DENSITIES:
            raise ValueError(f"task.noise.density {density!r}; known: {', '.join(DENSITIES)}.")
        self.shift, self.shift_tokens, self.density = shift, shift_tokens, density
        self.mean, self.deviation, self.weighted = mean, deviation, weighted

    def shift_of(self, latents: Tensor) -> float:
        """Returns the shift of clips of latents (B, C, F, h, w), to three digits."""
        if self.shift_tokens is None:
            return self.shift
        return round(self.shift * (latents[0, 0].numel() / self.shift_tokens) ** 0.5, 3)

    def ids(
        self, levels: NoiseLevels, draws: ClipDraws, span: tuple[int, int] | None = None
    ) -> Tensor:
        """Draws the ids of levels (B,), a clip's from its own generator.

        span: the first id and the one after the last that may be drawn. The density on them
        is itself, divided by its share there: one draw a clip, whose quantile is moved into the
        span's, and none is drawn again.
        """
        first, end = span or (0, len(levels))
        if self.density == "uniform":
            return first + draws.integers(end - first)
        normal = draws.normal((1,))[:, 0]
        if end - first < len(levels):
            # u of the span's ends -> quantiles; torch.logit of 0 and 1 are infinite, as they should
            ends = 1 - torch.tensor([end, first], dtype=torch.float64) / len(levels)
            low, high = normal_of.ndtr((ends.logit() - self.mean) / self.deviation).tolist()
            quantile = low + (high - low) * normal_of.ndtr(normal.double())
            normal = normal_of.ndtri(quantile)
        u = torch.sigmoid(self.mean + self.deviation * normal)
        return ((1 - u) * len(levels)).long().clamp(first, end - 1)

    def weights(self, levels: NoiseLevels, ids: Tensor) -> Tensor:
        """Returns what the errors of clips count, (B,)."""
        return levels.weights[ids] if self.weighted else torch.ones_like(levels.weights[ids])


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
