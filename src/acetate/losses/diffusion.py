"""Rectified-flow losses: a frozen DiT as judge of the VAE's latents (Wan-Alpha, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from acetate import flow, regions
from acetate.losses.ranks import sum_over_ranks

MODES = ("off", "opaque", "bidirectional", "upstream")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, ...) over a boolean mask; exactly 0, with zero gradient, where the mask is empty.

    In training it is that of all ranks, which must call this together, however unevenly the mask falls. Where no
    gradients are kept, in validation, it is the mean of each clip's own: the same for any batches, on any ranks.
    """
    if not torch.is_grad_enabled():
        totals, counts = torch.where(mask, values, 0).flatten(1).sum(1), mask.flatten(1).sum(1)
        return (totals / counts.clamp_min(1)).mean()
    total, count = sum_over_ranks(torch.stack([torch.where(mask, values, 0).sum(), mask.sum()]))
    return total / count.clamp_min(1)


class DiffusionLoss(nn.Module):
    """weight * |DiT(x_t) - velocity|^2 over regions of the latent grid; gradients reach the latents only.

    mode `opaque`: mean over opaque cells. `bidirectional`: that, minus the mean of min(l, margin) over all
    other cells. `upstream`: clamp(map * w(t) * l, 0, 1).mean() with the released map, whose clamp makes it
    one-sided. `off`: nothing. latents: the DiT was trained on `normalised` ones; `raw` is the released choice.
    timestep_per: `clip`, or `batch` (released). timestep_dtype: `bfloat16` (released) keeps 294 of 1000 values.
    timestep_weight: multiply l by w(t); `upstream` always does. eps: of the region thresholds.
    """

    def __init__(
        self,
        *,
        mode: str,
        weight: float,
        margin: float,
        latents: str,
        timestep_per: str,
        timestep_dtype: str,
        timestep_weight: bool,
        eps: float,
        steps: int = 1000,
        shift: float = 5.0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("mode", mode, MODES),
            ("latents", latents, ("normalised", "raw")),
            ("timestep_per", timestep_per, ("clip", "batch")),
            ("timestep_dtype", timestep_dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"loss.diffusion.{name} {value!r}; known: {', '.join(known)}.")
        self.mode, self.weight, self.margin = mode, weight, margin
        self.latents, self.timestep_per, self.timestep_weight = latents, timestep_per, timestep_weight
        self.timestep_dtype = getattr(torch, timestep_dtype)
        self.eps = eps
        levels = flow.schedule(steps, shift)
        # Plain tensors, not buffers: a module-wide cast to bf16 must not reach them.
        self.sigmas, self.timesteps, self.weights = levels.sigmas, levels.timesteps, levels.weights

    def step_ids(self, ids: Tensor) -> Tensor:
        """Drawn step ids (B,), long, as the settings see them; on the CPU."""
        return flow.seen_ids(ids, self.timesteps, self.timestep_per, self.timestep_dtype)

    def forward(
        self,
        latents: Tensor,
        alpha: Tensor,
        noise: Tensor,
        ids: Tensor,
        velocity_field: Callable[[Tensor, Tensor], Tensor],
        time_stride: int,
        space_stride: int,
    ) -> Tensor:
        """Scalar loss.

        latents, noise (B, 16, F, h, w); alpha (B, 1, T, H, W) in [0, 1]; ids (B,) drawn from 0..steps-1.
        """
        ids = self.step_ids(ids)
        timestep = self.timesteps[ids].to(self.timestep_dtype).float().to(latents.device)
        x_t = flow.interpolate(latents, noise, self.sigmas[ids])
        error = (velocity_field(x_t, timestep) - flow.velocity(latents, noise)).float().square()
        weights = flow.per_clip(self.weights[ids], latents)
        if self.mode == "upstream":
            mask = regions.upstream_mask(alpha, time_stride, space_stride)
            return self.weight * (weights * error * mask).clamp(0, 1).mean()
        per_cell = error.mean(1, keepdim=True)  # (B, 1, F, h, w)
        if self.timestep_weight:
            per_cell = weights * per_cell
        opaque = regions.cells(alpha, time_stride, space_stride, self.eps) == regions.OPAQUE
        loss = masked_mean(per_cell, opaque)
        if self.mode == "bidirectional":
            loss = loss - masked_mean(per_cell.clamp_max(self.margin), ~opaque)
        return self.weight * loss


def flow_loss(velocity_hat: Tensor, velocity: Tensor) -> Tensor:
    """Squared error per sample, (B, C, F, h, w) each -> (B,), in fp32."""
    return (velocity_hat.float() - velocity.float()).square().flatten(1).mean(1)
