"""Pixel terms of the reconstruction loss, on (B, C, T, H, W) in [-1, 1], unclamped."""

import torch
import torch.nn.functional as F
from kornia.filters import sobel
from torch import Tensor


def frames(video: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B * T, C, H, W)."""
    return video.transpose(1, 2).flatten(0, 1)


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).abs().mean()


def sobel_l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """L1 between Sobel gradient magnitudes, per channel; borders are replicated and so are no edges."""
    with torch.autocast(x.device.type, enabled=False):  # differences of near-equal numbers drown in bf16
        return (sobel(frames(x_hat.float())) - sobel(frames(x.float()))).abs().mean()


def central_difference_magnitude(video: Tensor) -> Tensor:
    """The released 'Sobel': two-tap central differences of luma with zero padding, (B * T, 1, H, W).

    luma = (65.738 R + 129.057 G + 25.064 B) / 256, whose weights sum to 0.859; one channel is taken as it is.
    """
    x = frames(video)
    if x.shape[1] == 3:
        luma = x.new_tensor([65.738, 129.057, 25.064]) / 256
        x = (x * luma[:, None, None]).sum(1, keepdim=True)
    x = F.pad(x, (1, 1, 1, 1))
    dx = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]
    dy = x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
    return torch.sqrt(dx**2 + dy**2 + 1e-6)


def central_difference_l1(x_hat: Tensor, x: Tensor) -> Tensor:
    return (central_difference_magnitude(x_hat) - central_difference_magnitude(x)).abs().mean()
