"""Wan2.1's own modules, from diffusers, and our execution of its causal VAE.

The VAE's causal convolutions see two earlier frames, so a clip can run whole or in chunks that hand
over the last frames of every convolution's input. Both are one traversal here: `state` None is the
whole clip, a dict is the next chunk. Output is never clamped.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from acetate.models.ops import LAYOUT, norm_silu, upsample_conv, zero_frames
from acetate.replacing import as_umask_says, rename_over

State = dict[nn.Module, Tensor] | None


@dataclass(frozen=True)
class Geometry:
    """The shape of a VAE's latents, from its config; raw -> normalised is (raw - mean) / std, per
    channel."""

    channels: int
    time_stride: int
    space_stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, vae: AutoencoderKLWan) -> "Geometry":
        config = vae.config
        if config.is_residual or config.patch_size is not None:
            raise ValueError(
                "This VAE has residual down blocks or patches (Wan2.2); acetate trains on "
                "Wan2.1's VAE. "
                "Choose wan=wan21_1b, wan21_14b, wan22_a14b or tiny."
            )
        return cls(
            channels=config.z_dim,
            time_stride=2 ** sum(config.temperal_downsample),
            space_stride=2 ** (len(config.dim_mult) - 1),
            mean=tuple(config.latents_mean),
            std=tuple(config.latents_std),
        )

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (16, F, h, w) of a clip of T = time_stride * k + 1 frames."""
        s = self.space_stride
        return self.channels, 1 + (frames - 1) // self.time_stride, height // s, width // s


def causal_conv(conv: WanCausalConv3d, x: Tensor, state: State, padded: bool = False) -> Tensor:
    """Convolves x (B, C, T, H, W) after two zero frames, or after the previous chunk's last two.
    padded: x begins with those of a whole clip."""
    _, width, _, height, before, _ = (int(n) for n in conv._padding)
    if padded or not before:
        return F.conv3d(x, conv.weight, conv.bias, conv.stride, padding=(0, height, width))
    previous = None if state is None else state.get(conv)
    one_frame = previous is None and x.shape[2] == 1
    if previous is None and not (one_frame and state is None):
        previous = zero_frames(x, before)
    if previous is not None:
        # thirty times faster here than F.pad, which leaves this layout
        x = torch.cat([previous, x], 2)
    if state is not None:
        state[conv] = x[:, :, -before:].clone()  # a view would keep the whole chunk alive
    if one_frame:
        # One frame meets only the last temporal tap: a 2-D convolution at a third of the cost.
        return F.conv2d(x[:, :, -1], conv.weight[:, :, -1], conv.bias, padding=(height, width))[
            :, :, None
        ]
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, padding=(0, height, width))


def norm_silu_conv(
    norm: WanRMS_norm,
    conv: WanCausalConv3d,
    x: Tensor,
    state: State,
    between: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Computes causal_conv of SiLU of a norm. between: a layer between both.

    The zero frames of a whole clip come with the norm: its kernel (task.fused_norm) writes behind
    them, and nothing is copied.
    """
    before = int(conv._padding[4]) if state is None and x.shape[2] > 1 else 0
    x = norm_silu(norm, x, before)
    return causal_conv(conv, x if between is None else between(x), state, padded=before > 0)


def residual(block: WanResidualBlock, x: Tensor, state: State) -> Tensor:
    shortcut = (
        x
        if isinstance(block.conv_shortcut, nn.Identity)
        else causal_conv(block.conv_shortcut, x, state)
    )
    x = norm_silu_conv(block.norm1, block.conv1, x, state)
    x = norm_silu_conv(block.norm2, block.conv2, x, state, block.dropout)
    return x + shortcut


def mid(block: nn.Module, x: Tensor, state: State) -> Tensor:
    x = residual(block.resnets[0], x, state)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = residual(resnet, attention(x), state)
    return x


def downsample(block: WanResample, x: Tensor, state: State) -> Tensor:
    """Passes frame 0; later frames 2k+1, 2k+2 merge with the one before them: (T-1) -> (T-1)/2."""
    conv = block.resample[1]
    # padded as it lies in memory: F.pad of x itself leaves LAYOUT
    x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 1, 0, 1)).permute(0, 4, 1, 2, 3)
    x = F.conv3d(x, conv.weight[:, :, None], conv.bias, stride=(1, 2, 2))
    if block.mode != "downsample3d":
        return x
    before = None if state is None else state.get(block)
    if state is not None:
        state[block] = x[:, :, -1:].clone()
    time_conv = block.time_conv
    if before is not None:
        return F.conv3d(
            torch.cat([before, x], 2), time_conv.weight, time_conv.bias, time_conv.stride
        )
    if x.shape[2] == 1:
        return x
    return torch.cat(
        [x[:, :, :1], F.conv3d(x, time_conv.weight, time_conv.bias, time_conv.stride)], 2
    )


def upsample(block: WanResample, x: Tensor, state: State) -> Tensor:
    """Passes frame 0; each later frame becomes two, by a causal convolution that never sees frame
    0."""
    if block.mode == "upsample3d":
        first = state is None or block not in state
        if state is not None:
            state[block] = x[:, :, :0]
        # not two slices, whose gradients leave LAYOUT
        head, tail = x.split([int(first), x.shape[2] - int(first)], 2)
        if tail.shape[2]:
            pairs = causal_conv(block.time_conv, tail, state).permute(0, 2, 3, 4, 1)
            pairs = pairs.unflatten(4, (2, -1)).permute(0, 1, 4, 2, 3, 5)  # (B, T, 2, H, W, C)
            tail = pairs.flatten(1, 2).permute(0, 4, 1, 2, 3)
            x = torch.cat([head, tail], 2)
    conv = block.resample[1]
    return upsample_conv(x, conv.weight, conv.bias)


def _channels_last(module: nn.Module) -> None:
    """Puts weights into LAYOUT."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv3d):
            conv.to(memory_format=LAYOUT)  # pyright: ignore[reportCallIssue]


def down(block: nn.Module, x: Tensor, state: State) -> Tensor:
    """Runs a block of the encoder."""
    if isinstance(block, WanResample):
        return downsample(block, x, state)
    return residual(block, x, state) if isinstance(block, WanResidualBlock) else block(x)


def up(block: nn.Module, x: Tensor, state: State) -> Tensor:
    """Runs a block of the decoder."""
    for resnet in block.resnets:  # pyright: ignore[reportGeneralTypeIssues]
        x = residual(resnet, x, state)
    return x if block.upsamplers is None else upsample(block.upsamplers[0], x, state)


class WanHalf(nn.Module):
    """Runs the encoder or the decoder: stages one after the other, over a whole clip or over chunks
    of it.

    checkpointing: each stage of a whole clip is computed again in the backward pass.
    """

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing

    def stages(self) -> list[Callable[[Tensor, State], Tensor]]:
        raise NotImplementedError

    def frames_of(self, chunk: int) -> tuple[int, int]:
        """Returns how many frames of the input the first chunk and each later one take."""
        raise NotImplementedError

    def forward(self, x: Tensor, chunk: int | None = None) -> Tensor:
        """Runs the stages. chunk: latent frames at a time, for long clips; None runs the whole clip
        at once."""
        if chunk is not None:
            return self.in_chunks(x, *self.frames_of(chunk))
        x = x.to(memory_format=LAYOUT)
        again = self.checkpointing and torch.is_grad_enabled()
        for stage in self.stages():
            x = checkpoint(stage, x, None, use_reentrant=False) if again else stage(x, None)  # type: ignore[assignment]
        return x

    def in_chunks(self, x: Tensor, first: int, size: int) -> Tensor:
        state, pieces = {}, []
        with parametrize.cached():  # adapters merge once per clip, not once per chunk
            for start in (0, *range(first, x.shape[2], size)):
                piece = x[:, :, start : start + (size if start else first)].to(memory_format=LAYOUT)
                for stage in self.stages():
                    piece = stage(piece, state)
                pieces.append(piece)
        return torch.cat(pieces, 2)


class WanEncoder(WanHalf):
    """Encodes video (B, 3, T, H, W) in [-1, 1] to features before Wan's head, (B, 4 * base_dim, F,
    h, w)."""

    def __init__(self, vae: AutoencoderKLWan, checkpointing: bool = False) -> None:
        super().__init__(checkpointing)
        self.net = vae.encoder
        _channels_last(self)
        self.time_stride = Geometry.of(vae).time_stride

    def stages(self) -> list[Callable[[Tensor, State], Tensor]]:
        blocks = [partial(down, block) for block in self.net.down_blocks]
        return [partial(causal_conv, self.net.conv_in), *blocks, partial(mid, self.net.mid_block)]

    def frames_of(self, chunk: int) -> tuple[int, int]:
        return 1 + self.time_stride * (chunk - 1), self.time_stride * chunk

    def feature_maps(self, video: Tensor) -> Iterator[Tensor]:
        """Yields the output of every stage, shallow to deep, for feature losses, in the weights'
        type."""
        video = video.to(self.net.conv_in.weight.dtype)
        for stage in self.stages():
            video = stage(video, None)
            yield video


class WanHead(nn.Module):
    """Wan's own last layers, from features to mean and log variance of the raw latents, each (B,
    16, F, h, w)."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.norm_out = vae.encoder.norm_out
        self.conv_out = vae.encoder.conv_out
        self.quant_conv = vae.quant_conv

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x = norm_silu_conv(self.norm_out, self.conv_out, features, None)
        mean, log_variance = causal_conv(self.quant_conv, x, None).chunk(2, 1)
        return mean, log_variance


class WanDecoder(WanHalf):
    """Decodes raw latents (B, 16, F, h, w) to video (B, 3, T, H, W), about [-1, 1], not clamped."""

    def __init__(self, vae: AutoencoderKLWan, checkpointing: bool = False) -> None:
        super().__init__(checkpointing)
        self.post_quant_conv = vae.post_quant_conv
        self.net = vae.decoder
        _channels_last(self)

    def stages(self) -> list[Callable[[Tensor, State], Tensor]]:
        return [self.stem, *(partial(up, block) for block in self.net.up_blocks), self.head]

    def frames_of(self, chunk: int) -> tuple[int, int]:
        return chunk, chunk

    def stem(self, x: Tensor, state: State) -> Tensor:
        x = causal_conv(self.net.conv_in, causal_conv(self.post_quant_conv, x, state), state)
        return mid(self.net.mid_block, x, state)

    def head(self, x: Tensor, state: State) -> Tensor:
        return norm_silu_conv(self.net.norm_out, self.net.conv_out, x, state)


@torch.no_grad()
def merged_vae(base: AutoencoderKLWan, decoder: WanDecoder) -> AutoencoderKLWan:
    """Returns the base with the weights that `decoder` runs with, its LoRA merged in, as diffusers'
    own module."""
    vae = copy.deepcopy(base)
    for name, parameter in vae.named_parameters():
        if name.startswith("decoder."):
            parameter.copy_(attrgetter(name.removeprefix("decoder."))(decoder.net))
        parameter.data = parameter.data.contiguous()
    _register_strides(vae)
    return vae


def _register_strides(vae: AutoencoderKLWan) -> None:
    """Puts the strides into the config, where WanPipeline reads them."""
    geometry = Geometry.of(vae)
    vae.register_to_config(
        scale_factor_temporal=geometry.time_stride, scale_factor_spatial=geometry.space_stride
    )


def save_vae(vae: AutoencoderKLWan, folder: Path) -> None:
    """Saves fp16 weights and config in diffusers layout; they are written beside `folder` and then
    renamed over it."""
    _register_strides(vae)
    # A copy, since from_config drops what was registered later where the constructor had a default.
    replace_folder(folder, copy.deepcopy(vae).to("cpu", torch.float16).save_pretrained)


def replace_folder(folder: Path, write: Callable[[str], object]) -> None:
    """Lets `write(path)` fill a temporary sibling, which then takes folder's name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(str(temporary))
        as_umask_says(temporary)  # mkdtemp and safetensors make private files
        rename_over(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
