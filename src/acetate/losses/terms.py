"""Pixel terms of the reconstruction loss, on (B, C, T, H, W) in [-1, 1], unclamped."""

import torch
from kornia.filters import sobel
from torch import Tensor

from acetate.alpha import frames


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).abs().mean()


def sobel_l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Computes L1 between Sobel gradient magnitudes, per channel; borders are replicated and so are
    no edges."""
    # differences of near-equal numbers drown in bf16
    with torch.autocast(x.device.type, enabled=False):
        return (sobel(frames(x_hat.float())) - sobel(frames(x.float()))).abs().mean()
