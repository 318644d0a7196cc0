"""acetate benchmark [name=value ...]: the speed of a VAE-stage step and of reading clips.

`reader` is in benchmark_reader. `step`, a VAE-stage step timed as we run it and as released, is the
hard-rendered rgb and alpha through the frozen encoder, the merge block, two decoders, L1, and the
backward pass to what trains. `ours` is RGBAVAE. `released` is an RGBAVAE of the same weights whose
parts run the way Wan-Alpha's training code runs them: diffusers' own forward passes on chunks of
frames with feature caches, and LoRA as a second convolution path. No speed is printed unless both
give the same loss and gradients.
"""

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanEncoder3d
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from acetate.alpha import harden, over, palette_colors
from acetate.cli import run
from acetate.commands.benchmark_reader import ReaderLoad, benchmark_reader, rows_of
from acetate.models.adapters import MergedLoRA, trainable_state
from acetate.models.rgba_vae import RGBAVAE
from acetate.regions import check_clip_shape
from acetate.replacing import check_out, write_json

PARTS = ("step", "reader")
WAYS = ("ours", "released")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOSS_TOLERANCE = 1e-5  # relative, in fp32
GRADIENT_TOLERANCE = 1e-3  # of a tensor's largest gradient, in fp32


class DisagreementError(RuntimeError):
    """The two ways do not compute the same step, so their speeds cannot be compared."""


@dataclass(frozen=True)
class Workload:
    """The work and data of a step. Raises ValueError for settings that cannot run."""

    base_dim: int
    lora_rank: int
    lora_alpha: float
    frames: int
    height: int
    width: int
    batch_size: int
    device: str
    precision: str
    threads: int
    seed: int

    def __post_init__(self) -> None:
        at_least(
            1,
            base_dim=self.base_dim,
            lora_rank=self.lora_rank,
            batch_size=self.batch_size,
            threads=self.threads,
        )
        for name, known in (("precision", tuple(DTYPES)), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}; known: {', '.join(known)}.")
        check_clip_shape(self.frames, self.height, self.width, time_stride=4, space_stride=8)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch finds no CUDA device. Use device=cpu.")


def at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}; must be at least {least}.")


class FactoredLoRA(nn.Module):
    """Computes y = conv(x) + (alpha / rank) * B(A(x)); A has conv's kernel, stride and causal
    padding, B is 1x1."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, lora: MergedLoRA) -> None:
        super().__init__()
        self.conv, self.A, self.B, self.scale = conv, lora.A, lora.B, lora.scale

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Convolves x; cache_x holds the frames before it, which diffusers hands to a causal
        convolution."""
        conv, convolve = self.conv, F.conv3d if x.dim() == 5 else F.conv2d
        if isinstance(conv, WanCausalConv3d):  # padded once for both paths
            width, _, height, _, before, _ = map(int, conv._padding)
            if cache_x is not None and before:
                x, before = torch.cat([cache_x, x], 2), before - cache_x.shape[2]
            x = F.pad(x, (width, width, height, height, before, 0))
        low = convolve(x, self.A, None, conv.stride, conv.padding)
        pointwise = self.B.view(*self.B.shape, *[1] * (x.dim() - 2))
        return convolve(
            x, conv.weight, conv.bias, conv.stride, conv.padding
        ) + self.scale * convolve(low, pointwise)


def in_chunks(net: nn.Module, x: Tensor, size: int) -> Tensor:
    """Runs frame 0, then `size` frames at a time; the cache holds the last frames that each
    convolution has seen."""
    cache = defaultdict(lambda: None)
    first, *others = x.split([1] + [size] * ((x.shape[2] - 1) // size), 2)
    out = net(first, feat_cache=cache, feat_idx=[0])
    for chunk in others:
        out = torch.cat([out, net(chunk, feat_cache=cache, feat_idx=[0])], 2)
    return out


def run_as_released(vae: RGBAVAE) -> None:
    """Gives encoder, merge block and decoders the released forward passes."""
    encoder, time_stride = vae.encoder.net, vae.encoder.time_stride
    # no head
    encoder.norm_out, encoder.nonlinearity, encoder.conv_out = (
        nn.Identity(),
        nn.Identity(),
        nn.Identity(),
    )
    encoder.conv_out.forward = lambda x, cache_x: x
    vae.encoder.forward = lambda both, chunk: torch.cat(
        [in_chunks(encoder, x, time_stride) for x in both.chunk(2)]
    )
    # it has the layers of one without down blocks
    merge = WanEncoder3d(dim=1, dim_mult=[1], num_res_blocks=0)
    merge.conv_in, merge.mid_block = vae.merge.conv_in, vae.merge.blocks
    merge.norm_out, merge.conv_out = vae.merge.norm_out, vae.merge.conv_out
    vae.merge.forward = lambda *features: in_chunks(merge, torch.cat(features, 1), 1)
    for decoder in (vae.decoder_rgb, vae.decoder_alpha):
        for parent in list(decoder.net.modules()):
            for name, conv in parent.named_children():
                if parametrize.is_parametrized(conv, "weight"):
                    lora = conv.parametrizations.weight[0]
                    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
                    setattr(parent, name, FactoredLoRA(conv, lora))
        decoder.forward = lambda raw, chunk, of=decoder: in_chunks(
            of.net, of.post_quant_conv(raw), 1
        )
    vae.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def build(way: str, load: Workload) -> RGBAVAE:
    """Builds an RGBA-VAE of random fp32 weights, by the seed the same for both ways; LoRA's B is
    not zero."""
    torch.set_num_threads(load.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    torch.manual_seed(load.seed)
    base = AutoencoderKLWan(base_dim=load.base_dim)
    vae = RGBAVAE(
        vae=base, merge_init="scratch", lora_rank=load.lora_rank, lora_alpha=load.lora_alpha
    )
    for module in vae.modules():
        if isinstance(module, MergedLoRA):
            nn.init.normal_(module.B)
    if way == "released":
        run_as_released(vae)
    return vae.to(load.device)


def draw_clip(load: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """Draws rgb, alpha and background as noise, since a step takes as long on any clip."""
    generator = torch.Generator().manual_seed(load.seed)
    shape = (load.batch_size, 4, load.frames, load.height, load.width)
    rgb, alpha = (torch.rand(shape, generator=generator) * 2 - 1).split([3, 1], 1)
    background = palette_colors(torch.randint(8, (load.batch_size,), generator=generator))
    return rgb.to(load.device), alpha.clamp_min(0).to(load.device), background.to(load.device)


def freeze_in(vae: RGBAVAE, precision: str) -> RGBAVAE:
    for parameter in vae.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[precision])
    return vae


def step_loss(vae: RGBAVAE, clip: tuple[Tensor, Tensor, Tensor], precision: str) -> Tensor:
    rgb, alpha, background = clip
    with torch.autocast(rgb.device.type, DTYPES[precision], enabled=precision != "float32"):
        rgb_hat, alpha_hat = vae.decode(vae.encode(over(rgb, harden(alpha), background), alpha))
    return F.l1_loss(rgb_hat, rgb) + F.l1_loss(alpha_hat, alpha)


def check_agreement(vaes: list[RGBAVAE], clip: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Returns the largest differences of loss and gradients, in fp32. Raises DisagreementError past
    the tolerances."""
    losses, gradients = [], []
    for vae in vaes:
        losses.append(step_loss(vae, clip, "float32"))
        losses[-1].backward()
        gradients.append(
            {name: p.grad for name, p in trainable_state(vae).items() if p.grad is not None}
        )
        vae.zero_grad()
    loss = ((losses[0] - losses[1]).abs() / losses[0].abs()).item()
    # named otherwise, in the same order
    pairs = zip(gradients[0].items(), gradients[1].values(), strict=True)
    difference = {name: ((a - b).abs().max() / a.abs().max()).item() for (name, a), b in pairs}
    worst = max(difference, key=lambda name: difference[name])
    if not (
        loss <= LOSS_TOLERANCE and all(value <= GRADIENT_TOLERANCE for value in difference.values())
    ):
        raise DisagreementError(
            f"Loss differs by {loss:.1e} (rule: {LOSS_TOLERANCE:.0e}), the gradient of {worst} by "
            f"{difference[worst]:.1e} of its largest value (rule: {GRADIENT_TOLERANCE:.0e}): one "
            "way computes another step. Run the tests of models/."
        )
    return {
        "loss": loss,
        "gradient": difference[worst],
        "gradient_of": worst,
        "gradients": len(difference),
    }


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_parts(vae: RGBAVAE, device: str) -> dict[str, float]:
    """Returns seconds by part of the forward pass: hooks add to them from now on, and the caller
    clears them."""
    seconds: dict[str, float] = defaultdict(float)

    def add(part: str, sign: int) -> None:
        seconds[part] += sign * now(device)

    parts = (
        ("encode", vae.encoder),
        ("merge", vae.merge),
        ("decode", vae.decoder_rgb),
        ("decode", vae.decoder_alpha),
    )
    for part, module in parts:
        module.register_forward_pre_hook(lambda *_, part=part: add(part, -1))
        module.register_forward_hook(lambda *_, part=part: add(part, 1))
    return seconds


def peak_memory(way: str, load: Workload) -> int | None:
    """Returns the bytes that a step takes at its peak beyond what is held before it. It needs a
    process of its own."""
    vae, clip = freeze_in(build(way, load), load.precision), draw_clip(load)
    if load.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step_loss(vae, clip, load.precision).backward()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":  # no portable way to the resident set
        return None
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step_loss(vae, clip, load.precision).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def benchmark(load: Workload, warmup: int, repeats: int) -> dict[str, Any]:
    """Measures agreement, and for each way the seconds of every timed step and peak memory in
    bytes; reports progress on stderr."""
    at_least(0, warmup=warmup)
    at_least(1, repeats=repeats)
    clip, vaes = draw_clip(load), {way: build(way, load) for way in WAYS}
    results: dict[str, Any] = {way: {"seconds": []} for way in WAYS}
    with tqdm(desc="check", total=2 * (2 + warmup + repeats), unit="step") as progress:
        results["agreement"] = check_agreement(list(vaes.values()), clip)
        progress.update(2)
        parts = {
            way: time_parts(freeze_in(vae, load.precision), load.device)
            for way, vae in vaes.items()
        }
        for turn in range(-warmup, repeats):
            for way, vae in vaes.items():
                progress.set_description(f"{'warm up' if turn < 0 else 'time'} {way}")
                vae.zero_grad()
                parts[way].clear()
                start = now(load.device)
                loss = step_loss(vae, clip, load.precision)
                middle = now(load.device)
                loss.backward()
                end = now(load.device)
                if turn >= 0:
                    results[way]["seconds"].append(
                        {"step": end - start, **parts[way], "backward": end - middle}
                    )
                progress.update()
        for way in WAYS:
            progress.set_description(f"memory of {way}")
            # A spawned process would inherit this one's peak through exec; a fork server has none.
            with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
                results[way]["peak_memory"] = process.submit(peak_memory, way, load).result()
            progress.update()
    return results


def summarise(results: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the rows of the table, from a name to the figures of ours and of the released way."""
    rows = {}
    for part in results["ours"]["seconds"][0]:
        columns = [[seconds[part] for seconds in results[way]["seconds"]] for way in WAYS]
        rows[f"{part}, median, s"] = [statistics.median(column) for column in columns]
        if part == "step":
            rows["step, min, s"] = [min(column) for column in columns]
    if results["ours"]["peak_memory"] is not None:
        rows["peak memory beyond the weights, GiB"] = [
            results[way]["peak_memory"] / 2**30 for way in WAYS
        ]
    return rows


def main(config: DictConfig) -> None:
    if config.out is not None:
        check_out(Path(config.out))
    parts = config.parts
    if not OmegaConf.is_list(parts) or not parts or not set(parts) <= set(PARTS):
        raise ValueError(
            f"parts={parts}; a list of {', '.join(PARTS)}, one at least, as in parts=[step]"
        )
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    config.threads = config.threads or os.cpu_count()
    load = Workload(**{field.name: config[field.name] for field in fields(Workload)})
    reading = ReaderLoad(**config.reader)
    results: dict[str, Any] = {}
    if "step" in parts:
        results |= {"workload": asdict(load), **benchmark(load, config.warmup, config.repeats)}
        results["summary"] = summarise(results)
        print_step(results, load)
    if "reader" in parts:
        results["reader"] = {"workload": asdict(reading), **benchmark_reader(reading)}
        print_reader(results["reader"], reading)
    if config.out is not None:
        write_json(Path(config.out), results)


def print_step(results: dict[str, Any], load: Workload) -> None:
    agreement, console = results["agreement"], Console(width=120)
    table = Table("", *WAYS, "released / ours")
    for row, (ours, released) in results["summary"].items():
        table.add_row(row, f"{ours:.3f}", f"{released:.3f}", f"{released / ours:.2f}")
    console.print(
        f"torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if load.device == 'cuda' else 'CPU'}, {load}\nBoth ways "
        f"agree: loss to {agreement['loss']:.0e}, gradients to {agreement['gradient']:.0e} of a "
        "tensor's largest."
    )
    console.print(table)


def print_reader(results: dict[str, Any], load: ReaderLoad) -> None:
    console = Console(width=120)
    console.print(
        f"{load}; per core: of processor time. `datamodule` is one worker with transform and "
        "collation."
    )
    table = Table(
        "shard", "way", "clips/s/core", "frames/s/core", "clips/s by the clock", "time / plain"
    )
    for row in rows_of({kind: ways for kind, ways in results.items() if kind != "workload"}):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    run("benchmark")
