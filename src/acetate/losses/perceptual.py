"""Perceptual terms. All compare two videos (B, 3, T, H, W) in [-1, 1], unclamped; the target needs
no gradient.

Each takes `feature_maps`, the frozen Wan encoder's stages, which only EncoderFeatures uses.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg16

from acetate.alpha import frames
from acetate.vgg import load_vgg16, lpips_network

FeatureMaps = Callable[[Tensor], Iterable[Tensor]]
INSTEAD = "choose loss/perceptual=encoder_features, which needs no download"
RELU2_2 = 9  # torchvision's vgg16.features[:9] ends with relu2_2


class EncoderFeatures(nn.Module):
    """Averages |phi(x_hat) - phi(x)|_1 over the first `stages` stages of phi, the frozen Wan
    encoder; no download."""

    def __init__(self, *, stages: int) -> None:
        super().__init__()
        if stages < 1:
            raise ValueError(
                f"loss.perceptual.stages={stages}; compare at least 1 stage, or set its weight to "
                "0."
            )
        self.stages = stages

    def forward(self, x_hat: Tensor, x: Tensor, feature_maps: FeatureMaps) -> Tensor:
        with torch.no_grad():
            targets = [maps for _, maps in zip(range(self.stages), feature_maps(x), strict=False)]
        terms = [(a - b).abs().mean() for b, a in zip(targets, feature_maps(x_hat), strict=False)]
        return torch.stack(terms).mean()


class VGGFeatures(nn.Module):
    """Computes the mean squared error of VGG16's relu2_2 (Johnson et al. 2016).

    imagenet_norm False is the released variant. weights: a file of VGG16 weights, else
    torchvision's cache. pretrained False leaves the network on the meta device, to measure with.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, imagenet_norm: bool, weights: str | None = None, pretrained: bool = True
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            self.features = vgg16(weights=None).features[:RELU2_2]
        if pretrained:
            state = load_vgg16(weights, INSTEAD)
            self.features.load_state_dict(
                {
                    name.removeprefix("features."): value
                    for name, value in state.items()
                    if name.startswith("features.") and int(name.split(".")[1]) < RELU2_2
                },
                assign=True,
            )
        self.requires_grad_(False)
        self.imagenet_norm = imagenet_norm
        for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x_hat: Tensor, x: Tensor, feature_maps: FeatureMaps) -> Tensor:
        with torch.no_grad():
            target = self._features(x)
        return F.mse_loss(self._features(x_hat), target)

    def _features(self, video: Tensor) -> Tensor:
        x = frames(video) * 0.5 + 0.5
        if self.imagenet_norm:
            x = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        return self.features(x)


class LPIPSFeatures(nn.Module):
    """Computes LPIPS-VGG 0.1 (Zhang et al. 2018), the mean over frames. pretrained False: without
    numbers, to measure with."""

    def __init__(self, *, pretrained: bool = True) -> None:
        super().__init__()
        self.network = lpips_network(INSTEAD, pretrained)

    def forward(self, x_hat: Tensor, x: Tensor, feature_maps: FeatureMaps) -> Tensor:
        return self.network(frames(x_hat), frames(x)).mean()
