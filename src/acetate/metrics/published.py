"""Composites as AlphaVAE's published evaluation makes and measures them (Wang et al. 2025, arXiv
2507.09308), so that figures stand beside its table.

Against `palette`, which is exact: composites are cut down to 8 bits, saved as JPEG of quality 75
and read again; PSNR ends at 80 dB; SSIM is that of brightness in whole steps.
"""

from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from acetate.alpha import frames
from acetate.metrics.palette import COLORS, NAMES
from acetate.metrics.rgb import ssim_of_planes

QUALITY = 75  # of JPEG, with halved chroma: PIL's own defaults
LEAST = 1e-8  # that is added to the mean squared error
BRIGHTNESS = np.float32([0.299, 0.587, 0.114])


class PublishedComposites(Metric):
    """alphavae_psnr (dB) and alphavae_ssim: means over frames and over eight colors and grey;
    alphavae_psnr_red, ... of one color. Runs on the CPU."""

    full_state_update = False
    scores: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", torch.zeros(2, 9, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor) -> None:
        """Adds clips, rgb (B, 3, T, H, W) in [-1, 1] and alpha (B, 1, T, H, W) in [0, 1]."""
        pairs = zip(eight_bits(rgb_hat, alpha_hat), eight_bits(rgb, alpha), strict=True)
        for picture_hat, picture in pairs:
            found = [_compare(picture_hat, picture, color.numpy()) for color in COLORS]
            scores = torch.tensor(found, dtype=torch.float64).T
            self.scores = self.scores + scores.to(self.scores.device)
            self.count = self.count + 1

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name; NaN before the first update."""
        figures = {}
        for kind, means in zip(("psnr", "ssim"), self.scores / self.count, strict=True):
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


def _compare(
    picture_hat: NDArray[np.uint8], picture: NDArray[np.uint8], color: NDArray[np.float32]
) -> tuple[float, float]:
    """Returns PSNR and SSIM over one color."""
    pair = [composite(one, color) for one in (picture_hat, picture)]
    apart = pair[0].astype(np.int32) - pair[1]
    mse = (apart * apart).mean() / 255**2
    bright = [torch.from_numpy((one @ BRIGHTNESS).round())[None].double() for one in pair]
    ssim = ssim_of_planes(bright[0], bright[1], 255.0, inside=True)
    return -10 * float(np.log10(mse + LEAST)), float(ssim)
