"""The FLOPs of a DiT's training step, for commands.benchmark_dit: those that any way needs, by
arithmetic, and those that a way does, counted.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from acetate.memory import Flops, without_numbers


@dataclass(frozen=True)
class Shape:
    """One clip in pixels, and the tokens of its prompt. Wan2.1's strides are 4 and 8, its patches
    2 x 2 latents."""

    frames: int
    height: int
    width: int
    prompt_length: int

    @property
    def latent_frames(self) -> int:
        return 1 + (self.frames - 1) // 4

    @property
    def tokens(self) -> int:
        return self.latent_frames * (self.height // 16) * (self.width // 16)


def forward_flops(config: Mapping[str, Any], layers: int, shape: Shape) -> dict[str, int]:
    """Returns the FLOPs of a forward pass without adapters: attention; matmul and prompt of all
    blocks (prompt: keys and values of cross attention); around, what lies before the blocks, and
    after, what lies behind them."""
    n, t = shape.tokens, shape.prompt_length
    heads, head, ffn = (
        config[name] for name in ("num_attention_heads", "attention_head_dim", "ffn_dim")
    )
    width, patch = heads * head, config["in_channels"] * 4
    embedded = 2 * t * width * (config["text_dim"] + width)  # of the prompt
    timed = 2 * width * (config["freq_dim"] + width + 6 * width)
    return {
        "attention": layers * 4 * n * (n + t) * width,
        "matmul": layers * 2 * n * width * (6 * width + 2 * ffn),
        "prompt": layers * 2 * t * width * 2 * width,
        "around": 2 * n * width * patch + embedded + timed,
        "after": 2 * n * width * config["out_channels"] * 4,
    }


def needed_flops(config: Mapping[str, Any], layers: int, shape: Shape, rank: int) -> dict[str, int]:
    """Returns the FLOPs that a step with DoRA on frozen weights needs, by kind.

    attention: forward, and the four products of its backward pass, together three times forward.
    matmul: each frozen matrix forward, and once more for the gradient of its input, which the
    prompt's keys and values do not have; the product B A of each layer; and, through the rank, the
    gradients of A and B. Nothing is counted that a way computes again.
    """
    forward = forward_flops(config, layers, shape)
    width, ffn = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
    n, t = shape.tokens, shape.prompt_length
    # (inputs + outputs, inputs * outputs, tokens) of the layers of a block
    adapted = [(2 * width, width**2, n)] * 6 + [(2 * width, width**2, t)] * 2
    adapted += [(width + ffn, width * ffn, n)] * 2
    low = sum(4 * tokens * rank * sides + 2 * rank * area for sides, area, tokens in adapted)
    once = forward["prompt"] + forward["around"]
    return {
        "attention": 3 * forward["attention"],
        "matmul": 2 * (forward["matmul"] + forward["after"]) + once + layers * low,
    }


def count_step(
    build: Callable[[int], WanTransformer3DModel],
    step: Callable[[WanTransformer3DModel, int], object],
    layers: int,
) -> dict[str, int]:
    """Counts the FLOPs of step(transformer, text_dim) by kind, on tensors without numbers.

    build: makes a DiT of so many blocks. Blocks after the first are alike, so that two tell of all.
    The backward pass of attention counts here what a fused kernel does: 2.5 times forward.
    """

    def counted(blocks: int) -> Counter[str]:
        transformer = build(blocks)
        with FakeTensorMode(allow_non_fake_inputs=True), Flops() as flops:
            without_numbers(transformer)
            step(transformer, transformer.config.text_dim)
        return flops.kinds

    one = counted(1)
    if layers == 1:
        return dict(one)
    two = counted(2)
    return {kind: one[kind] + (layers - 1) * (two[kind] - one[kind]) for kind in two}
