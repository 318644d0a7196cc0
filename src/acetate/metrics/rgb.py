"""Measures how close reconstructed colour is: PSNR, SSIM and LPIPS per frame, averaged over frames,
colours and clips.

Video is (B, C, T, H, W), frames are (N, C, H, W). rgb in [-1, 1], alpha in [0, 1], predictions
unclamped.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from acetate.alpha import frames, over, palette
from acetate.vgg import lpips_network

FRAMES_AT_ONCE = 16  # SSIM holds ten copies of its frames, LPIPS many more
LPIPS_MIN_SIDES = {"vgg": ("VGG16", 16), "alex": ("AlexNet", 31)}  # pixels that survive poolings
# SSIM is a mean over channels, and over the palette each channel sees -1 four times and +1 four
# times: key and white say it all, exactly, in a quarter of the time.
SSIM_WEIGHTS = (4, 0, 0, 0, 0, 0, 0, 4)


def frame_psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Returns the PSNR of frames in [0, 1], (N, C, H, W) -> (N,) in dB; the MSE's floor of 1e-10
    caps it at 100 dB."""
    mse = (x_hat - x).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def frame_ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Returns the SSIM of frames in [0, 1], (N, C, H, W) -> (N,); see `ssim_of_planes`."""
    at_once = FRAMES_AT_ONCE if x.is_cuda else 1  # a frame's planes stay in a CPU's cache
    pairs = zip(x_hat.split(at_once), x.split(at_once), strict=True)
    return torch.cat([ssim_of_planes(a, b).mean(1) for a, b in pairs])


def ssim_of_planes(
    x_hat: Tensor, x: Tensor, data_range: float = 1.0, *, inside: bool = False
) -> Tensor:
    """Returns the SSIM of each plane, (..., C, H, W) -> (..., C). Wang et al. 2004: Gaussian window
    11, sigma 1.5, around every pixel, with the planes mirrored at their border.

    Planes with a side below 11 get the largest odd window that fits, with sigma in proportion; such
    values do not compare with those of larger frames. inside: windows that lie in the plane alone,
    and structure of opposite sign counts as none, as in Wang's own code and pyiqa.
    """
    half = min(5, (min(x.shape[-2:]) - 1) // 2)
    sigma = max(0.3 * half, 0.1)
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-half, half + 1)]
    weights = [weight / sum(weights) for weight in weights]
    if not inside:
        x_hat, x = (F.pad(planes, (half,) * 4, mode="reflect") for planes in (x_hat, x))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_hat, mean = window_mean(x_hat, weights), window_mean(x, weights)
    variance_hat = (window_mean(x_hat.square(), weights) - mean_hat.square()).clamp_min(0)
    variance = (window_mean(x.square(), weights) - mean.square()).clamp_min(0)
    covariance = window_mean(x_hat * x, weights) - mean_hat * mean
    structure = (2 * covariance + c2) / (variance_hat + variance + c2)
    structure = structure.clamp_min(0) if inside else structure
    light = (2 * mean_hat * mean + c1) / (mean_hat.square() + mean.square() + c1)
    return (light * structure).mean((-2, -1))


def window_mean(x: Tensor, weights: Sequence[float]) -> Tensor:
    """Returns weighted means over windows that lie in the plane, (..., H, W) -> (..., H - K + 1,
    W - K + 1) for K weights along each side, which are symmetric.

    Sums of shifted planes: a fourth of the time of a convolution on a CPU.
    """
    half = len(weights) // 2
    for axis in (-2, -1):
        size = x.shape[axis] - 2 * half
        total = x.narrow(axis, half, size) * weights[half]
        for k in range(half):
            both = x.narrow(axis, k, size) + x.narrow(axis, 2 * half - k, size)
            total.add_(both, alpha=weights[k])
        x = total
    return x


@cache  # metrics of single clips share it
def frozen_lpips(net: str = "vgg") -> nn.Module:
    return lpips_network("set lpips=false", net=net)


def check_lpips_size(rgb: Tensor, net: str = "vgg") -> None:
    """Raises ValueError for frames that VGG16, or AlexNet, cannot take."""
    (height, width), (name, least) = rgb.shape[-2:], LPIPS_MIN_SIDES[net]
    if min(height, width) < least:
        raise ValueError(
            f"LPIPS of {height}x{width} frames; {name} needs {least} pixels on each side. Use "
            "larger frames, or set lpips=false."
        )


class _FrameQuality(Metric):
    """Keeps sums of per-frame scores and their count, so that unequal shares of ranks reduce to the
    exact mean."""

    full_state_update = False
    psnr: Tensor
    ssim: Tensor
    lpips: Tensor
    count: Tensor

    def __init__(self, lpips: bool):
        super().__init__()
        for name in ("psnr", "ssim", "lpips"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # In a tuple, so that it is no submodule: not in state dicts, not in parameter counts, not
        # sharded.
        self._perceptual = (frozen_lpips(),) if lpips else ()

    def _add(self, rgb_hat: Tensor, rgb: Tensor, ssim_weight: int) -> None:
        """Adds two videos (B, 3, T, H, W) in [-1, 1]."""
        rgb_hat, rgb = frames(rgb_hat), frames(rgb)
        x_hat, x = (rgb_hat + 1) / 2, (rgb + 1) / 2
        # Out of place: a float32 sum restores states that a module-wide `.to(bfloat16)` has
        # narrowed.
        self.psnr = self.psnr + frame_psnr(x_hat, x).sum()
        if ssim_weight:
            self.ssim = self.ssim + ssim_weight * frame_ssim(x_hat, x).sum()
        self.count = self.count + len(x)
        for network in self._perceptual:
            network.to(rgb.device)
            pairs = zip(rgb_hat.split(FRAMES_AT_ONCE), rgb.split(FRAMES_AT_ONCE), strict=True)
            self.lpips = self.lpips + torch.stack([network(a, b).sum() for a, b in pairs]).sum()

    def compute(self) -> dict[str, Tensor]:
        """Returns psnr in dB, ssim, and lpips where asked for; NaN before the first update."""
        names = ("psnr", "ssim", "lpips") if self._perceptual else ("psnr", "ssim")
        return {name: getattr(self, name) / self.count for name in names}


class RGBQuality(_FrameQuality):
    """Measures PSNR, SSIM and, where asked for, LPIPS of plain rgb video."""

    def __init__(self, lpips: bool = False):
        super().__init__(lpips=lpips)

    def update(self, rgb_hat: Tensor, rgb: Tensor) -> None:
        with torch.autocast(rgb.device.type, enabled=False):  # SSIM's variances vanish in bfloat16
            self._add(rgb_hat.float().clamp(-1, 1), rgb.float(), ssim_weight=1)


class CompositeQuality(_FrameQuality):
    """Measures PSNR, SSIM and LPIPS of soft renders over the eight palette colours, prediction
    against target."""

    def __init__(self, lpips: bool):
        super().__init__(lpips=lpips)

    def update(self, rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor) -> None:
        if self._perceptual:
            check_lpips_size(rgb)
        with torch.autocast(rgb.device.type, enabled=False):  # SSIM's variances vanish in bfloat16
            rgb_hat, alpha_hat = rgb_hat.float().clamp(-1, 1), alpha_hat.float().clamp(0, 1)
            rgb, alpha = rgb.float(), alpha.float()
            for color, weight in zip(palette(rgb.device), SSIM_WEIGHTS, strict=True):
                self._add(over(rgb_hat, alpha_hat, color), over(rgb, alpha, color), weight)
