"""The feature merge block, which makes one RGBA latent of colour and alpha features."""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanMidBlock,
    WanRMS_norm,
)
from torch import Tensor, nn

from acetate.models.wan import causal_conv, mid, norm_silu_conv

INITS = ("residual", "scratch")


class FeatureMerge(nn.Module):
    """1x1x1 conv 2C -> C; residual, attention, residual, attention, residual; norm, SiLU, 3x3x3
    conv C -> 16.

    25,537,552 parameters at C = 384 (Wan-Alpha, section 3.1). With init `residual` the last
    convolution starts at zero, so that the block starts as a correction to Wan's own latents;
    `scratch` is the released one.
    """

    def __init__(self, channels: int, latent_channels: int, init: str) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"merge init {init!r}; known: {', '.join(INITS)}.")
        self.conv_in = WanCausalConv3d(2 * channels, channels, 1)
        self.blocks = WanMidBlock(channels, num_layers=2)
        self.norm_out = WanRMS_norm(channels, images=False)
        self.conv_out = WanCausalConv3d(channels, latent_channels, 3, padding=1)
        if init == "residual":
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, rgb_features: Tensor, alpha_features: Tensor) -> Tensor:
        """Merges two (B, C, F, h, w) into (B, 16, F, h, w)."""
        x = causal_conv(self.conv_in, torch.cat([rgb_features, alpha_features], 1), None)
        x = mid(self.blocks, x, None)
        return norm_silu_conv(self.norm_out, self.conv_out, x, None)
