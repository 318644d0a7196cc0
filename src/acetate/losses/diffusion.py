"""Rectified-flow losses with a frozen DiT as judge of the VAE's latents (Wan-Alpha, section
3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from acetate import flow, regions
from acetate.losses.ranks import sum_over_ranks
from acetate.released.judge import clamped_mean

MODES = ("off", "opaque", "bidirectional", "upstream")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of values (B, ...) over a boolean mask; exactly 0, with zero gradient, where
    the mask is empty.

    In training it is that of all ranks, which must call this together, however unevenly the mask
    falls. Where no gradients are kept, in validation, it is the mean of each clip's own: the same
    for any batches, on any ranks.
    """
    if not torch.is_grad_enabled():
        totals, counts = torch.where(mask, values, 0).flatten(1).sum(1), mask.flatten(1).sum(1)
        return (totals / counts.clamp_min(1)).mean()
    total, count = sum_over_ranks(torch.stack([torch.where(mask, values, 0).sum(), mask.sum()]))
    return total / count.clamp_min(1)


class DiffusionLoss(nn.Module):
    """Computes weight * |DiT(x_t) - velocity|^2 over regions of the latent grid; gradients reach
    the latents only.

    mode `opaque`: mean over opaque cells. `bidirectional`: that, minus the mean of min(l, margin)
    over all other cells. `upstream`: clamp(map * w(t) * l, 0, 1).mean() with the released map,
    whose clamp makes it one-sided. `off`: nothing. latents: the DiT was trained on `normalised`
    ones; `raw` is the released choice. timestep_weight: multiply l by w(t); `upstream` always does.
    eps: of the region thresholds. build_judge(mesh=) loads the DiT as a velocity field, where the
    mode needs one.
    """

    schedule_levels = staticmethod(flow.schedule)

    def __init__(
        self,
        *,
        mode: str,
        weight: float,
        margin: float,
        latents: str,
        timestep_weight: bool,
        eps: float,
        build_judge: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("mode", mode, MODES),
            ("latents", latents, ("normalised", "raw")),
        ):
            if value not in known:
                raise ValueError(f"loss.diffusion.{name} {value!r}; known: {', '.join(known)}.")
        self.mode, self.weight, self.margin = mode, weight, margin
        self.latents, self.timestep_weight, self.eps = latents, timestep_weight, eps
        self.build_judge, self.levels = build_judge, self.schedule_levels()

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
        """Returns the scalar loss.

        latents, noise (B, 16, F, h, w); alpha (B, 1, T, H, W) in [0, 1]; ids (B,) drawn from the
        levels'.
        """
        ids = self.levels.seen(ids)
        error = flow.squared_error(latents, noise, self.levels, ids, velocity_field)
        weights = flow.per_clip(self.levels.weights[ids], latents)
        if self.mode == "upstream":
            return self.weight * clamped_mean(weights * error, alpha, time_stride, space_stride)
        per_cell = error.mean(1, keepdim=True)  # (B, 1, F, h, w)
        if self.timestep_weight:
            per_cell = weights * per_cell
        opaque = regions.cells(alpha, time_stride, space_stride, self.eps) == regions.OPAQUE
        loss = masked_mean(per_cell, opaque)
        if self.mode == "bidirectional":
            loss = loss - masked_mean(per_cell.clamp_max(self.margin), ~opaque)
        return self.weight * loss
