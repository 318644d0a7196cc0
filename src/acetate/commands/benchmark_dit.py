"""A training step of a Wan DiT with DoRA, timed in several ways side by side, for
commands.benchmark.

A step is the forward pass, the error of the velocity, and the backward pass to the adapters.
`stock` is PEFT's own DoRA on diffusers' own DiT with its own gradient checkpointing. `ours` is what
acetate trains, `ours_compiled` the same with every block compiled. Weights are random, by the seed
the same for all ways; before anything is timed, each way's velocity and gradients are held against
those of `stock` in float64, on a small DiT.
"""

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor

from acetate.blank import blank_transformer
from acetate.cli import conf
from acetate.commands.benchmark_clock import (
    DTYPES,
    DisagreementError,
    failures_in,
    peak_beyond,
    release,
    share_of,
    timed,
)
from acetate.commands.benchmark_flops import Shape, count_step, needed_flops
from acetate.draws import generator_for
from acetate.models import dit
from acetate.regions import check_clip_shape

WAYS = ("stock", "ours", "ours_compiled")
TOLERANCE = 1e-4  # of float32 against float64, relative: |difference| / |reference|
WORSE = 1.1  # what the error of a way in bfloat16 may be of that of `stock`
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # noisy latents, timestep, context, target


@dataclass(frozen=True)
class DiTLoad:
    """The work of a DiT's step. Raises ValueError for settings that cannot run."""

    size: str
    layers: int | None  # of the blocks; None: all
    shapes: tuple[tuple[int, int, int], ...]  # frames, height, width
    prompt_length: int
    rank: int
    alpha: float
    checkpointing: bool
    keep_attention: bool  # of ours: attention is not computed again
    ways: tuple[str, ...]
    warmup: int
    repeats: int
    device: str
    precision: str
    seed: int

    def __post_init__(self) -> None:
        transformer = blank_transformer(source_of(self.size), torch.float32)
        blocks = len(transformer.blocks)
        if not 1 <= self.layers_of(blocks) <= blocks:
            raise ValueError(
                f"dit.layers={self.layers}; a DiT of size {self.size} has {blocks}. Use "
                f"dit.layers=null for all."
            )
        for frames, height, width in self.shapes:
            check_clip_shape(frames, height, width, time_stride=4, space_stride=8)
            dit.check_latent_grid(transformer, height, width, space_stride=8)

    def layers_of(self, blocks: int) -> int:
        return blocks if self.layers is None else self.layers


def source_of(size: str) -> str:
    """Returns what acetate.memory knows the size by."""
    return str(conf().parent / "assets/wan-tiny") if size == "tiny" else size


def blank(size: str, layers: int | None, precision: str) -> WanTransformer3DModel:
    """Builds a DiT without values, on the meta device, with its first `layers` blocks or all."""
    transformer = blank_transformer(source_of(size), DTYPES[precision])
    if layers is not None:
        transformer.blocks = transformer.blocks[:layers]
    return transformer.train()


def add_adapters(transformer: WanTransformer3DModel, way: str, rank: int, alpha: float) -> None:
    """Puts DoRA in float32 on a DiT without values, as the way does."""
    if way != "stock":
        dit.attach_dora(transformer, rank, alpha, torch.float32)
        return
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=dit.DORA_TARGETS, use_dora=True)
    )
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def prepare(
    transformer: WanTransformer3DModel, way: str, *, checkpointing: bool, keep_attention: bool
) -> None:
    """Gives a DiT with adapters what the way runs with: checkpointing, compiled blocks."""
    if way == "ours_compiled":
        dit.compile_blocks(transformer, checkpointing, keep_attention)
    elif checkpointing and way == "ours":
        dit.checkpoint_blocks(transformer, keep_attention)
    elif checkpointing:
        transformer.enable_gradient_checkpointing()


@torch.no_grad()
def fill(transformer: WanTransformer3DModel, device: str, seed: int) -> None:
    """Gives a DiT on the meta device random values on a device, by the seed: matrices small ones,
    norms and magnitudes 1, biases 0, and the rotary embedding its own."""
    transformer.to_empty(device=device)
    generator = generator_for("benchmark", seed, device=device)
    for name, parameter in sorted(transformer.named_parameters()):
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    config = transformer.config
    rope = type(transformer.rope)(
        config.attention_head_dim, config.patch_size, config.rope_max_seq_len
    )
    transformer.rope = rope.to(device)


def build(way: str, load: DiTLoad) -> WanTransformer3DModel:
    """Builds a DiT of random weights on the load's device, as the way trains it."""
    transformer = blank(load.size, load.layers, load.precision)
    add_adapters(transformer, way, load.rank, load.alpha)
    fill(transformer, load.device, load.seed)
    prepare(transformer, way, checkpointing=load.checkpointing, keep_attention=load.keep_attention)
    return transformer


def draw(shape: Shape, text_dim: int, device: str, seed: int) -> Batch:
    """Draws a batch of one clip, in float32."""
    generator = generator_for("benchmark", seed)
    latents = (1, 16, shape.latent_frames, shape.height // 8, shape.width // 8)
    sizes = (latents, (1, shape.prompt_length, text_dim), latents)
    x, context, target = (torch.randn(size, generator=generator).to(device) for size in sizes)
    return x, torch.tensor([500.0], device=device), context, target


def train_step(transformer: WanTransformer3DModel, batch: Batch, precision: str) -> Tensor:
    """Leaves gradients in the adapters and returns the velocity."""
    transformer.zero_grad()
    x, timestep, context, target = batch
    with torch.autocast(x.device.type, DTYPES[precision], enabled=precision != "float32"):
        velocity = dit.velocity(transformer, x, timestep, context)
    (velocity - target).square().mean().backward()
    return velocity.detach()


def check_ways(load: DiTLoad) -> dict[str, dict[str, Any]]:
    """Returns for each way and precision the relative errors of velocity and gradients against
    `stock` in float64 on a small DiT, and whether their rule holds; or why it failed.

    In float32 a way past TOLERANCE fails; in bfloat16 the errors stand beside those of `stock`.
    """
    shape = Shape(5, 64, 64, 24)
    results: dict[str, dict[str, Any]] = {way: {} for way in dict.fromkeys(["stock", *load.ways])}
    for precision in DTYPES:
        stock = blank("tiny", 2, precision)
        add_adapters(stock, "stock", 8, 8.0)
        fill(stock, "cpu", load.seed)
        batch = draw(shape, stock.config.text_dim, "cpu", load.seed)
        exact = copy.deepcopy(stock).double()
        reference = train_step(exact, tuple(x.double() for x in batch), "float32")
        gradients = gradients_of(exact)
        for way, found in results.items():
            if "error" in found:
                continue
            with failures_in(found, load.device):
                transformer = blank("tiny", 2, precision)
                add_adapters(transformer, way, 8, 8.0)
                fill(transformer, "cpu", load.seed)
                transformer.to(load.device)
                prepare(transformer, way, checkpointing=True, keep_attention=load.keep_attention)
                moved = tuple(x.to(load.device) for x in batch)
                velocity = train_step(transformer, moved, precision)
                errors = {
                    "velocity": difference(velocity, reference),
                    "gradient": difference(gradients_of(transformer), gradients),
                }
                found[precision] = errors | judged(errors, results["stock"], precision)
    torch._dynamo.reset()
    return results


def judged(
    errors: Mapping[str, float], stock: Mapping[str, Any], precision: str
) -> dict[str, bool]:
    """Returns whether errors hold in bfloat16. Raises DisagreementError for those that do not in
    float32."""
    if precision != "float32":
        beside = stock.get(precision, errors)
        return {"holds": all(errors[name] <= WORSE * beside[name] for name in errors)}
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise DisagreementError(
                f"the {name} differs from float64's by {error:.1e} (rule: {TOLERANCE:.0e}): it "
                "computes another step. Run the tests of models/."
            )
    return {"holds": True}


def gradients_of(transformer: WanTransformer3DModel) -> Tensor:
    """Returns the gradients of all adapters as one vector, sorted by name."""
    named = sorted(transformer.named_parameters())
    return torch.cat([p.grad.flatten().double().cpu() for _, p in named if p.grad is not None])


def difference(found: Tensor, reference: Tensor) -> float:
    found, reference = found.double().cpu(), reference.double().cpu()
    return ((found - reference).norm() / reference.norm()).item()


def time_shape(load: DiTLoad, size: Sequence[int], failed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns FLOPs and, for each way, the seconds of its steps, the first one's, and its memory,
    or why it failed.

    size: frames, height, width. failed: the results of check_ways; a way that failed there is not
    timed.
    """
    shape = Shape(*size, load.prompt_length)
    transformer = blank(load.size, load.layers, load.precision)
    blocks = len(transformer.blocks)
    results: dict[str, Any] = {
        "shape": list(size),
        "layers": blocks,
        "of_layers": transformer.config.num_layers,
        "needed": needed_flops(transformer.config, blocks, shape, load.rank),
        "ways": {way: {} for way in load.ways},
    }
    for way, found in results["ways"].items():
        if "error" in failed.get(way, {}):
            found["error"] = failed[way]["error"]
            continue
        with failures_in(found, load.device):
            time_way(way, load, shape, found)
        torch._dynamo.reset()
        release(load.device)
        counted: dict[str, Any] = found.setdefault("done", {})
        with failures_in(counted, load.device):
            counted |= count_way(way, load, shape)
    return results


def time_way(way: str, load: DiTLoad, shape: Shape, found: dict[str, Any]) -> None:
    transformer = build(way, load)
    batch = draw(shape, transformer.config.text_dim, load.device, load.seed)
    step = partial(train_step, transformer, batch, load.precision)
    found["warm_up"] = [timed(step, load.device) for _ in range(load.warmup)]
    transformer.zero_grad()
    with peak_beyond(found, load.device):
        found["seconds"] = [timed(step, load.device) for _ in range(load.repeats)]


def count_way(way: str, load: DiTLoad, shape: Shape) -> dict[str, int]:
    """Returns the FLOPs of a way's step by kind, with what it computes again."""

    def made(layers: int) -> WanTransformer3DModel:
        transformer = blank(load.size, layers, load.precision)
        add_adapters(transformer, way, load.rank, load.alpha)
        prepare(
            transformer,
            way.removesuffix("_compiled"),
            checkpointing=load.checkpointing,
            keep_attention=load.keep_attention,
        )
        return transformer

    def step(transformer: WanTransformer3DModel, text_dim: int) -> None:
        train_step(transformer, draw(shape, text_dim, "cpu", 0), load.precision)

    blocks = len(blank(load.size, load.layers, load.precision).blocks)
    return count_step(made, step, blocks)


def summarise(
    results: Mapping[str, Any], rates: Mapping[str, float] | None
) -> dict[str, dict[str, float]]:
    """Returns for every timed way its figures by name; with the measured rates of ceilings the
    shares of them, of the FLOPs that are needed."""
    needed, rows = results["needed"], {}
    name = "x".join(map(str, results["shape"]))
    for way, found in results["ways"].items():
        if "error" in found:
            continue
        seconds = statistics.median(found["seconds"])
        row = {"step, s": seconds, "quickest, s": min(found["seconds"])}
        row["first, s"] = found["warm_up"][0] if found["warm_up"] else row["quickest, s"]
        if results["layers"] < results["of_layers"]:
            row["all layers, s"] = seconds * results["of_layers"] / results["layers"]
        if "error" not in found["done"]:
            row["TFLOP done"] = sum(found["done"].values()) / 1e12
        if rates is not None:
            flops = {
                f"attention of {name}, forward": needed["attention"] / 3,
                f"attention of {name}, backward": needed["attention"] * 2 / 3,
                "matmul": needed["matmul"],
            }
            row["share of the ceilings"] = share_of(rates, flops, seconds)
            row["share of matrices' alone"] = sum(needed.values()) / seconds / rates["matmul"]
        if "peak_memory" in found:
            row["peak memory, GiB"] = (found["held_before"] + found["peak_memory"]) / 2**30
            row["beyond the weights, GiB"] = found["peak_memory"] / 2**30
        rows[way] = row
    return rows


def attention_shapes(load: DiTLoad) -> dict[str, tuple[int, int, int]]:
    """Returns heads, tokens and the width of a head for every shape, by its name."""
    config = blank_transformer(source_of(load.size), torch.float32).config
    return {
        "x".join(map(str, size)): (
            config.num_attention_heads,
            Shape(*size, load.prompt_length).tokens,
            config.attention_head_dim,
        )
        for size in load.shapes
    }
