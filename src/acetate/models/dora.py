"""DoRA's linear layers as one operation each, on the parameters that PEFT keeps.

PEFT computes y = g (x W^T + s x A^T B^T) + b, g = m / |W + s B A| per output row, in fp32 passes
over activations and by products with a unit matrix as wide as the layer. Here y = x W'^T + b with
W' = g (W + s B A): one product of the base's own size, and no activation is read or written in more
than the precision of the step. As in DoRA (Liu et al. 2024, section 4.3), the norm counts as a
constant in the backward pass.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from acetate.models.held import whole

LEAST = 1e-8  # of a row's norm


def adapted(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Returns W + scale * B A of W (out, in), A = down (rank, in), B = up (out, rank), in fp32 at
    least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), up.to(wide), down.to(wide), alpha=scale)


def gain(magnitude: Tensor, adapted: Tensor) -> Tensor:
    """Returns m / |V| per output row of V (out, in), (out,), in the precision of V."""
    return magnitude.to(adapted.dtype) / torch.linalg.vector_norm(adapted, dim=1).clamp_min(LEAST)


class _DoRA(torch.autograd.Function):
    """Computes x W'^T + b of x (N, in), whose precision is that of the step."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        scale: float,
    ) -> Tensor:
        made = adapted(weight, down, up, scale)
        g = gain(magnitude, made)
        merged = made.mul_(g[:, None]).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, merged, bias)
        ctx.save_for_backward(x, merged, y, bias, down, up, magnitude, g)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, merged, y, bias, down, up, magnitude, g = ctx.saved_tensors
        scaled = (ctx.scale * g)[:, None]
        low = x @ down.to(x.dtype).T  # (N, rank)
        high = grad @ (scaled * up).to(x.dtype)  # (N, rank)
        linear = y if bias is None else y - bias  # g x (W + s B A)^T
        along = (grad * linear).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
        d_magnitude = torch.where(magnitude == 0, 0, along / magnitude)
        d_up = scaled * (grad.T @ low)
        d_down = high.T @ x
        d_x = grad @ merged if ctx.needs_input_grad[0] else None
        return (
            d_x, None, None, d_down.to(down.dtype), d_up.to(up.dtype),
            d_magnitude.to(magnitude.dtype), None,
        )  # fmt: skip


class DoRALinear(Linear):
    """PEFT's layer with DoRA whose forward pass is one operation. Its parameters, their names and
    whatever else PEFT does with it stay."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes (..., in) and returns (..., out) in autocast's precision, else in that of x."""
        if self.disable_adapters or self.merged or kwargs:
            return super().forward(x, *args, **kwargs)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        base = cast(Any, self.get_base_layer())
        (name,) = self.active_adapters
        with torch.autocast(kind, enabled=False):
            y = _DoRA.apply(
                x.reshape(-1, x.shape[-1]), whole(base), base.bias, self.lora_A[name].weight,
                self.lora_B[name].weight, self.lora_magnitude_vector[name].weight,
                self.scaling[name],
            )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])


def fuse(layer: LoraLayer) -> None:
    """Gives a linear layer of PEFT's with DoRA the forward pass of this module.

    Raises TypeError for another kind of layer.
    """
    if type(layer) is not Linear:
        raise TypeError(f"{type(layer).__name__}; only peft.tuners.lora.Linear can be fused.")
    layer.__class__ = DoRALinear
