"""Pairs of Wan's layers as one operation each: the same numbers with fewer passes over memory and
fewer FLOPs."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LAYOUT = torch.channels_last_3d  # 3-D convolutions run fastest in it (1.5 times on a CPU, measured)


class _NormSiLU(torch.autograd.Function):
    """Computes silu(x * r * gamma) with r = sqrt(C) / |x|, per position; keeps x and r only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min_(1e-12)
        r = (x.shape[1] ** 0.5 / norm).to(x.dtype)
        ctx.save_for_backward(x, r, gamma)
        return F.silu((x * r).mul_(gamma), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        x, r, gamma = ctx.saved_tensors
        unit = x * r
        grad = torch.ops.aten.silu_backward(grad, unit * gamma)
        need_x, need_gamma = ctx.needs_input_grad
        d_gamma = (grad * unit).sum_to_size(gamma.shape) if need_gamma else None
        if not need_x:
            return None, d_gamma
        # x -> x r is a projection: what grows |x| alone does not count
        grad = grad * gamma
        along = (grad * unit).mean(1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(r), d_gamma


class FusedNorm(WanRMS_norm):
    """Wan's norm, which on these kinds of devices is one kernel with its SiLU."""

    kinds: ClassVar[tuple[str, ...]] = ("cuda",)


def fuse_norms(module: nn.Module) -> None:
    """Makes every norm a FusedNorm; their parameters and names stay. Raises ImportError without
    triton."""
    try:
        import acetate.models.norm_kernel  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"task.fused_norm=true needs triton, which comes with PyTorch for CUDA: {error}. "
            "Give task.fused_norm=false."
        ) from error
    for norm in module.modules():
        if type(norm) is WanRMS_norm:
            norm.__class__ = FusedNorm


def norm_silu(norm: WanRMS_norm, x: Tensor, before: int = 0) -> Tensor:
    """Computes F.silu(norm(x)) of (B, C, T, H, W) in a third of the passes forward and back, or by
    a kernel in a seventh, behind `before` frames of zeros."""
    if isinstance(norm, FusedNorm) and x.device.type in norm.kinds:
        from acetate.models.norm_kernel import fused_norm_silu

        return fused_norm_silu(x, norm.gamma, before)
    y = _NormSiLU.apply(x, norm.gamma.to(x.dtype))
    return torch.cat([zero_frames(y, before), y], 2) if before else y


def zero_frames(like: Tensor, frames: int) -> Tensor:
    """Returns so many frames of zeros of the shape of those of (B, C, T, H, W), in LAYOUT."""
    shape = like[:, :, :1].expand(-1, -1, frames, -1, -1)
    return torch.empty_like(shape, memory_format=LAYOUT).zero_()


def _doubled(like: Tensor) -> Tensor:
    """Returns the sums of taps of a transposed convolution, (4, 3): an input pixel, doubled, is
    seen by four output pixels, by the inner two through two taps."""
    at, seen = torch.arange(3, device=like.device), torch.arange(4, device=like.device)[:, None]
    return ((at == 3 - seen) | (at == 2 - seen)).to(like.dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Applies a 3x3 convolution to every frame upsampled twofold (nearest), (B, C, T, H, W) -> (B,
    C', T, 2H, 2W).

    Of the nine pixels that a tap window covers only four differ: one transposed convolution of x
    itself, of stride 2 and 4x4 summed taps, with 4/9 of the FLOPs and no upsampled copy.
    """
    taps = _doubled(weight)
    kernel = torch.einsum("ip,jq,ocpq->coij", taps, taps, weight)
    frames = x.transpose(1, 2).flatten(0, 1)  # as it lies in memory: channels last
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    y = F.conv_transpose2d(frames, kernel, bias, stride=2, padding=1)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
