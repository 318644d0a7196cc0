"""The VAE stage as released: edges of luma, noise that turns opaque, and figures that move between
validations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acetate.alpha import frames, harden
from acetate.losses.diffusion import DiffusionLoss
from acetate.losses.vae import VAELoss
from acetate.released.flow import schedule
from acetate.tasks.vae import Draw, RGBAVAETask


def central_difference_magnitude(video: Tensor) -> Tensor:
    """Computes the released 'Sobel', two-tap central differences of luma with zero padding: (B * T,
    1, H, W).

    luma = (65.738 R + 129.057 G + 25.064 B) / 256, whose weights sum to 0.859; one channel is taken
    as it is.
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


class ReleasedVAELoss(VAELoss):
    """Shows a prediction in the hard render where the prediction itself is above eps."""

    def edge(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return central_difference_l1(x_hat, x)

    def hard_support(self, alpha_hat: Tensor, alpha: Tensor) -> Tensor:
        return harden(alpha_hat, self.eps)


class ReleasedDiffusionLoss(DiffusionLoss):
    schedule_levels = staticmethod(schedule)


class ReleasedVAETask(RGBAVAETask):
    """Draws other colours, noise and noise levels at every validation."""

    def validation_draw(self, batch: dict[str, Any]) -> Draw:
        return self.draw(batch, "val", self.global_step)
