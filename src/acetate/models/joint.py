"""Wan's DiT for colour and alpha in one sequence, after TransPixeler (Wang et al. 2025, arXiv
2501.03006).

A clip is latents (B, C, 2F, h, w): F frames of colour, then F frames of alpha as a grey video, both
of the plain VAE. Alpha tokens share the rotary positions of colour's, carry a learned embedding
that starts at zero, and are alone in being seen by LoRA. All else is the base.

Who attends to whom. In the paper's base, text, colour and alpha are one sequence, and its mask
keeps text from alpha alone: what the text becomes, and with it colour, is what the base makes of
it. Wan reads text by cross-attention, where text attends to nothing and is the same in every block:
the rule holds by construction, needs no mask, and k and v of cross-attention, which see text alone,
get no LoRA. Alpha attends to colour and to itself. Colour attends to alpha, too, as the paper
found that both fit each other better so; without, colour is the base's own.
"""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from acetate.models.dit import dora_layers, start_dora
from acetate.models.sharding import shard_like

# q, k, v, o of self-attention, q and o of cross-attention: what alpha tokens pass
TARGETS = r"blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|attn2\.(to_q|to_out\.0))"
STREAMS = 2  # colour and alpha


class SharedPositions(WanRotaryPosEmbed):
    """Rotary positions of F frames, twice."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Takes (B, C, 2F, h, w) and returns cos and sin, (1, tokens, 1, width of a head)."""
        frames = hidden_states.shape[2] // STREAMS
        cos, sin = super().forward(hidden_states[:, :, :frames])
        return torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)


class MarkedPatches(nn.Conv3d):
    """The patch embedding, with the alpha embedding (width,) added to the second half of the
    frames."""

    alpha_embedding: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:  # as nn.Conv3d names it
        rgb, alpha = super().forward(input).chunk(STREAMS, 2)
        mark = self.alpha_embedding.to(alpha.dtype)[:, None, None, None]
        return torch.cat([rgb, alpha + mark], 2)


class AlphaLoRA(Linear):
    """PEFT's layer with LoRA (Hu et al. 2021) that the second half of the tokens alone pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes (B, tokens, in) and returns (B, tokens, out)."""
        (name,) = self.active_adapters
        down, up = self.lora_A[name], self.lora_B[name]
        rgb, alpha = self.base_layer(x).chunk(STREAMS, 1)
        seen = x.chunk(STREAMS, 1)[1].to(down.weight.dtype)
        return torch.cat([rgb, alpha + (self.scaling[name] * up(down(seen))).to(alpha.dtype)], 1)


class SelfAttention(WanAttnProcessor):
    """Wan's self-attention around an `attend` of one's own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns what tokens (B, S, heads, width) with their positions make of each other."""
        raise NotImplementedError

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert rotary_emb is not None, "self-attention has positions"
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        q, k = rotated(q, *rotary_emb), rotated(k, *rotary_emb)
        x = self.attend(q, k, v).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](x))


class BlindColor(SelfAttention):
    """Colour attends to itself alone and alpha to both: two calls of fused attention, without a
    mask of tokens by tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (rgb, alpha), half = q.chunk(STREAMS, 1), q.shape[1] // STREAMS
        seen = (
            dispatch_attention_fn(rgb, k[:, :half], v[:, :half], backend=self._attention_backend),
            dispatch_attention_fn(alpha, k, v, backend=self._attention_backend),
        )
        return torch.cat(seen, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of x (B, tokens, heads, width) by the angles of their positions, as diffusers
    does."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.flatten(-2).type_as(x)


def attach_joint(
    transformer: WanTransformer3DModel,
    rank: int,
    alpha: float,
    rgb_attends_alpha: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Freezes the DiT and makes it the joint one, adapters without values; dtype: of what
    trains."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))  # type: ignore
    for layer in dora_layers(transformer).values():
        layer.__class__ = AlphaLoRA
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    patches: Any = transformer.patch_embedding
    mark = torch.empty(patches.out_channels, dtype=dtype, device=patches.weight.device)
    patches.alpha_embedding = nn.Parameter(mark)
    patches.__class__, transformer.rope.__class__ = MarkedPatches, SharedPositions
    if not rgb_attends_alpha:
        for block in transformer.blocks:
            block.attn1.set_processor(BlindColor())


@torch.no_grad()
def start_joint(transformer: WanTransformer3DModel, seed: int) -> None:
    """Starts A as `start_dora` does, B and the alpha embedding at zero."""
    start_dora(transformer, seed)
    patches: Any = transformer.patch_embedding
    if not patches.weight.is_meta:  # shapes without numbers
        mark = patches.alpha_embedding
        zeros = shard_like(torch.zeros(mark.shape), mark)
        patches.alpha_embedding = nn.Parameter(zeros.to(patches.weight.device, mark.dtype))
