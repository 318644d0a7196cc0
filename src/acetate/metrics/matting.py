"""Errors of an alpha matte against the true one, as the matting literature reports them.

Video is (B, 1, T, H, W), a batch of mattes is (N, H, W); alpha in [0, 1], predictions are clamped.
"""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from acetate.alpha import frames
from acetate.metrics.history import History

SIGMA = 1.4  # pixels, of the Gaussian whose derivative measures a matte's gradient
LEVELS = np.arange(0, 1.1, 0.1)  # of the threshold that connectivity is followed through
OF_FRAMES = (
    "mad", "mse", "sad", "grad", "conn", "dtssd", "sad_mixed", "grad_mixed", "conn_mixed",
)  # fmt: skip
LEAST = 0.15  # below this distance a pixel counts as connected


def derivative_kernels(sigma: float = SIGMA) -> Tensor:
    """Returns the first derivatives of a Gaussian along x and y, (2, 1, K, K) of unit L2 norm.

    The window ends where the Gaussian falls below 0.01 (Rhemann et al. 2009).
    """
    half = math.ceil(sigma * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * sigma * 0.01)))
    x = torch.arange(-half, half + 1, dtype=torch.float64)
    bell = torch.exp(-(x**2) / (2 * sigma**2))
    along_x = bell[:, None] * (-x * bell)[None]
    along_x = along_x / along_x.norm()
    return torch.stack([along_x, along_x.T])[:, None].float()


def spread(mattes: Tensor) -> Tensor:
    """Stretches each matte (N, H, W) to [0, 1]; a constant one becomes 0."""
    low, high = mattes.amin((1, 2), keepdim=True), mattes.amax((1, 2), keepdim=True)
    return torch.where(high > low, (mattes - low) / (high - low).clamp_min(1e-12), 0)


def gradient_magnitude(mattes: Tensor) -> Tensor:
    """Returns the magnitude of the gradient, (N, H, W), with the border repeated outside."""
    kernels = derivative_kernels().to(mattes)
    padded = F.pad(mattes[:, None], (kernels.shape[-1] // 2,) * 4, mode="replicate")
    return F.conv2d(padded, kernels).square().sum(1).sqrt()


def gradient_error(prediction: Tensor, target: Tensor, normalised: bool = False) -> Tensor:
    """Returns the summed squared difference of gradient magnitudes in thousands, (N,).

    Rhemann et al. 2009, "A perceptually motivated online benchmark for image matting". normalised:
    each matte is stretched to [0, 1] before, as in the evaluation of RobustVideoMatting (Lin et al.
    2022) and of MODNet; tables that were made by it compare only so.
    """
    return gradient_errors(prediction, target, normalised).sum((1, 2)) / 1000


def gradient_errors(prediction: Tensor, target: Tensor, normalised: bool) -> Tensor:
    """Returns the squared difference of gradient magnitudes of each pixel, (N, H, W)."""
    if normalised:
        prediction, target = spread(prediction), spread(target)
    return (gradient_magnitude(prediction) - gradient_magnitude(target)).square()


def connectivity_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the connectivity error in thousands, (N,).

    A pixel's degree of connectivity falls with its distance from the highest threshold at which it
    still belongs to the largest region (4-connected) that both mattes have in common; distances
    below 0.15 count as none (Rhemann et al. 2009). The loop over regions runs on the CPU.
    """
    return (connectivity_errors(prediction, target).sum((1, 2)) / 1000).float()


def connectivity_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the difference in connectivity of each pixel, (N, H, W) in float64."""
    pairs = zip(prediction.cpu().numpy(), target.cpu().numpy(), strict=True)
    return torch.from_numpy(np.stack([_connectivity(a, b) for a, b in pairs])).to(target.device)


def _connectivity(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    level = np.full(target.shape, -1.0)
    for lower, upper in pairwise(LEVELS):
        regions = np.empty(target.shape, np.int32)
        ndimage.label((prediction >= upper) & (target >= upper), output=regions)
        sizes = np.bincount(regions.ravel(), minlength=2)
        sizes[0] = 0  # of what belongs to no region
        outside = regions != (sizes.argmax() if sizes.any() else -1)
        level[(level < 0) & outside] = lower
    level[level < 0] = 1
    degrees = [
        1 - np.where(matte - level >= LEAST, matte - level, 0) for matte in (prediction, target)
    ]
    return np.abs(degrees[0] - degrees[1])


class MattingErrors(Metric):
    """Errors of predicted against true alpha, as means over frames.

    mad, mse: mean absolute and squared error of a pixel, times 1e3. sad: sum of absolute errors of
    a frame, divided by 1e3. grad, conn: `gradient_error` and `connectivity_error` of a frame.
    dtssd: root of the mean squared difference of the changes from frame to frame, times 1e2, 0 for
    a clip's first frame (Erofeev et al. 2015). mad_mixed, mse_mixed: means over the pixels whose
    true alpha is neither 0 nor 1; sad_mixed, grad_mixed, conn_mixed: sums over those. residue: mean
    predicted alpha where the truth is 0. soft_iou: sum of the smaller over the sum of the larger
    alpha, 1 for two empty clips. Scale factors are those of RobustVideoMatting's evaluation (Lin et
    al. 2022), whose gradient is `normalised=True`.

    Long clips may be given in pieces: `update(..., goes_on=True)` takes the first frame as the
    successor of the last one of the update before.
    """

    full_state_update = False
    frame_sums: Tensor
    frame_count: Tensor
    pixel_sums: Tensor
    pixel_counts: Tensor

    def __init__(self, normalised: bool = False, connectivity: bool = True):
        super().__init__()
        self.normalised, self.connectivity = normalised, connectivity
        self.add_state(
            "frame_sums", torch.zeros(len(OF_FRAMES), dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("frame_count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # absolute and squared error where mixed, prediction where empty, smaller and larger alpha
        self.add_state("pixel_sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pixel_counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")
        self._before = History(keep=1)

    def update(self, prediction: Tensor, target: Tensor, goes_on: bool = False) -> None:
        """Adds clips (B, 1, T, H, W); ValueError for shapes that differ or cannot go on."""
        if prediction.shape != target.shape or prediction.ndim != 5 or prediction.shape[1] != 1:
            raise ValueError(
                f"alpha of shapes {tuple(prediction.shape)} and {tuple(target.shape)}; both are "
                "(clips, 1, frames, height, width) of one size."
            )
        with torch.autocast(target.device.type, enabled=False):
            prediction, target = prediction.float().clamp(0, 1), target.float()
            dtssd = self._temporal(prediction, target, goes_on)
            of_frame, of_target = frames(prediction)[:, 0], frames(target)[:, 0]
            error = (of_frame - of_target).abs().double()
            gradient = gradient_errors(of_frame, of_target, self.normalised).double()
            connection = (
                connectivity_errors(of_frame, of_target)
                if self.connectivity
                else torch.zeros_like(error)
            )
            of_pixels, mixed = (error, gradient, connection), (of_target > 0) & (of_target < 1)
            values = [
                1e3 * error.mean((1, 2)),
                1e3 * error.square().mean((1, 2)),
                *(value.sum((1, 2)) / 1e3 for value in of_pixels),
                dtssd.flatten(),
                *((value * mixed).sum((1, 2)) / 1e3 for value in of_pixels),
            ]
            self.frame_sums = self.frame_sums + torch.stack([v.double().sum() for v in values])
            self.frame_count = self.frame_count + len(error)
            self._add_pixels(of_frame.double(), of_target.double(), error)

    def _temporal(self, prediction: Tensor, target: Tensor, goes_on: bool) -> Tensor:
        """Returns dtSSD of each frame, (B, T)."""
        whole, held = self._before.joined((prediction, target), goes_on)
        first, second = (
            torch.diff(matte, dim=2, prepend=None if held else matte[:, :, :1]) for matte in whole
        )
        return 1e2 * (first - second).double().square().mean((1, 3, 4)).sqrt()

    def _add_pixels(self, prediction: Tensor, target: Tensor, error: Tensor) -> None:
        mixed, empty = (target > 0) & (target < 1), target == 0
        sums = (
            error[mixed].sum(), error[mixed].square().sum(), prediction[empty].sum(),
            torch.minimum(prediction, target).sum(), torch.maximum(prediction, target).sum(),
        )  # fmt: skip
        self.pixel_sums = self.pixel_sums + torch.stack(sums)
        self.pixel_counts = self.pixel_counts + torch.stack([mixed.sum(), empty.sum()])

    def reset(self) -> None:
        super().reset()
        self._before.clear()

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name; those of pixels that did not occur are left out."""
        means = self.frame_sums / self.frame_count
        figures: dict[str, Tensor] = dict(zip(OF_FRAMES, means, strict=True))
        if not self.connectivity:
            del figures["conn"], figures["conn_mixed"]
        mixed, empty = self.pixel_counts
        if mixed > 0:
            figures["mad_mixed"] = 1e3 * self.pixel_sums[0] / mixed
            figures["mse_mixed"] = 1e3 * self.pixel_sums[1] / mixed
        if empty > 0:
            figures["residue"] = self.pixel_sums[2] / empty
        smaller, larger = self.pixel_sums[3:]
        figures["soft_iou"] = torch.where(larger > 0, smaller / larger.clamp_min(1e-12), 1.0)
        return figures
