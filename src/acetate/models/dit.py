"""Wan's DiT as a velocity field."""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from acetate.models.loading import embed_prompt, load_transformer


class VelocityField(nn.Module):
    """A frozen DiT under one prompt: (x_t, timestep) -> velocity.

    context (1, L, text_dim) is the prompt's embedding. Gradients flow to x_t only.
    """

    def __init__(self, transformer: WanTransformer3DModel, context: Tensor) -> None:
        super().__init__()
        self.transformer = transformer.eval().requires_grad_(False)
        self.register_buffer("context", context, persistent=False)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """latents (B, 16, F, h, w) normalised and noisy, timestep (B,) in [0, 1000], fp32 -> like latents."""
        dtype = self.transformer.patch_embedding.weight.dtype
        context = self.context.to(dtype).expand(len(latents), -1, -1)
        velocity = self.transformer(latents.to(dtype), timestep, context, return_dict=False)[0]
        return velocity.to(latents.dtype)


def check_latent_grid(transformer: WanTransformer3DModel, height: int, width: int, space_stride: int) -> None:
    """Raises ValueError where pixels do not make whole patches: Wan2.1 needs sides that are multiples of 16."""
    _, *patch = transformer.config.patch_size
    for name, side, step in zip(("height", "width"), (height, width), patch, strict=True):
        if side % (step * space_stride):
            multiple = step * space_stride
            raise ValueError(
                f"{name} {side}; the DiT needs multiples of {multiple} pixels "
                f"(VAE stride {space_stride} x patch {step}). Use {name}={max(multiple, side // multiple * multiple)}."
            )


def load_velocity_field(
    *, transformer: str, text_encoder: str, prompt: str, prompt_length: int, dtype: str, cache: str
) -> VelocityField:
    """The DiT of source `transformer` under one prompt; the prompt's embedding is computed once and cached."""
    context = embed_prompt(prompt, text_encoder, prompt_length, cache)
    return VelocityField(load_transformer(transformer, getattr(torch, dtype)), context)
