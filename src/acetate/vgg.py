"""Loads VGG16, and LPIPS on it or on AlexNet, for losses and metrics, without running code; says
what to do where they are missing."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights

PUBLISHED = {  # of LPIPS, by its own names
    "vgg": ("VGG16", VGG16_Weights.IMAGENET1K_V1),
    "alex": ("AlexNet", AlexNet_Weights.IMAGENET1K_V1),
}


def load_vgg16(weights: str | None, instead: str) -> dict[str, Tensor]:
    """Returns VGG16's state dict from a file, or from torchvision's cache, fetched into it if need
    be.

    Raises FileNotFoundError that says which file goes where, or what to do instead.
    """
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"VGG16 weights {path} do not exist. Point loss.perceptual.weights at the file."
            )
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    return _published("vgg", instead)


def _published(net: str, instead: str) -> dict[str, Tensor]:
    name, weights = PUBLISHED[net]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise FileNotFoundError(
            f"{name} weights are not at {path}, or damaged, and could not be fetched ({error}). "
            f"Put {weights.url} there, or {instead}."
        ) from error


def lpips_network(instead: str, pretrained: bool = True, net: str = "vgg") -> nn.Module:
    """Returns LPIPS 0.1 (Zhang et al. 2018), frozen: two (N, 3, H, W) in [-1, 1] -> (N, 1, 1, 1).

    net: vgg or alex. pretrained False: on the meta device, to measure with. Raises as `load_vgg16`.
    """
    if pretrained:
        _published(net, instead)  # lpips itself would not say where the file belongs
    import lpips  # seconds to import, and only some choices need it

    with nullcontext() if pretrained else torch.device("meta"), warnings.catch_warnings():
        # lpips still uses torchvision's old argument names
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(
            net=net, verbose=False, pretrained=pretrained, pnet_rand=not pretrained
        )
    return network.eval().requires_grad_(False)
