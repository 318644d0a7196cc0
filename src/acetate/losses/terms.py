"""Pixel terms of the reconstruction loss, on (B, C, T, H, W) in [-1, 1], unclamped."""

import torch
import torch.nn.functional as F
from kornia.filters import get_spatial_gradient_kernel2d
from kornia.filters.kernels import normalize_kernel2d
from torch import Tensor, nn

from acetate.alpha import frames


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).abs().mean()


class SobelL1(nn.Module):
    """Computes L1 between Sobel gradient magnitudes sqrt(dx^2 + dy^2 + 1e-6), per channel; borders
    are replicated and so are no edges."""

    kernel: Tensor  # (2, 1, 3, 3); a buffer, so that no step copies it to its device

    def __init__(self) -> None:
        super().__init__()
        kernel = normalize_kernel2d(get_spatial_gradient_kernel2d("sobel", 1))
        self.register_buffer("kernel", kernel[:, None], persistent=False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        # differences of near-equal numbers drown in bf16
        with torch.autocast(x.device.type, enabled=False):
            magnitude_hat, magnitude = (self.magnitude(frames(y.float())) for y in (x_hat, x))
            return (magnitude_hat - magnitude).abs().mean()

    def magnitude(self, x: Tensor) -> Tensor:
        """Returns the magnitudes of (N, C, H, W), likewise; a ramp of slope s has s."""
        planes = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), "replicate")
        # eighths and quarters, which bfloat16 holds, too
        dx, dy = F.conv2d(planes, self.kernel.to(x.dtype)).unbind(1)
        return torch.sqrt(dx * dx + dy * dy + 1e-6).view_as(x)
