"""Several ranks run the DiT on one clip, each on a part of its tokens (DeepSpeed-Ulysses, Jacobs et
al. 2023, arXiv 2309.14509).

In every layer but self-attention a token needs no other one. There an all-to-all trades tokens for
heads: of S tokens on n ranks, each has S / n of them with H heads before it, S of them with H / n
heads for it, and S / n with H again after it. Tokens are shared out behind the patch embedding and
put together behind the last layer, so that every rank has the whole velocity, and the same loss.
Its gradients are those of its own tokens, n times: the mean over all ranks, which DDP and FSDP
take, is the gradient of one process.

diffusers' own `enable_parallelism` asks for an accelerator, and has no backward pass where n does
not divide the tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from acetate.draws import stable_hash
from acetate.models.joint import SelfAttention


class ClipRanks:
    """The `count` neighbouring ranks that share a clip with this one; all ranks make it together.

    Where count does not divide the tokens, the last parts are filled up with zeros, which no token
    attends to and no loss sees.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.group, _ = dist.new_subgroups(group_size=count)
        self.rank = dist.get_rank(self.group)
        self.tokens = 0  # of the clips at hand

    def part(self, x: Tensor) -> Tensor:
        """Returns this rank's tokens (B, s, ...) of those of whole clips (B, S, ...)."""
        self.tokens = x.shape[1]
        size = -(-self.tokens // self.count)
        return self.filled(x[:, self.rank * size : (self.rank + 1) * size], size)

    def whole(self, x: Tensor) -> Tensor:
        """Returns the tokens (B, S, ...) of whole clips from this rank's part of them."""
        parts = self.exchanged(x.expand(self.count, *x.shape))
        return parts.movedim(0, 1).flatten(1, 2)[:, : self.tokens]

    def to_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Turns tensors of tokens (B, s, H, width) into ones of heads (B, S, H / n, width)."""
        split = [x.unflatten(2, (self.count, -1)).movedim(2, 0) for x in parts]
        mine = self.exchanged(torch.stack(split, 1)).unbind(1)
        return tuple(x.movedim(0, 1).flatten(1, 2)[:, : self.tokens] for x in mine)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Turns heads (B, S, H / n, width) into tokens (B, s, H, width)."""
        size = -(-self.tokens // self.count)
        split = self.filled(x, self.count * size).unflatten(1, (self.count, size))
        return self.exchanged(split.movedim(1, 0)).movedim(0, 2).flatten(2, 3)

    def filled(self, x: Tensor, tokens: int) -> Tensor:
        missing = tokens - x.shape[1]
        return F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing]) if missing else x

    def exchanged(self, x: Tensor) -> Tensor:
        """Sends x[r] to rank r of the group, and returns what came from each, (n, ...)."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def check_same(self, keys: Sequence[str], device: torch.device) -> None:
        """Raises ValueError on all ranks of the clip where one of them was given other clips."""
        own = torch.tensor([stable_hash(*keys)], device=device)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own, group=self.group)
        if len({int(value) for value in found}) > 1:
            raise ValueError(
                f"Ranks that share their clips (task.context_parallel={self.count}) were given "
                f"different ones, this one {', '.join(keys) or 'none'}: a clip could be read by "
                "some of them alone. Let all machines see the same data."
            )


class SharedAttention(SelfAttention):
    """Self-attention of this rank's heads over all tokens of a clip."""

    def __init__(self, ranks: ClipRanks) -> None:
        super().__init__()
        self.ranks = ranks

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mine = self.ranks.to_heads(q, k, v)
        return self.ranks.to_tokens(dispatch_attention_fn(*mine, backend=self._attention_backend))


def check_heads(transformer: WanTransformer3DModel, count: int) -> None:
    """Raises ValueError where the heads of a DiT's attention cannot be shared out."""
    heads = transformer.config.num_attention_heads
    if heads % count:
        fit = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"task.context_parallel={count}: the ranks of a clip share the {heads} heads of this "
            f"DiT's attention. Give one of {fit}."
        )


def share_tokens(transformer: WanTransformer3DModel, ranks: ClipRanks) -> None:
    """Lets the ranks run a DiT together, which takes and gives whole clips as before."""

    def split(_: Any, __: Any, patches: Tensor) -> Tensor:  # (B, C, F, h, w) -> (B, C, s, 1, 1)
        part = ranks.part(patches.flatten(2).transpose(1, 2))
        return part.transpose(1, 2)[..., None, None]

    transformer.patch_embedding.register_forward_hook(split)
    transformer.rope.register_forward_hook(lambda _, __, turns: tuple(map(ranks.part, turns)))
    transformer.proj_out.register_forward_hook(lambda _, __, x: ranks.whole(x))
    for block in transformer.blocks:
        block.attn1.set_processor(SharedAttention(ranks))
