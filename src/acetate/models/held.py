"""The frozen weights of a DiT's blocks in little memory of a device: rounded to eight or four bits,
or in the host's memory and copied to the device while their block is at work.

They are the weights that DoRA adapts, nearly all of a DiT. Its op takes them whole, in fp32, for
the moment that it merges them, and keeps none of them for the backward pass.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("full", "fp8", "nf4")
FP8 = torch.float8_e4m3fn
GROUP = 64  # weights of an NF4 scale
# quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, appendix E)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
LEAST = torch.finfo(torch.float32).tiny  # of a scale, so that a row of zeros stays one


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a weight (out, in) in float8_e4m3fn and the scale (out, 1) of each row in fp32: the
    largest of a row is the largest that the type has."""
    wide = weight.float()
    scale = (wide.abs().amax(1, keepdim=True) / torch.finfo(FP8).max).clamp_min(LEAST)
    return (wide / scale).to(FP8), scale


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a weight as two codes of NF4 a byte (n / 2,), and the scale (n / 64, 1) of each 64
    weights in fp32."""
    groups = weight.float().reshape(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(LEAST)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(groups / scale, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (codes[:, ::2] * 16 + codes[:, 1::2]).flatten(), scale


class HeldLinear(nn.Linear):
    """A frozen linear layer whose weight is rounded, or in the host's memory, or both.

    kind: one of KINDS. `copy` is the weight on the device of the step, where that is another place
    than its own.
    """

    kind: str
    offloaded: bool
    copy: Tensor | None
    scale: Tensor | None
    pairs: Tensor | None

    @classmethod
    def of(cls, layer: nn.Linear, kind: str, offloaded: bool) -> None:
        """Makes a linear layer one of these, in its place. Raises ValueError for a weight that NF4
        does not divide."""
        weight, scale, pairs = layer.weight.detach(), None, None
        if kind == "fp8":
            weight, scale = to_fp8(weight)
        elif kind == "nf4":
            if weight.numel() % GROUP:
                raise ValueError(
                    f"base.weights=nf4: a layer of this DiT has {weight.numel()} weights, no "
                    f"multiple of {GROUP}. Use base.weights=fp8."
                )
            weight, scale = to_nf4(weight)
            levels = torch.tensor(NF4, device=weight.device)
            pairs = torch.cartesian_prod(levels, levels)  # of a byte
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_buffer("scale", scale, persistent=False)
        layer.register_buffer("pairs", pairs, persistent=False)
        layer.kind, layer.offloaded, layer.copy = kind, offloaded, None

    def whole(self) -> Tensor:
        """Returns the weight (out, in) on the device: in fp32 where it is rounded, else as it
        is."""
        weight = self.weight if self.copy is None else self.copy
        if self.scale is None:
            return weight
        if self.pairs is None:
            return weight.float().mul_(self.scale)
        values = F.embedding(weight.int(), self.pairs).view(-1, GROUP)
        return values.mul_(self.scale).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole().to(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HeldLinear":
        """Moves what it holds and never changes its precision; what is offloaded stays where it
        is."""
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        for value in (None if self.offloaded else self.weight, self.scale, self.pairs):
            if value is not None:  # as bytes, which no module-wide cast reaches
                value.data = fn(value.data.view(torch.uint8)).view(value.dtype)
        return self


def whole(layer: nn.Module) -> Tensor:
    """Returns the weight of a linear layer, held or not."""
    return layer.whole() if isinstance(layer, HeldLinear) else layer.weight  # pyright: ignore


def held_layers(module: nn.Module) -> dict[str, HeldLinear]:
    """Returns the layers within a module whose weights are held, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, HeldLinear)}


class Offload:
    """Keeps the held weights of blocks in the host's memory, pinned where the device is CUDA, and
    copies those of a block to the device before it runs, forward and recomputed; while it runs, a
    stream of its own copies those of the one that is next.

    The device holds two blocks at most.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = [list(held_layers(block).values()) for block in blocks]
        self.last = -1
        self.stream: torch.cuda.Stream | None = None
        self.copied: dict[int, torch.cuda.Event | None] = {}  # blocks that are on the device
        for place, block in enumerate(blocks):
            block.forward = partial(self.run, place, block.forward)

    def run(self, place: int, forward: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
        """Runs a block's forward pass with its weights on the device of x."""
        onward = place > self.last or (place == 0 and self.last != 1)
        following, self.last = place + (1 if onward else -1), place
        for done in [other for other in self.copied if other not in (place, following)]:
            self.let_go(done)
        if x.is_cuda:  # else a host that is ahead would copy more blocks than are let go
            torch.cuda.current_stream(x.device).synchronize()
        wanted = [place, *[following] * (0 <= following < len(self.blocks))]
        for missing in [other for other in wanted if other not in self.copied]:
            self.fetch(missing, x.device)
        event = self.copied[place]
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)
        return forward(x, *rest)

    def fetch(self, place: int, device: torch.device) -> None:
        """Starts to copy a block's weights to the device."""
        current = None
        if device.type == "cuda":
            self.stream = self.stream or torch.cuda.Stream(device)
            current = torch.cuda.current_stream(device)
        # selective checkpointing counts the operations of this thread, the same ones each time
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._copy, place, device, current).result()

    def _copy(self, place: int, device: torch.device, current: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(self.stream):  # none: no stream is chosen
            for layer in self.blocks[place]:
                if current is not None and not layer.weight.is_pinned():
                    layer.weight.data = layer.weight.data.pin_memory()
                copy = torch.empty_like(layer.weight, device=device, requires_grad=False)
                layer.copy = copy.copy_(layer.weight, non_blocking=True)
                if current is not None:
                    copy.record_stream(current)
        self.copied[place] = None if self.stream is None else self.stream.record_event()

    def let_go(self, place: int) -> None:
        del self.copied[place]
        for layer in self.blocks[place]:
            layer.copy = None


def hold(blocks: nn.ModuleList, kind: str, offload: bool) -> None:
    """Holds the weights of the linear layers of a DiT's blocks, adapters on them or not, as `kind`
    says (one of KINDS), and in the host's memory where `offload` is true."""
    if kind == "full" and not offload:
        return
    for name, layer in list(blocks.named_modules()):
        if type(layer) is nn.Linear and ".lora_" not in name:
            HeldLinear.of(layer, kind, offload)
    if offload:
        Offload(blocks)
