"""RGBA algebra on video (B, C, T, H, W): rgb is straight colour in [-1, 1], alpha is coverage in
[0, 1]."""

import torch
from torch import Tensor

# The corners of the RGB cube; the bits of an index are R, G, B from high to low.
PALETTE_NAMES = ("key", "blue", "green", "cyan", "red", "magenta", "yellow", "white")
PALETTE = torch.tensor([[float(i >> b & 1) * 2 - 1 for b in (2, 1, 0)] for i in range(8)])  # (8, 3)


def frames(video: Tensor) -> Tensor:
    """Folds time into the batch: (B, C, T, H, W) -> (B * T, C, H, W)."""
    return video.transpose(1, 2).flatten(0, 1)


def over(rgb: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """Returns the soft render over a background (Porter and Duff 1984, straight alpha)."""
    return alpha * rgb + (1 - alpha) * background


def harden(alpha: Tensor, eps: float = 0.0) -> Tensor:
    """Returns the support of a matte, 1 where alpha > eps, in alpha's dtype; `over` with it is the
    hard render."""
    return (alpha > eps).to(alpha.dtype)


def premultiply(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Turns straight colour into colour over black; both are in [-1, 1]."""
    return over(rgb, alpha, torch.full((), -1.0, dtype=rgb.dtype, device=rgb.device))


def unpremultiply(rgb: Tensor, alpha: Tensor, min_alpha: float = 1 / 255) -> Tensor:
    """Turns colour over black into straight colour, clamped to [-1, 1]; black where alpha <
    min_alpha.

    Below one 8-bit step of alpha the quotient is rounding noise.
    """
    straight = ((rgb + 1) / alpha.clamp_min(min_alpha) - 1).clamp(-1, 1)
    return torch.where(alpha < min_alpha, -torch.ones_like(straight), straight)


def palette_colors(indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turns palette indices (B,) into backgrounds (B, 3, 1, 1, 1) in {-1, 1}, on the indices'
    device, to which nothing is copied."""
    bits = torch.stack([indices >> b & 1 for b in (2, 1, 0)], 1)
    return (bits.to(dtype) * 2 - 1)[:, :, None, None, None]


def palette(device: torch.device) -> Tensor:
    """Returns the backgrounds of all eight colors, (8, 3, 1, 1, 1), in the palette's order."""
    return palette_colors(torch.arange(len(PALETTE_NAMES), device=device))


def checkerboard(height: int, width: int, cell: int = 8) -> Tensor:
    """Returns the transparency pattern of editors, (3, 1, H, W): light grey 0.6 and mid grey 0.2 in
    [-1, 1]."""
    y, x = torch.arange(height)[:, None] // cell, torch.arange(width) // cell
    return (0.2 + 0.4 * ((x + y) % 2)).expand(3, 1, height, width)


def one_channel(alpha: Tensor) -> Tensor:
    """Returns the mean over channels, (B, C, T, H, W) -> (B, 1, T, H, W), as the released inference
    takes it."""
    return alpha.mean(1, keepdim=True)


def border_mean(alpha: Tensor) -> Tensor:
    """Returns the mean alpha of the outermost rows and columns, (B, 1, T, H, W) -> (B,)."""
    edges = [alpha[..., 0, :], alpha[..., -1, :], alpha[..., 1:-1, 0], alpha[..., 1:-1, -1]]
    return torch.cat([edge.flatten(1) for edge in edges], 1).mean(1)
