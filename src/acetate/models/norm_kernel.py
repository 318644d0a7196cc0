"""Wan's norm and SiLU as one kernel of Triton's each way, written behind the zero frames that the
next causal convolution begins with.

Of x (B, C, T, H, W), channels last, a position is a row of C values: y = silu(x r gamma), r =
sqrt(C) / |x|, in fp32 whatever x is kept in. Forward x is read and y is written, once; backward x
and dy are read and dx is written. Sums are taken in a fixed order, so that a step repeats bit by
bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from acetate.models.ops import LAYOUT

LEAST = tl.constexpr(1e-12)  # of |x|, as in diffusers
VALUES = 2048  # that a program has in registers at a time
PROGRAMS = 1024  # of the backward pass, each with a sum of its own for gamma


@triton.jit
def _forward(
    x, gamma, y, rows, clip, zeros, scale,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fills rows of y: each clip has `clip` of them, of which the first `zeros` are 0."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    number = row // clip
    known = (row < rows) & (row - number * clip >= zeros)
    inside = (column < C)[None, :]
    source = (row - (number + 1) * zeros)[:, None] * C + column[None, :]
    value = tl.load(x + source, mask=known[:, None] & inside, other=0.0).to(tl.float32)
    gain = tl.load(gamma + column, mask=column < C, other=0.0).to(tl.float32)
    r = scale / tl.maximum(tl.sqrt(tl.sum(value * value, 1)), LEAST)
    value = value * r[:, None] * gain[None, :]
    target = row[:, None] * C + column[None, :]
    value = value * tl.sigmoid(value)
    tl.store(y + target, value.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit
def _backward(
    x, gamma, dy, dx, sums, rows, clip, zeros, scale,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fills rows of dx, of which each clip has `clip`, and of `sums` (programs, C) this program's
    part of gamma's gradient."""
    column = tl.arange(0, COLUMNS)
    gain = tl.load(gamma + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([COLUMNS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        known = (row < rows)[:, None] & (column < C)[None, :]
        place = row[:, None] * C + column[None, :]
        value = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
        behind = ((row // clip + 1) * zeros)[:, None] * C  # the zero frames of y up to this row
        grad = tl.load(dy + place + behind, mask=known, other=0.0).to(tl.float32)
        r = scale / tl.maximum(tl.sqrt(tl.sum(value * value, 1)), LEAST)[:, None]
        unit = value * r
        value = unit * gain
        share = tl.sigmoid(value)
        grad = grad * share * (1 + value * (1 - share))
        total += tl.sum(grad * unit, 0)
        # x -> x r is a projection: what grows |x| alone does not count
        grad = grad * gain
        grad = (grad - unit * (tl.sum(grad * unit, 1) / C)[:, None]) * r
        tl.store(dx + place, grad.to(dx.dtype.element_ty), mask=known)
    tl.store(sums + tl.program_id(0) * C + column, total, mask=column < C)


def _settings(x: Tensor) -> dict[str, Any]:
    columns = triton.next_power_of_2(x.shape[1])
    return {"C": x.shape[1], "ROWS": max(1, VALUES // columns), "COLUMNS": columns}


def _padded(x: Tensor, before: int) -> Tensor:
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, frames + before, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAYOUT)


@torch.library.custom_op("acetate::norm_silu", mutates_args=())
def _norm_silu(x: Tensor, gamma: Tensor, before: int) -> Tensor:
    x, gamma, y = x.contiguous(memory_format=LAYOUT), gamma.contiguous(), _padded(x, before)
    frame, settings = x.shape[3] * x.shape[4], _settings(x)
    rows, clip = y.numel() // x.shape[1], y.shape[2] * frame
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(rows, settings["ROWS"]),)](
            x, gamma, y, rows, clip, before * frame, x.shape[1] ** 0.5, **settings
        )
    return y


@_norm_silu.register_fake
def _(x: Tensor, gamma: Tensor, before: int) -> Tensor:
    return _padded(x, before)


@torch.library.custom_op("acetate::norm_silu_backward", mutates_args=())
def _norm_silu_backward(x: Tensor, gamma: Tensor, dy: Tensor, before: int) -> tuple[Tensor, Tensor]:
    x, dy = (tensor.contiguous(memory_format=LAYOUT) for tensor in (x, dy))
    gamma, dx, settings = gamma.contiguous(), _padded(x, 0), _settings(x)
    frame = x.shape[3] * x.shape[4]
    rows, clip = x.numel() // x.shape[1], x.shape[2] * frame
    programs = min(PROGRAMS, triton.cdiv(rows, settings["ROWS"]))
    sums = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward[(programs,)](
            x, gamma, dy, dx, sums, rows, clip, before * frame, x.shape[1] ** 0.5, **settings
        )
    return dx, sums.sum(0).to(gamma.dtype).view_as(gamma)


@_norm_silu_backward.register_fake
def _(x: Tensor, gamma: Tensor, dy: Tensor, before: int) -> tuple[Tensor, Tensor]:
    return _padded(x, 0), torch.empty_like(gamma, memory_format=torch.contiguous_format)


class _Fused(torch.autograd.Function):
    """Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, before: int) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.before = before
        return _norm_silu(x, gamma, before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        return *_norm_silu_backward(*ctx.saved_tensors, grad, ctx.before), None


def fused_norm_silu(x: Tensor, gamma: Tensor, before: int) -> Tensor:
    """Returns silu(norm(x)) of x (B, C, T, H, W) behind `before` frames of zeros, (B, C, before +
    T, H, W), in the precision of x."""
    return _Fused.apply(x, gamma, before)
