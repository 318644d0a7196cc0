"""A VAE-stage step timed as we run it and as released, for commands.benchmark.

A step is the hard-rendered rgb and alpha through the frozen encoder, the merge block, two decoders,
L1, and the backward pass to what trains. `ours` is RGBAVAE. `released` is an RGBAVAE of the same
weights whose parts run as benchmark_released says. No speed is printed unless both give the same
loss and gradients. Whole steps are timed first, without anything in between; parts and memory are
those of further steps.
"""

import multiprocessing
import resource
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from acetate.alpha import harden, over, palette_colors
from acetate.commands.benchmark_clock import (
    DTYPES,
    DisagreementError,
    failures_in,
    now,
    peak_beyond,
    release,
    set_up,
    share_of,
    timed,
)
from acetate.commands.benchmark_released import run_as_released
from acetate.memory import Flops, without_numbers
from acetate.models.adapters import MergedLoRA, trainable_state
from acetate.models.ops import fuse_norms
from acetate.models.rgba_vae import RGBAVAE
from acetate.regions import check_clip_shape

WAYS = ("ours", "released")
PARTS = ("encode", "merge", "decode", "backward")
PART_STEPS = {"cpu": 1, "cuda": 3}  # those of a card take no time
CHECKED = (9, 64, 64)  # the largest clip in float32: whole ones need twice a step's memory
LOSS_TOLERANCE = 1e-5  # relative, in fp32
GRADIENT_TOLERANCE = 1e-3  # of a tensor's largest gradient, in fp32
ClipTensors = tuple[Tensor, Tensor, Tensor]  # rgb, alpha, background


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
    checkpointing: bool  # of ours; the released way has none
    device: str
    precision: str
    cudnn_benchmark: bool
    threads: int
    seed: int
    compile: bool = False  # of ours
    fused_norm: bool = False  # of ours

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device}; known: cpu, cuda.")
        check_clip_shape(self.frames, self.height, self.width, time_stride=4, space_stride=8)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch finds no CUDA device. Use device=cpu.")


def new_vae(load: Workload, checkpointing: bool) -> RGBAVAE:
    return RGBAVAE(
        vae=AutoencoderKLWan(base_dim=load.base_dim),
        merge_init="scratch",
        lora_rank=load.lora_rank,
        lora_alpha=load.lora_alpha,
        checkpointing=checkpointing,
    )


def build(way: str, load: Workload) -> RGBAVAE:
    """Builds an RGBA-VAE of random fp32 weights, by the seed the same for both ways; LoRA's B is
    not zero."""
    set_up(load.threads, load.cudnn_benchmark)
    torch.manual_seed(load.seed)
    vae = new_vae(load, load.checkpointing)
    for module in vae.modules():
        if isinstance(module, MergedLoRA):
            nn.init.normal_(module.B)
    if way == "released":
        run_as_released(vae)
    elif load.fused_norm:
        fuse_norms(vae)
    return vae.to(load.device)


def draw_clip(load: Workload) -> ClipTensors:
    """Draws rgb, alpha and background as noise, since a step takes as long on any clip."""
    generator = torch.Generator().manual_seed(load.seed)
    shape = (load.batch_size, 4, load.frames, load.height, load.width)
    rgb, alpha = (torch.rand(shape, generator=generator) * 2 - 1).split([3, 1], 1)
    background = palette_colors(torch.randint(8, (load.batch_size,), generator=generator))
    return rgb.to(load.device), alpha.clamp_min(0).to(load.device), background.to(load.device)


def step_loss(vae: RGBAVAE, clip: ClipTensors, precision: str) -> Tensor:
    rgb, alpha, background = clip
    with torch.autocast(rgb.device.type, DTYPES[precision], enabled=precision != "float32"):
        rgb_hat, alpha_hat = vae.decode(vae.encode(over(rgb, harden(alpha), background), alpha))
    return F.l1_loss(rgb_hat, rgb) + F.l1_loss(alpha_hat, alpha)


def step(vae: RGBAVAE, clip: ClipTensors, precision: str) -> None:
    vae.zero_grad()
    step_loss(vae, clip, precision).backward()


def check_agreement(vaes: list[RGBAVAE], clip: ClipTensors) -> dict[str, Any]:
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


def watch(
    vae: RGBAVAE, read: Callable[[], Mapping[str, float]]
) -> tuple[dict[str, Counter[str]], list[Any]]:
    """Returns what each part of the forward pass adds to `read()` from now on, and the hooks."""
    found: dict[str, Counter[str]] = defaultdict(Counter)

    def before(part: str) -> None:
        found[part].subtract(read())

    def after(part: str) -> None:
        found[part].update(read())

    hooks = []
    for part, module in (
        ("encode", vae.encoder),
        ("merge", vae.merge),
        ("decode", vae.decoder_rgb),
        ("decode", vae.decoder_alpha),
    ):
        hooks.append(module.register_forward_pre_hook(lambda *_, part=part: before(part)))
        hooks.append(module.register_forward_hook(lambda *_, part=part: after(part)))
    return found, hooks


def time_parts(vae: RGBAVAE, clip: ClipTensors, load: Workload) -> dict[str, float]:
    """Returns the seconds of each part of one step, which waits for the device between them."""
    vae.zero_grad()
    found, hooks = watch(vae, lambda: {"seconds": now(load.device)})
    try:
        loss = step_loss(vae, clip, load.precision)
        start = now(load.device)
        loss.backward()
        found["backward"]["seconds"] = now(load.device) - start  # pyright: ignore
    finally:
        for hook in hooks:
            hook.remove()
    return {part: float(found[part]["seconds"]) for part in PARTS}


def count_flops(load: Workload) -> dict[str, dict[str, int]]:
    """Returns the FLOPs that a step of ours needs, by part and kind: without those that
    checkpointing does again. It runs the step on tensors without numbers."""
    with torch.device("meta"):
        vae = new_vae(load, checkpointing=False)
        vae.cast_frozen(load.precision)
    with FakeTensorMode(allow_non_fake_inputs=True), Flops() as flops:
        without_numbers(vae)
        shape = (load.batch_size, 4, load.frames, load.height, load.width)
        rgb, alpha = torch.empty(shape).split([3, 1], 1)
        found, _ = watch(vae, lambda: flops.kinds)
        loss = step_loss(vae, (rgb, alpha, rgb[:, :, :1, :1, :1]), load.precision)
        forward = Counter(flops.kinds)
        loss.backward()
        found["backward"] = flops.kinds - forward
    return {part: dict(found[part]) for part in PARTS}


def resident_peak(way: str, load: Workload) -> int | None:
    """Returns the bytes of main memory that a step on a CPU takes at its peak beyond what is held
    before it. It needs a process of its own."""
    if sys.platform != "linux":  # no portable way to the resident set
        return None
    vae, clip = build(way, load), draw_clip(load)
    vae.cast_frozen(load.precision)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step_loss(vae, clip, load.precision).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def time_step(load: Workload, warmup: int, repeats: int) -> dict[str, Any]:
    """Returns agreement, FLOPs, and for each way the seconds of every timed step, those of the
    parts of further steps and peak memory in bytes, or why it failed; reports progress on stderr.
    """
    results: dict[str, Any] = {way: {"seconds": [], "parts": []} for way in WAYS}
    vaes = {way: build(way, load) for way in WAYS}
    frames, height, width = (
        min(size, most)
        for size, most in zip((load.frames, load.height, load.width), CHECKED, strict=True)
    )
    torch.backends.cudnn.benchmark = False  # it would try every algorithm on clips of no use
    small = draw_clip(replace(load, frames=frames, height=height, width=width))
    results["agreement"] = check_agreement(list(vaes.values()), small)
    results["flops"] = count_flops(load)
    set_up(load.threads, load.cudnn_benchmark)
    clip = draw_clip(load)
    if load.compile:
        vaes["ours"].compile_halves()
    # On a CPU in turns, so that other work on the machine slows both; a card has no other work, and
    # a way there leaves its memory to the next
    rounds = [(way, turn) for turn in range(-warmup, repeats) for way in WAYS]
    if load.device == "cuda":
        rounds.sort(key=lambda one: WAYS.index(one[0]))
    with tqdm(total=len(rounds) + len(WAYS), unit="step") as progress:
        for way, turn in rounds:
            progress.set_description(f"{'warm up' if turn < 0 else 'time'} {way}")
            if load.device == "cuda" and turn == -warmup:
                release(load.device)
            if "error" not in results[way]:
                with failures_in(results[way], load.device):
                    vaes[way].cast_frozen(load.precision)
                    seconds = timed(partial(step, vaes[way], clip, load.precision), load.device)
                    if turn >= 0:
                        results[way]["seconds"].append(seconds)
            progress.update()
        for way, vae in vaes.items():
            progress.set_description(f"parts and memory of {way}")
            if "error" not in results[way]:
                with failures_in(results[way], load.device):
                    look_into(way, vae, clip, load, results[way])
            vae.zero_grad()
            progress.update()
    return results


def look_into(
    way: str, vae: RGBAVAE, clip: ClipTensors, load: Workload, results: dict[str, Any]
) -> None:
    """Notes the parts of further steps and the peak memory of a way."""
    vae.zero_grad()
    release(load.device)
    with peak_beyond(results, load.device):
        for _ in range(PART_STEPS[load.device]):
            results["parts"].append(time_parts(vae, clip, load))
            vae.zero_grad()
    if load.device == "cpu":
        # A spawned process would inherit this one's peak through exec; a fork server has none.
        with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
            results["peak_memory"] = process.submit(resident_peak, way, load).result()


def summarise(
    results: Mapping[str, Any], rates: Mapping[str, float] | None
) -> dict[str, dict[str, float]]:
    """Returns the rows of the table: the figures of each way by name; of ours its TFLOPs, and with
    the measured rates of ceilings the share of them."""
    rows: dict[str, dict[str, float]] = {}
    for way in WAYS:
        if "error" in results[way]:
            continue
        seconds = {"step": results[way]["seconds"]}
        seconds |= {part: [one[part] for one in results[way]["parts"]] for part in PARTS}
        for name, column in seconds.items():
            rows.setdefault(f"{name}, s", {})[way] = statistics.median(column)
        rows.setdefault("step, quickest, s", {})[way] = min(results[way]["seconds"])
        if results[way].get("peak_memory") is not None:
            row = rows.setdefault("peak memory beyond the weights, GiB", {})
            row[way] = results[way]["peak_memory"] / 2**30
    flops = results["flops"] | {"step": whole(results["flops"])}
    for part, kinds in flops.items():
        if (row := rows.get(f"{part}, s", {})) and "ours" in row:
            row["tflop"] = sum(kinds.values()) / 1e12
            if rates is not None:
                row["share"] = share_of(rates, at_rates(results["flops"], part), row["ours"])
    return rows


def whole(flops: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Returns the FLOPs of all parts together, by kind."""
    return dict(sum((Counter(kinds) for kinds in flops.values()), Counter()))


def at_rates(flops: Mapping[str, Mapping[str, int]], part: str) -> dict[str, int]:
    """Returns the FLOPs of a part, or of all with `step`, by the rate that holds for them:
    convolutions have one for each direction, and the VAE's small attention is products of matrices.
    """
    found: Counter[str] = Counter()
    for name in PARTS if part == "step" else (part,):
        direction = "backward" if name == "backward" else "forward"
        for kind, count in flops[name].items():
            found[f"conv {direction}" if kind == "conv" else "matmul"] += count
    return dict(found)
