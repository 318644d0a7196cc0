"""The way that Wan-Alpha's training code runs an RGBA-VAE, for commands.benchmark_step: diffusers'
own forward passes on chunks of frames with feature caches, and LoRA as a second convolution path.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanEncoder3d
from torch import Tensor, nn
from torch.nn.utils import parametrize

from acetate.models.adapters import MergedLoRA
from acetate.models.rgba_vae import RGBAVAE


class FactoredLoRA(nn.Module):
    """Computes y = conv(x) + (alpha / rank) * B(A(x)); A has conv's kernel, stride and causal
    padding, B is 1x1."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, lora: MergedLoRA) -> None:
        super().__init__()
        self.conv, self.A, self.B, self.scale = conv, lora.A, lora.B, lora.scale

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Convolves x; cache_x holds the frames before it, which diffusers hands to a causal
        convolution."""
        conv, convolve = self.conv, F.conv3d if x.dim() == 5 else F.conv2d
        if isinstance(conv, WanCausalConv3d):  # padded once for both paths
            width, _, height, _, before, _ = map(int, conv._padding)
            if cache_x is not None and before:
                x, before = torch.cat([cache_x, x], 2), before - cache_x.shape[2]
            x = F.pad(x, (width, width, height, height, before, 0))
        low = convolve(x, self.A, None, conv.stride, conv.padding)
        pointwise = self.B.view(*self.B.shape, *[1] * (x.dim() - 2))
        return convolve(
            x, conv.weight, conv.bias, conv.stride, conv.padding
        ) + self.scale * convolve(low, pointwise)


def in_chunks(net: nn.Module, x: Tensor, size: int) -> Tensor:
    """Runs frame 0, then `size` frames at a time; the cache holds the last frames that each
    convolution has seen."""
    cache = defaultdict(lambda: None)
    first, *others = x.split([1] + [size] * ((x.shape[2] - 1) // size), 2)
    out = net(first, feat_cache=cache, feat_idx=[0])
    for chunk in others:
        out = torch.cat([out, net(chunk, feat_cache=cache, feat_idx=[0])], 2)
    return out


def run_as_released(vae: RGBAVAE) -> None:
    """Gives encoder, merge block and decoders the released forward passes."""
    encoder, time_stride = vae.encoder.net, vae.encoder.time_stride
    # no head
    encoder.norm_out = nn.Identity()
    encoder.nonlinearity = nn.Identity()
    encoder.conv_out = nn.Identity()
    encoder.conv_out.forward = lambda x, cache_x: x
    vae.encoder.forward = lambda both, chunk: torch.cat(
        [in_chunks(encoder, x, time_stride) for x in both.chunk(2)]
    )
    # it has the layers of one without down blocks
    merge = WanEncoder3d(dim=1, dim_mult=[1], num_res_blocks=0)
    merge.conv_in, merge.mid_block = vae.merge.conv_in, vae.merge.blocks
    merge.norm_out, merge.conv_out = vae.merge.norm_out, vae.merge.conv_out
    vae.merge.forward = lambda *features: in_chunks(merge, torch.cat(features, 1), 1)
    for decoder in (vae.decoder_rgb, vae.decoder_alpha):
        for parent in list(decoder.net.modules()):
            for name, conv in parent.named_children():
                if parametrize.is_parametrized(conv, "weight"):
                    lora = conv.parametrizations.weight[0]
                    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
                    setattr(parent, name, FactoredLoRA(conv, lora))
        decoder.forward = lambda raw, chunk, of=decoder: in_chunks(
            of.net, of.post_quant_conv(raw), 1
        )
    vae.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
