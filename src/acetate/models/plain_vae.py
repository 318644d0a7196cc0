"""Wan's own VAE for clips of colour and alpha: what the joint DiT reads and writes."""

import hashlib

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from acetate.alpha import one_channel
from acetate.models.loading import weights_sha256
from acetate.models.rgba_vae import RGBADecoders
from acetate.models.wan import WanEncoder, WanHead
from acetate.regions import check_clip_shape


class PlainVAE(RGBADecoders):
    """Encodes colour, then alpha as a grey video, and puts the frames of both after each other:
    latents (B, C, 2F, h, w). Nothing of it trains.

    chunk: as RGBADecoders.
    """

    def __init__(
        self, *, vae: AutoencoderKLWan, chunk: int | None = None, frozen_dtype: str = "float32"
    ) -> None:
        super().__init__(rgb=vae, alpha=vae, chunk=chunk)
        self.base_sha256 = weights_sha256(vae)
        self.encoder, self.head = WanEncoder(vae), WanHead(vae)
        self.requires_grad_(False).cast_frozen(frozen_dtype)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (C, 2F, h, w) of a clip."""
        channels, latent_frames, *grid = super().latent_shape(frames, height, width)
        return channels, 2 * latent_frames, grid[0], grid[1]

    def encode(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Returns raw latents; rgb and alpha as of RGBAVAE.encode."""
        check_clip_shape(*alpha.shape[2:], self.geometry.time_stride, self.geometry.space_stride)
        both = torch.cat([rgb, (alpha * 2 - 1).expand_as(rgb)])
        raw = self.head(self.encoder(both.to(self.encoder.net.conv_in.weight.dtype), self.chunk))[0]
        return torch.cat(raw.to(self.mean.dtype).chunk(2), 2)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns rgb_hat and alpha_hat, the mean of its three channels, as RGBADecoders does."""
        raw = raw.to(self.decoder_rgb.post_quant_conv.weight.dtype)
        rgb, matte = (
            self.decoder_rgb(part, self.chunk).to(self.mean.dtype) for part in raw.chunk(2, 2)
        )
        return rgb, (one_channel(matte) + 1) / 2

    def latents_sha256(self) -> str:
        """Hashes the base and the scheme: no RGBA-VAE on the same base has the same."""
        return joint_sha256(self.base_sha256)


def joint_sha256(base_sha256: str) -> str:
    """Returns PlainVAE.latents_sha256 of a VAE that is not built."""
    return hashlib.sha256(f"{base_sha256}joint".encode()).hexdigest()
