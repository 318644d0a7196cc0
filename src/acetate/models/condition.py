"""Conditioning a DiT on given frames, in the layout of Wan2.1's image-to-video models: its input is
noisy latents, the mask of what is given, and the latents of a clip that shows it (Wan Team 2025,
arXiv 2503.20314, section 5.1).

The clip is empty between the given frames: 0 in colour, as Wan fills it, and one half in alpha,
which the encoder's second pass sees as 0, too. Transparent or opaque would say something of the
subject; this says nothing.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from acetate.models.rgba_vae import RGBAVAE
from acetate.models.wan import Geometry

GIVEN = ("first", "first_last")  # frames of a clip
UNKNOWN = 0.5  # alpha of a frame that is not given
TEXT_ALONE = (
    "This DiT was trained on text alone and takes no picture. Leave image= away, or give the dora= "
    "of experiment=i2v_dora, or an image-to-video base."
)


def given_mask(given: str, time_stride: int, shape: tuple[int, int, int]) -> Tensor:
    """Returns (time_stride, F, h, w), 1 at given frames: those of a latent frame lie beside each
    other as channels, and the first frame stands for all of its own."""
    frames, height, width = shape
    mask = torch.zeros(frames, time_stride)
    mask[0] = 1
    if given == "first_last":
        mask[-1, -1] = 1
    return mask.T[:, :, None, None].expand(-1, -1, height, width).contiguous()


def condition_latents(vae: RGBAVAE, hard: Tensor, alpha: Tensor, given: str) -> Tensor:
    """Encodes the given frames of a clip alone: normalised latents (B, C, F, h, w).

    hard (B, 3, T, H, W): hard-rendered, as `RGBAVAE.encode` takes it; alpha (B, 1, T, H, W). Of
    both, frames that are not given count for nothing. A causal VAE's first latent frame is that of
    the whole clip.
    """
    shown = torch.zeros(alpha.shape[2], dtype=torch.bool, device=alpha.device)
    shown[0] = True
    shown[-1] |= given == "first_last"
    shown = shown[:, None, None]
    hard = torch.where(shown, hard, torch.zeros_like(hard))
    return vae.normalise(vae.encode(hard, torch.where(shown, alpha, UNKNOWN)))


def with_mask(latents: Tensor, given: str, time_stride: int) -> Tensor:
    """Returns the condition (B, time_stride + C, F, h, w) of its latents (B, C, F, h, w)."""
    frames, height, width = latents.shape[2:]
    mask = given_mask(given, time_stride, (frames, height, width)).to(latents)
    return torch.cat([mask.expand(len(latents), -1, -1, -1, -1), latents], 1)


def condition_channels(transformer: WanTransformer3DModel) -> int:
    """Returns how many channels a DiT reads beside the noisy latents; 0 of a text model."""
    return transformer.config.in_channels - transformer.config.out_channels


def check_condition(transformer: WanTransformer3DModel, geometry: Geometry) -> None:
    """Raises ValueError for a DiT that reads no condition, or another one than this VAE's."""
    found, wanted = condition_channels(transformer), geometry.time_stride + geometry.channels
    if not found:
        raise ValueError(TEXT_ALONE)
    if found != wanted:
        raise ValueError(
            f"This DiT reads {found} channels beside the latents; a picture of this VAE has "
            f"{wanted}: a mask of {geometry.time_stride} and latents of {geometry.channels}."
        )


class WidePatchEmbedding(nn.Conv3d):
    """A patch embedding that reads a condition behind the latents, as one convolution's weights.

    It computes the two parts apart, so that zero weights, or a condition of zeros, leave exactly
    what the text model computes. Weights may be of higher precision than what it gives.
    """

    def __init__(self, text: nn.Conv3d, channels: int, dtype: torch.dtype) -> None:
        size: tuple[int, int, int] = cast(tuple[int, int, int], text.kernel_size)
        device = text.weight.device
        super().__init__(
            text.in_channels + channels, text.out_channels, size, size, dtype=dtype, device=device
        )
        self.own, self.gives = text.in_channels, text.weight.dtype
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, : self.own] = text.weight
            cast(Tensor, self.bias).copy_(cast(Tensor, text.bias))

    def forward(self, input: Tensor) -> Tensor:
        x, condition = input.to(self.weight.dtype).tensor_split([self.own], 1)
        of_text = F.conv3d(x, self.weight[:, : self.own], self.bias, self.stride)
        beside = F.conv3d(condition, self.weight[:, self.own :], None, self.stride)
        return (of_text + beside).to(self.gives)


def widen(
    transformer: WanTransformer3DModel, channels: int, dtype: torch.dtype = torch.float32
) -> None:
    """Lets a text model read `channels` more, with weights that start at zero, and trains its
    patch embedding. dtype: of that layer's weights."""
    text = cast(nn.Conv3d, transformer.patch_embedding)
    transformer.patch_embedding = WidePatchEmbedding(text, channels, dtype)
    transformer.register_to_config(in_channels=text.in_channels + channels)  # pyright: ignore[reportCallIssue]


def widen_as_trained(transformer: WanTransformer3DModel, facts: Mapping[str, Any]) -> None:
    """Widens as the facts of an adapter file say that it was."""
    condition = facts.get("condition", {})
    if condition.get("widened"):
        widen(transformer, condition["channels"])
