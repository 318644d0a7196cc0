"""python -m acetate.commands.benchmark [name=value ...]: a VAE-stage step timed as we run it and as released.

A step is the hard-rendered rgb and alpha through the frozen encoder, the merge block, two decoders, L1, and the
backward pass to what trains. `ours` is RGBAVAE: the whole clip at once, LoRA merged into the weight. `released`
is an RGBAVAE with the same weights, its encoder and decoders run the way Wan-Alpha's training code runs them:
diffusers' own forward passes on chunks of frames with feature caches, and LoRA as a second convolution path. All
else is shared, also the batch of two that rgb and alpha are encoded in. Without agreement no speed is printed.
"""

import copy
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from acetate.alpha import harden, over, palette_colors
from acetate.models.adapters import MergedLoRA, trainable_state
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.wan import WanDecoder, WanEncoder
from acetate.regions import check_clip_shape

CONF = str(Path(__file__).parents[3] / "conf")
WAYS = ("ours", "released")
PARTS = ("encode", "merge", "decode", "backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOSS_TOLERANCE = 1e-5  # relative, both ways in fp32
GRADIENT_TOLERANCE = 1e-3  # of a tensor's largest gradient, both ways in fp32


class DisagreementError(RuntimeError):
    """The two ways do not compute the same step, so that their speeds cannot be compared."""


@dataclass(frozen=True)
class Workload:
    """What a step computes and on what. Raises ValueError for what cannot run."""

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
        for name in ("base_dim", "lora_rank", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; must be at least 1.")
        if self.precision not in DTYPES:
            raise ValueError(f"precision {self.precision!r}; known: {', '.join(DTYPES)}.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r}; known: auto, cpu, cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch finds no CUDA device. Use device=cpu.")


class Clip(NamedTuple):
    rgb: Tensor  # (B, 3, T, H, W) in [-1, 1]
    alpha: Tensor  # (B, 1, T, H, W) in [0, 1]
    background: Tensor  # (B, 3, 1, 1, 1)


class FactoredLoRA(nn.Module):
    """y = conv(x) + (alpha / rank) * B(A(x)); A has conv's kernel, stride and causal padding, B is 1x1."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, lora: MergedLoRA) -> None:
        super().__init__()
        self.scale, self.conv = lora.scale, conv
        self.A = copy.deepcopy(conv)
        self.A.weight, self.A.bias = lora.A, None
        pointwise = nn.Conv3d if isinstance(conv, nn.Conv3d) else nn.Conv2d
        self.B = pointwise(lora.B.shape[1], lora.B.shape[0], 1, bias=False)
        self.B.weight = nn.Parameter(lora.B.detach().reshape(self.B.weight.shape))

    def forward(self, x: Tensor, *cache_x: Tensor | None) -> Tensor:
        """cache_x: the earlier frames that diffusers hands to a causal convolution."""
        return self.conv(x, *cache_x) + self.scale * self.B(self.A(x, *cache_x))


class NoConv(nn.Module):
    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        return x


class ChunkedEncoder(nn.Module):
    """AutoencoderKLWan._encode without the head: frame 0, then time_stride frames at a time."""

    def __init__(self, encoder: WanEncoder) -> None:
        super().__init__()
        self.net, self.time_stride = encoder.net, encoder.time_stride
        self.net.norm_out, self.net.nonlinearity, self.net.conv_out = nn.Identity(), nn.Identity(), NoConv()

    def forward(self, video: Tensor, chunk: int | None = None) -> Tensor:
        cache = defaultdict(lambda: None)
        sizes = [1] + [self.time_stride] * (video.shape[2] // self.time_stride)
        return torch.cat([self.net(x, feat_cache=cache, feat_idx=[0]) for x in video.split(sizes, 2)], 2)


class ChunkedDecoder(nn.Module):
    """AutoencoderKLWan._decode without the clamp, one latent frame at a time, with factored LoRA."""

    def __init__(self, decoder: WanDecoder) -> None:
        super().__init__()
        self.post_quant_conv, self.net = decoder.post_quant_conv, decoder.net
        for parent in list(self.net.modules()):
            for name, conv in parent.named_children():
                if parametrize.is_parametrized(conv, "weight"):
                    lora = conv.parametrizations.weight[0]
                    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
                    setattr(parent, name, FactoredLoRA(conv, lora))

    def forward(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        cache = defaultdict(lambda: None)
        frames = self.post_quant_conv(latents).split(1, 2)
        return torch.cat([self.net(x, feat_cache=cache, feat_idx=[0]) for x in frames], 2)


def build(way: str, load: Workload) -> RGBAVAE:
    """Random weights from the seed, the same for both ways, in fp32; LoRA's B is not zero."""
    torch.manual_seed(load.seed)
    vae = RGBAVAE(
        vae=AutoencoderKLWan(base_dim=load.base_dim),
        merge_init="scratch",
        lora_rank=load.lora_rank,
        lora_alpha=load.lora_alpha,
    )
    for module in vae.modules():
        if isinstance(module, MergedLoRA):
            nn.init.normal_(module.B)
    if way == "released":
        vae.encoder = ChunkedEncoder(vae.encoder)
        vae.decoder_rgb, vae.decoder_alpha = ChunkedDecoder(vae.decoder_rgb), ChunkedDecoder(vae.decoder_alpha)
        vae.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    return vae.to(load.device)


def draw_clip(vae: RGBAVAE, load: Workload) -> Clip:
    """Noise: a step takes as long on any clip."""
    check_clip_shape(load.frames, load.height, load.width, vae.geometry.time_stride, vae.geometry.space_stride)
    generator = torch.Generator().manual_seed(load.seed)
    shape = (load.batch_size, 4, load.frames, load.height, load.width)
    rgb, alpha = (torch.rand(shape, generator=generator) * 2 - 1).to(load.device).split([3, 1], 1)
    colors = torch.randint(8, (load.batch_size,), generator=generator)
    return Clip(rgb, alpha.clamp_min(0), palette_colors(colors).to(load.device))


def freeze_in(vae: RGBAVAE, dtype: torch.dtype) -> None:
    for parameter in vae.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def step_loss(vae: RGBAVAE, clip: Clip, precision: str) -> Tensor:
    with torch.autocast(clip.rgb.device.type, DTYPES[precision], enabled=precision != "float32"):
        raw = vae.encode(over(clip.rgb, harden(clip.alpha), clip.background), clip.alpha)
        rgb_hat, alpha_hat = vae.decode(raw)
    return F.l1_loss(rgb_hat, clip.rgb) + F.l1_loss(alpha_hat, clip.alpha)


def check_agreement(ours: RGBAVAE, released: RGBAVAE, clip: Clip) -> dict[str, Any]:
    """Largest differences of loss and gradients in fp32. Raises DisagreementError past the tolerances."""
    losses = []
    for vae in (ours, released):
        vae.zero_grad()
        losses.append(step_loss(vae, clip, "float32"))
        losses[-1].backward()
    loss = (losses[0] - losses[1]).abs().item() / losses[0].abs().item()
    gradients = {}
    theirs = trainable_state(released).values()  # in the same order, B with the axes of a 1x1 kernel
    for (name, a), b in zip(trainable_state(ours).items(), theirs, strict=True):
        if a.grad is None and b.grad is None:  # one frame: nothing goes through the time convolutions
            continue
        x, y = (torch.zeros_like(a) if p.grad is None else p.grad.view_as(a) for p in (a, b))
        gradients[name] = ((x - y).abs().max() / x.abs().max()).item()
    worst = max(gradients, key=lambda name: gradients[name])
    if not (loss <= LOSS_TOLERANCE and all(value <= GRADIENT_TOLERANCE for value in gradients.values())):
        raise DisagreementError(
            f"The two ways differ: loss by {loss:.1e} (rule: {LOSS_TOLERANCE:.0e}), the gradient of {worst} by "
            f"{gradients[worst]:.1e} of its largest value (rule: {GRADIENT_TOLERANCE:.0e}). Their speeds are not "
            "compared. Run the tests of models/: one way computes something else."
        )
    return {"loss": loss, "gradient": gradients[worst], "gradient_of": worst, "tensors": len(gradients)}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_parts(vae: RGBAVAE, device: str) -> dict[str, float]:
    """Seconds by part of the forward pass, which hooks add to from now on; for the caller to clear."""
    seconds: dict[str, float] = defaultdict(float)

    def add(part: str, sign: int) -> None:
        seconds[part] += sign * now(device)

    modules = {"encode": [vae.encoder], "merge": [vae.merge], "decode": [vae.decoder_rgb, vae.decoder_alpha]}
    for part, module in ((part, module) for part, of_part in modules.items() for module in of_part):
        module.register_forward_pre_hook(lambda *_, part=part: add(part, -1))
        module.register_forward_hook(lambda *_, part=part: add(part, 1))
    return seconds


def timed_step(vae: RGBAVAE, clip: Clip, load: Workload, parts: dict[str, float]) -> dict[str, float]:
    vae.zero_grad()
    parts.clear()
    start = now(load.device)
    loss = step_loss(vae, clip, load.precision)
    forward_end = now(load.device)
    loss.backward()
    end = now(load.device)
    return {"step": end - start, **parts, "backward": end - forward_end}


def set_up(load: Workload) -> None:
    torch.set_num_threads(load.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32


def peak_memory(way: str, load: Workload) -> int | None:
    """Bytes that a step takes at its peak beyond what is held before it. For a process of its own."""
    set_up(load)
    vae = build(way, load)
    clip = draw_clip(vae, load)
    freeze_in(vae, DTYPES[load.precision])
    if load.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    else:
        return None  # no portable way to the resident set
    step_loss(vae, clip, load.precision).backward()
    if load.device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def benchmark(load: Workload, warmup: int, repeats: int) -> dict[str, Any]:
    """Agreement, and per way all timings, their minimum and median, and peak memory; progress on stderr."""
    for name, value, least in (("warmup", warmup, 0), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"{name}={value}; must be at least {least}.")
    set_up(load)
    results: dict[str, Any] = {}
    with tqdm(total=2 * (2 + warmup + repeats), unit="step") as progress:
        progress.set_description("check agreement")
        vaes = {way: build(way, load) for way in WAYS}
        clip = draw_clip(vaes["ours"], load)
        results["agreement"] = check_agreement(vaes["ours"], vaes["released"], clip)
        progress.update(2)
        for vae in vaes.values():
            freeze_in(vae, DTYPES[load.precision])
        parts = {way: time_parts(vae, load.device) for way, vae in vaes.items()}
        timings: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(-warmup, repeats):
            for way in WAYS:
                progress.set_description(f"{'warm up' if turn < 0 else 'time'} {way}")
                seconds = timed_step(vaes[way], clip, load, parts[way])
                if turn >= 0:
                    timings[way].append(seconds)
                progress.update()
        del vaes
        for way in WAYS:
            progress.set_description(f"memory of {way}")
            columns = {part: [seconds[part] for seconds in timings[way]] for part in timings[way][0]}
            results[way] = {
                "seconds": columns,
                "min": {part: min(values) for part, values in columns.items()},
                "median": {part: statistics.median(values) for part, values in columns.items()},
            }
            # A spawned process would inherit this one's peak through exec; a fork server is small.
            with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
                results[way]["peak_memory"] = process.submit(peak_memory, way, load).result()
            progress.update()
    return results


def table(results: dict[str, Any]) -> Table:
    view = Table("", *WAYS, "released / ours")

    def row(name: str, ours: float, released: float, unit: str, last: bool = False) -> None:
        view.add_row(name, f"{ours:.3f} {unit}", f"{released:.3f} {unit}", f"{released / ours:.2f}", end_section=last)

    ours, released = (results[way] for way in WAYS)
    row("step, median", ours["median"]["step"], released["median"]["step"], "s")
    row("step, min", ours["min"]["step"], released["min"]["step"], "s", last=True)
    for part in ("encode", "merge", "decode", "backward"):
        row(f"{part}, median", ours["median"][part], released["median"][part], "s", last=part == "backward")
    if ours["peak_memory"] is not None:
        row("peak memory beyond the weights", ours["peak_memory"] / 2**30, released["peak_memory"] / 2**30, "GiB")
    return view


@hydra.main(version_base=None, config_path=CONF, config_name="command/benchmark")
def main(config: DictConfig) -> None:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    load = Workload(
        base_dim=config.base_dim,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        frames=config.frames,
        height=config.height,
        width=config.width,
        batch_size=config.batch_size,
        device=auto if config.device == "auto" else config.device,
        precision=config.precision,
        threads=config.threads or os.cpu_count() or 1,
        seed=config.seed,
    )
    out = None if config.out is None else Path(config.out)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of work
    results = benchmark(load, config.warmup, config.repeats)
    agreement = results["agreement"]
    console = Console(width=120)
    processor = torch.cuda.get_device_name() if load.device == "cuda" else f"{load.threads} CPU threads"
    console.print(
        f"{load.batch_size} clip(s) of {load.frames}x{load.height}x{load.width}, base_dim {load.base_dim}, LoRA rank "
        f"{load.lora_rank}, {load.precision}, {processor}, torch {torch.__version__}. Both ways agree: loss to "
        f"{agreement['loss']:.1e}, {agreement['tensors']} gradients to {agreement['gradient']:.1e} of their largest value."
    )
    console.print(table(results))
    if out is not None:
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps({"workload": asdict(load), **results}, indent=2))
        temporary.replace(out)


if __name__ == "__main__":
    main()
