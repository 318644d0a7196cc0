"""Measures how close reconstructed colour is: PSNR, SSIM and LPIPS per frame, averaged over frames,
colours and clips.

Video is (B, C, T, H, W), frames are (N, C, H, W). rgb in [-1, 1], alpha in [0, 1], predictions
unclamped.
"""

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from acetate.alpha import PALETTE, frames, over
from acetate.vgg import lpips_network

FRAMES_AT_ONCE = 16  # SSIM holds ten copies of its frames
LPIPS_MIN_SIDE = 16  # pixels that survive the four poolings of VGG16
# SSIM is a mean over channels, and over the palette each channel sees -1 four times and +1 four
# times: key and white say it all, exactly, in a quarter of the time.
SSIM_WEIGHTS = (4, 0, 0, 0, 0, 0, 0, 4)


def frame_psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Returns the PSNR of frames in [0, 1], (N, C, H, W) -> (N,) in dB; the MSE's floor of 1e-10
    caps it at 100 dB."""
    mse = (x_hat - x).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def frame_ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Returns the SSIM of frames in [0, 1], (N, C, H, W) -> (N,). Wang et al. 2004: Gaussian window
    11, sigma 1.5.

    Frames with a side below 11 get the largest odd window that fits, with sigma in proportion; such
    values do not compare with those of larger frames.
    """
    # torchmetrics derives the window from sigma (2 * int(3.5 * sigma + 0.5) + 1) and ignores
    # kernel_size.
    half = min(5, (min(x.shape[-2:]) - 1) // 2)
    sigma = max(0.3 * half, 0.1)
    pairs = zip(x_hat.split(FRAMES_AT_ONCE), x.split(FRAMES_AT_ONCE), strict=True)
    return torch.cat([_ssim(a, b, sigma) for a, b in pairs])


def _ssim(x_hat: Tensor, x: Tensor, sigma: float) -> Tensor:
    score = structural_similarity_index_measure(
        x_hat, x, sigma=sigma, data_range=1.0, reduction="none"
    )
    assert isinstance(score, Tensor)
    return score.reshape(-1)


def frozen_lpips() -> nn.Module:
    return lpips_network("set lpips=false")


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

    def _check(self, rgb: Tensor) -> None:
        height, width = rgb.shape[-2:]
        if self._perceptual and min(height, width) < LPIPS_MIN_SIDE:
            raise ValueError(
                f"LPIPS of {height}x{width} frames; VGG16 needs {LPIPS_MIN_SIDE} pixels on each "
                "side. Use larger frames, or set lpips=false."
            )

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
        self._check(rgb)
        with torch.autocast(rgb.device.type, enabled=False):  # SSIM's variances vanish in bfloat16
            rgb_hat, alpha_hat = rgb_hat.float().clamp(-1, 1), alpha_hat.float().clamp(0, 1)
            rgb, alpha = rgb.float(), alpha.float()
            colors = PALETTE.to(rgb.device)[:, :, None, None, None]  # (8, 3, 1, 1, 1)
            for color, weight in zip(colors, SSIM_WEIGHTS, strict=True):
                self._add(over(rgb_hat, alpha_hat, color), over(rgb, alpha, color), weight)
