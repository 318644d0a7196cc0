"""Measures how close reconstructed alpha is, and where it is wrong: opaque, mixed and empty latent
cells apart."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from acetate.alpha import frames
from acetate.metrics.rgb import frame_psnr, frame_ssim
from acetate.regions import EMPTY, MIXED, OPAQUE, cells

# Sixteen bins per 8-bit step: 8-bit alpha is counted exactly, any other is moved by at most 1/8160.
LEVELS = 16 * 255


def cells_to_pixels(regions: Tensor, frames: int, time_stride: int, space_stride: int) -> Tensor:
    """Spreads each cell's value to every pixel it sees, (B, 1, F, h, w) -> (B, 1, T, H, W)."""
    t = torch.arange(frames, device=regions.device)
    pixels = regions[:, :, (t + time_stride - 1) // time_stride]  # cells 0, 1, 1, ..., 2, 2, ...
    return pixels.repeat_interleave(space_stride, -2).repeat_interleave(space_stride, -1)


class AlphaQuality(Metric):
    """Measures PSNR (dB) and SSIM per frame, MAE per pixel, of alpha clamped to [0, 1].

    Strides are the VAE's; eps is the distance from 0 and 1 that still counts as empty and opaque.
    """

    full_state_update = False
    psnr: Tensor
    ssim: Tensor
    count: Tensor
    error: Tensor
    pixels: Tensor
    histogram: Tensor

    def __init__(self, time_stride: int, space_stride: int, eps: float = 0.0):
        super().__init__()
        self.time_stride, self.space_stride, self.eps = time_stride, space_stride, eps
        for name in ("psnr", "ssim"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("error", torch.zeros(3), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(LEVELS + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, alpha_hat: Tensor, alpha: Tensor) -> None:
        """Adds a batch; both are (B, 1, T, H, W)."""
        # SSIM's variances vanish in bfloat16
        with torch.autocast(alpha.device.type, enabled=False):
            alpha_hat, alpha = alpha_hat.float().clamp(0, 1), alpha.float()
            x_hat, x = frames(alpha_hat), frames(alpha)
            # Out of place: a float32 sum restores states that a module-wide `.to(bfloat16)` has
            # narrowed.
            self.psnr = self.psnr + frame_psnr(x_hat, x).sum()
            self.ssim = self.ssim + frame_ssim(x_hat, x).sum()
            self.count = self.count + len(x)

            regions = cells(alpha, self.time_stride, self.space_stride, self.eps)
            regions = cells_to_pixels(regions, alpha.shape[2], self.time_stride, self.space_stride)
            error = (alpha_hat - alpha).abs()
            masks = [regions == region for region in (EMPTY, MIXED, OPAQUE)]
            self.error = self.error + torch.stack([torch.where(m, error, 0).sum() for m in masks])
            self.pixels = self.pixels + torch.stack([m.sum() for m in masks])
            level = (alpha * LEVELS).round().long().flatten()
            # bincount would make a GPU's host wait for the largest level
            self.histogram = self.histogram.index_add(0, level, torch.ones_like(level))

    def compute(self) -> dict[str, Tensor]:
        """Returns psnr, ssim, mae; mae_empty, mae_mixed, mae_opaque for the regions that occurred;
        mae_of_mean.

        mae_of_mean is the error of always answering the mean alpha of all pixels seen: what a
        reconstruction has to beat. It is exact for 8-bit alpha and within 2.5e-4 for any other.
        """
        scores = {name: getattr(self, name) / self.count for name in ("psnr", "ssim")}
        scores["mae"] = self.error.sum() / self.pixels.sum()
        for region, name in ((EMPTY, "empty"), (MIXED, "mixed"), (OPAQUE, "opaque")):
            if self.pixels[region] > 0:
                scores[f"mae_{name}"] = self.error[region] / self.pixels[region]
        alpha = torch.arange(LEVELS + 1, device=self.histogram.device) / LEVELS
        share = self.histogram / self.histogram.sum()
        scores["mae_of_mean"] = (share * (alpha - (share * alpha).sum()).abs()).sum()
        return scores


def highest_cell(alpha: Tensor, space_stride: int) -> Tensor:
    """Returns the largest mean over a cell of one frame, (B, 1, T, H, W) -> (B,)."""
    return F.avg_pool3d(alpha, (1, space_stride, space_stride)).flatten(1).amax(1)


def centre_of_mass(alpha: Tensor) -> Tensor:
    """Returns (x, y) as shares of width and height, (B, 1, T, H, W) -> (B, 2); the middle where
    alpha is 0 everywhere."""
    height, width = alpha.shape[-2:]
    columns, rows = alpha.sum((1, 2, 3)), alpha.sum((1, 2, 4))  # (B, W), (B, H)
    total = columns.sum(1)
    x = (columns * (torch.arange(width, device=alpha.device) + 0.5)).sum(1) / width
    y = (rows * (torch.arange(height, device=alpha.device) + 0.5)).sum(1) / height
    centre = torch.stack([x, y], 1) / total.clamp_min(1e-6)[:, None]
    return torch.where(total[:, None] > 0, centre, 0.5)
