"""Composites as AlphaVAE's published evaluation makes and measures them (Wang et al. 2025, arXiv
2507.09308), so that figures stand beside its table.

Against `palette`, which is exact: composites are cut down to 8 bits, saved as JPEG of quality 75
and read again; PSNR ends at 80 dB; SSIM is that of brightness in whole steps; LPIPS looks through
AlexNet.
"""

from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric

from acetate.alpha import frames
from acetate.metrics.palette import COLORS, NAMES
from acetate.metrics.rgb import check_lpips_size, frozen_lpips, ssim_of_planes

QUALITY = 75  # of JPEG, with halved chroma: PIL's own defaults
LEAST = 1e-8  # that is added to the mean squared error
BRIGHTNESS = np.float32([0.299, 0.587, 0.114])


class PublishedComposites(Metric):
    """alphavae_psnr (dB), alphavae_ssim and, where asked for, alphavae_lpips: means over frames and
    over eight colors and grey; alphavae_psnr_red, ... of one color. Runs on the CPU."""

    full_state_update = False
    scores: Tensor
    count: Tensor

    def __init__(self, lpips: bool = False) -> None:
        super().__init__()
        self._perceptual = (frozen_lpips("alex"),) if lpips else ()  # in a tuple: no submodule
        self.add_state("scores", torch.zeros(3, 9, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor) -> None:
        """Adds clips, rgb (B, 3, T, H, W) in [-1, 1] and alpha (B, 1, T, H, W) in [0, 1]. Raises
        ValueError for frames that are too small for LPIPS."""
        if self._perceptual:
            check_lpips_size(rgb, "alex")
        pairs = zip(eight_bits(rgb_hat, alpha_hat), eight_bits(rgb, alpha), strict=True)
        for picture_hat, picture in pairs:
            for i, color in enumerate(COLORS):
                pair = [composite(one, color.numpy()) for one in (picture_hat, picture)]
                found = [*_compare(*pair), *(_seen(net, *pair) for net in self._perceptual)]
                scores = torch.tensor(found, dtype=torch.float64)
                self.scores[: len(found), i] += scores.to(self.scores.device)
            self.count = self.count + 1

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name; NaN before the first update."""
        figures = {}
        kinds = ("psnr", "ssim", "lpips")[: 2 + len(self._perceptual)]
        for kind, means in zip(kinds, self.scores / self.count, strict=False):
            figures[f"alphavae_{kind}"] = means.mean()
            figures |= {f"alphavae_{kind}_{n}": m for n, m in zip(NAMES, means, strict=True)}
        return figures


def eight_bits(rgb: Tensor, alpha: Tensor) -> NDArray[np.uint8]:
    """Returns pictures (N, H, W, 4), as a PNG would hold them."""
    unit = torch.cat([(rgb.float() + 1) / 2, alpha.float()], 1).clamp(0, 1)
    return (frames(unit) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def composite(picture: NDArray[np.uint8], color: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns a picture (H, W, 4) over a color in [0, 1] after JPEG, (H, W, 3). Fractions of 8 bits
    are cut off, not rounded."""
    unit = picture.astype(np.float32) / 255.0
    alpha = unit[..., 3:]
    mixed = alpha * unit[..., :3] + (1 - alpha) * color
    file = BytesIO()
    Image.fromarray((mixed * 255.0).clip(0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=QUALITY
    )
    return np.asarray(Image.open(file).convert("RGB"))


def _compare(picture_hat: NDArray[np.uint8], picture: NDArray[np.uint8]) -> tuple[float, float]:
    """Returns PSNR and SSIM of two composites."""
    apart = picture_hat.astype(np.int32) - picture
    mse = (apart * apart).mean() / 255**2
    bright = [
        torch.from_numpy((one @ BRIGHTNESS).round())[None].double()
        for one in (picture_hat, picture)
    ]
    ssim = ssim_of_planes(bright[0], bright[1], 255.0, inside=True)
    return -10 * float(np.log10(mse + LEAST)), float(ssim)


def _seen(network: nn.Module, *pair: NDArray[np.uint8]) -> float:
    """Returns the LPIPS of two composites."""
    planes = (torch.tensor(one).permute(2, 0, 1)[None].float() / 127.5 - 1 for one in pair)
    return float(network(*planes))
