"""Pixel terms of the reconstruction loss, on (B, C, T, H, W) in [-1, 1], unclamped."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acetate.alpha import frames


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).abs().mean()


def sobel(x: Tensor) -> Tensor:
    """Returns sqrt(dx^2 + dy^2 + 1e-6) of every channel, like x (N, C, H, W); a ramp of slope s has
    dx = s, and borders are replicated."""
    at = torch.arange(-1, 2, device=x.device, dtype=x.dtype)  # made where x is: nothing is copied
    kernel = at * (2 - at.abs())[:, None] / 8
    planes = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), "replicate")
    dx, dy = F.conv2d(planes, torch.stack([kernel, kernel.T])[:, None]).unbind(1)
    return torch.sqrt(dx * dx + dy * dy + 1e-6).view_as(x)


def sobel_l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Computes L1 between Sobel gradient magnitudes, per channel; borders are replicated and so are
    no edges."""
    # differences of near-equal numbers drown in bf16
    with torch.autocast(x.device.type, enabled=False):
        return (sobel(frames(x_hat.float())) - sobel(frames(x.float()))).abs().mean()
