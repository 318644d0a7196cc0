"""Measures a transparent clip against the true one as viewers see it: over each color of the
palette and over grey.

Video is (B, C, T, H, W): rgb straight in [-1, 1], alpha in [0, 1], predictions unclamped.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from acetate.alpha import PALETTE, PALETTE_NAMES, frames
from acetate.metrics.rgb import (
    FRAMES_AT_ONCE,
    check_lpips_size,
    frame_psnr,
    frame_ssim,
    frozen_lpips,
    ssim_of_planes,
)

GREY = 128 / 255
NAMES = (*PALETTE_NAMES, "grey")
COLORS = torch.cat([(PALETTE + 1) / 2, torch.full((1, 3), GREY)])  # (9, 3) in [0, 1]
LEVELS = (0.0, 1.0, GREY)  # that the channels of those colors have


class PaletteQuality(Metric):
    """PSNR (dB), SSIM and, where asked for, LPIPS of composites over eight colors and grey, and of
    alpha; the error of premultiplied color. All are means over frames.

    psnr_red, ssim_red, ...: of one color; psnr, ssim, lpips: the mean over all nine.
    premultiplied_mad: mean absolute difference of alpha * color in [0, 1], times 1e3. alpha_psnr,
    alpha_ssim: of alpha itself.
    """

    full_state_update = False
    scores: Tensor
    others: Tensor
    count: Tensor

    def __init__(self, lpips: bool = False):
        super().__init__()
        # of each color: psnr, ssim, lpips; of others: premultiplied_mad, alpha_psnr, alpha_ssim
        self.add_state("scores", torch.zeros(3, 9, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("others", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self._perceptual = (frozen_lpips(),) if lpips else ()  # in a tuple: no submodule

    def update(self, rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor) -> None:
        """Adds clips. Raises ValueError for frames that are too small for LPIPS."""
        if self._perceptual:
            check_lpips_size(rgb)
        with torch.autocast(rgb.device.type, enabled=False):
            rgb_hat, alpha_hat = rgb_hat.float().clamp(-1, 1), alpha_hat.float().clamp(0, 1)
            layers = (
                frames((rgb_hat + 1) / 2 * alpha_hat), frames(alpha_hat),
                frames((rgb.float() + 1) / 2 * alpha.float()), frames(alpha.float()),
            )  # fmt: skip
            at_once = FRAMES_AT_ONCE if rgb.is_cuda else 1
            for some in zip(*(layer.split(at_once) for layer in layers), strict=True):
                self._add(*some)

    def _add(self, mixed_hat: Tensor, alpha_hat: Tensor, mixed: Tensor, alpha: Tensor) -> None:
        """Adds frames of premultiplied color (N, 3, H, W) and alpha (N, 1, H, W)."""
        colors = COLORS.to(mixed.device)
        scores = torch.zeros_like(self.scores)
        scores[0] = palette_psnr(mixed_hat - mixed, alpha_hat - alpha, colors).sum(0)
        planes = [
            ssim_of_planes(mixed_hat + (1 - alpha_hat) * level, mixed + (1 - alpha) * level)
            for level in LEVELS
        ]  # of each channel, (N, 3)
        for i, color in enumerate(colors.tolist()):
            chosen = [planes[_level(value)][:, channel] for channel, value in enumerate(color)]
            scores[1, i] = torch.stack(chosen).double().mean(0).sum()
        for network in self._perceptual:
            network.to(mixed.device)
            for i, color in enumerate(colors):
                pair = (
                    (m + (1 - a) * color[:, None, None]) * 2 - 1
                    for m, a in ((mixed_hat, alpha_hat), (mixed, alpha))
                )
                scores[2, i] = network(*pair).double().sum()
        others = (
            1e3 * (mixed_hat - mixed).abs().double().mean((1, 2, 3)).sum(),
            frame_psnr(alpha_hat, alpha).double().sum(),
            frame_ssim(alpha_hat, alpha).double().sum(),
        )
        self.scores = self.scores + scores
        self.others = self.others + torch.stack(others)
        self.count = self.count + len(mixed)

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name; NaN before the first update."""
        kinds = ("psnr", "ssim", "lpips")[: 2 + len(self._perceptual)]
        means = self.scores / self.count
        figures = {kind: means[i].mean() for i, kind in enumerate(kinds)}
        for i, kind in enumerate(kinds):
            figures |= {f"{kind}_{name}": means[i, j] for j, name in enumerate(NAMES)}
        names = ("premultiplied_mad", "alpha_psnr", "alpha_ssim")
        return figures | dict(zip(names, self.others / self.count, strict=True))


def palette_psnr(mixed: Tensor, alpha: Tensor, colors: Tensor) -> Tensor:
    """Returns the PSNR over each color, (N, 9) in dB, as `frame_psnr` has it for one.

    mixed (N, 3, H, W) and alpha (N, 1, H, W): differences of premultiplied color and of alpha. Over
    a color c composites differ by mixed - c alpha, whose mean square is a sum of three moments.
    """
    mixed, alpha = mixed.double(), alpha.double()
    squares = mixed.square().mean((2, 3))  # (N, 3)
    products = (mixed * alpha).mean((2, 3))
    alphas = alpha.square().mean((2, 3))  # (N, 1)
    shades = colors.double()[:, None]  # (9, 1, 3)
    mse = (squares - 2 * shades * products + shades.square() * alphas).mean(2).T
    return -10 * mse.clamp_min(1e-10).log10()


def _level(value: float) -> int:
    return min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - value))
