"""Other ways of the field to alpha in a VAE's latents, for `sweep=alternatives` to compare with.

Their checkpoints are resumed and measured as any; export and the DiT stage refuse them by kind.
"""

import copy
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from acetate.models.adapters import add_lora
from acetate.models.ops import LAYOUT
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.wan import WanEncoder, WanHead
from acetate.regions import check_clip_shape


class DecodersAlone(RGBAVAE):
    """Trains the two decoders alone: alpha is guessed from the base's latents of colour, which are
    never told of it."""

    kind = "rgba_vae_decoders_alone"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.merge_init != "residual":
            raise ValueError(
                f"model.merge_init={self.merge_init}: without a merge block latents are Wan's own. "
                "Leave it residual."
            )
        self.merge.requires_grad_(False)  # as it starts it adds nothing


class OpaqueInit(RGBAVAE):
    """One VAE of four channels, which starts as the base on opaque clips: weights of the fourth are
    0, its bias says opaque (AlphaVAE, arXiv 2507.09308; Qwen-Image-Layered, arXiv 2512.15603).

    LoRA on the encoder, its head and the decoder; the two convolutions that meet the fourth channel
    train whole.
    """

    kind = "rgba_vae_opaque_init"

    def __init__(self, *, vae: AutoencoderKLWan, **settings: Any) -> None:
        four = copy.deepcopy(vae)
        super().__init__(vae=vae, **settings)
        self.merge, self.decoder_alpha = nn.Identity(), nn.Identity()
        # beside the base's own encoder, which the perceptual loss looks through
        self.encoder_four, self.head_four = WanEncoder(four), WanHead(four)
        for part in (self.encoder_four, self.head_four):
            add_lora(part, self.lora_rank, self.lora_alpha)
        wider = _with_fourth(vae.encoder.conv_in, of_input=True), _with_fourth(vae.decoder.conv_out)
        self.encoder_four.net.conv_in, self.decoder_rgb.net.conv_out = wider
        self.cast_frozen(settings.get("frozen_dtype", "float32"))

    def encode(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        check_clip_shape(*alpha.shape[2:], self.geometry.time_stride, self.geometry.space_stride)
        both = torch.cat([rgb, alpha * 2 - 1], 1)
        return self.head_four(self.encoder_four(both, self.chunk))[0].to(self.mean.dtype)

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        raw = raw.to(self.decoder_rgb.post_quant_conv.weight.dtype)
        rgb_hat, matte = self.decoder_rgb(raw, self.chunk).to(self.mean.dtype).split([3, 1], 1)
        return rgb_hat, (matte + 1) / 2


def _with_fourth(conv: WanCausalConv3d, of_input: bool = False) -> WanCausalConv3d:
    """Returns a convolution of one more channel, whose weights are 0 and whose value is 1."""
    inputs, outputs = conv.in_channels + of_input, conv.out_channels + (not of_input)
    wider = WanCausalConv3d(inputs, outputs, conv.kernel_size, padding=conv.kernel_size[-1] // 2)
    with torch.no_grad():
        wider.weight.zero_()
        wider.weight[: conv.out_channels, : conv.in_channels] = conv.weight
        bias: Tensor = wider.bias  # type: ignore[assignment]  # Wan's have one
        bias.fill_(1.0)
        bias[: conv.out_channels] = conv.bias
    return wider.to(memory_format=LAYOUT)  # pyright: ignore[reportCallIssue]
