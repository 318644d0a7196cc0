"""What every setting of every program may be: one table, checked before a program does anything.

A rule is found by the longest end of PROGRAM.PATH.TO.SETTING that the table knows, so that a name
means the same thing everywhere, and an exception stands under a longer name.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from acetate.settings import (
    ENDLESS,
    Rule,
    SettingError,
    anything,
    either,
    flag,
    mapping,
    number,
    one_of,
    optional,
    place,
    rising,
    several,
    strides,
    text,
    whole,
    words,
)

CORES = os.cpu_count() or 1
PROCESSES = max(64, 4 * CORES)  # more would only take memory
SIDE = 16384  # pixels
FRAMES = 10_000
MOST = ENDLESS

auto = one_of("auto")
count = whole(1, MOST)
share = number(0, 1)
weight = number(0)
positive = number(above=0)
seed = whole(0, 2**32 - 1)
dtype = one_of("float32", "bfloat16", "float16")
places = Rule(
    "a folder or URL, a list of them, or a mapping {FOLDER: WEIGHT, ...}",
    either(place, several(place), mapping(place, weight)).holds,
)
run_name = Rule(
    "a name of letters, digits and . _ - that leads to no other folder, as in name=mine",
    lambda value: (
        isinstance(value, str)
        and len(value) <= 120
        and all(re.fullmatch(r"\w[\w.+=@ -]*", part) for part in value.split("/"))
    ),
)
metric = Rule(
    "a metric of the validation, such as val/loss",
    lambda value: isinstance(value, str) and value.startswith("val/") and len(value) > 4,
)
signals = several(Rule("a signal, such as SIGTERM", lambda value: str(value)[:3] == "SIG"), 0)

RULES: dict[str, Rule] = {
    # Runs
    "name": run_name,
    "seed": seed,
    "resume": optional(place),
    "init": optional(place),
    "objective": optional(metric),
    "rgba_vae": place,
    "dora": optional(place),
    "out": place,
    "device": Rule(
        "auto, cpu, cuda or cuda:0, cuda:1, ...",
        lambda value: bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value))),
    ),
    # Clips
    "frames": strides(4, 1, FRAMES),
    "height": whole(8, SIDE),
    "width": whole(8, SIDE),
    "area": whole(256, SIDE * SIDE),
    "fps": number(0.01, 1000),
    "batch_size": whole(1, 65536),
    "val_batch_size": whole(1, 65536),
    "val_clips": count,
    "num_workers": whole(0, PROCESSES),
    "bad_clip_budget": whole(0, MOST),
    "time_stride": whole(1, 64),
    "space_multiple": whole(1, 1024),
    "scale_range": rising(number(above=0, high=1)),
    "min_coverage": share,
    "flip": share,
    "pan_speed": weight,
    "cache_mb": whole(0, MOST),
    "resize": one_of("premultiplied", "straight"),
    "random_validation": flag,
    "shuffle_tars": count,
    "prompt_length": whole(1, 4096),
    "latents": places,
    "shards": places,
    "cache_dir": place,
    "cache_gb": positive,
    "retries": whole(0, 1000),
    "backoff": weight,
    "timeout": positive,
    "storage_options": anything,
    # The base
    "vae": place,
    "transformer": place,
    "text_encoder": place,
    "source": place,
    "save_to": place,
    "init_from": optional(place),
    "text_width": whole(4, 65536),
    "text_layers": whole(1, 1000),
    "vocabulary": whole(260, 10**7),
    "dtype": dtype,
    "frozen_dtype": dtype,
    # What trains
    "lora_rank": whole(1, 4096),
    "lora_alpha": positive,
    "merge_init": one_of("residual", "scratch"),
    "average_alpha": flag,
    "checkpointing": flag,
    "chunk": optional(whole(1, FRAMES)),
    "rank": whole(1, 4096),
    "alpha": positive,
    "trainable_dtype": one_of("float32", "bfloat16"),
    "mean_shift": number(-100, 100),
    "caption_dropout": share,
    "prompt_dropout": share,
    "timestep_weight": flag,
    "lr": positive,
    "warmup_steps": whole(0, MOST),
    "decay_steps": optional(count),
    "betas": several(number(0, below=1), 2, 2),
    "weight_decay": weight,
    "moment_weight": weight,
    "background_per": one_of("clip", "batch"),
    "lpips": flag,
    "cache": place,
    "prompt": text,
    # Losses
    "l1_weight": weight,
    "perceptual_weight": weight,
    "edge_weight": weight,
    "kl_weight": weight,
    "eps": number(0, below=1),
    "mode": one_of("off", "opaque", "bidirectional", "upstream"),
    "diffusion.weight": weight,
    "margin": weight,
    "diffusion.latents": one_of("normalised", "raw"),
    "imagenet_norm": flag,
    "weights": optional(place),
    "stages": whole(1, 10),
    # The trainer
    "max_steps": count,
    "max_epochs": whole(-1, MOST),
    "val_check_interval": count,
    "check_val_every_n_epoch": optional(count),
    "accumulate_grad_batches": whole(1, 65536),
    "log_every_n_steps": whole(1, MOST),
    "gradient_clip_val": optional(weight),
    "gradient_clip_algorithm": one_of("norm", "value"),
    "num_sanity_val_steps": whole(-1, MOST),
    "limit_val_batches": either(share, whole(0, MOST)),
    "limit_train_batches": either(share, whole(0, MOST)),
    "accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "devices": either(auto, whole(-1, 4096), several(whole(0, 4096)), place),
    "num_nodes": whole(1, 65536),
    "precision": one_of(
        "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "32", 32
    ),
    "use_distributed_sampler": flag,
    "enable_model_summary": flag,
    "enable_progress_bar": flag,
    "broadcast_buffers": flag,
    "find_unused_parameters": flag,
    "default_root_dir": place,
    # Callbacks
    "every_n_train_steps": optional(count),
    "every_n_steps": count,
    "every_n_validations": count,
    "save_top_k": whole(-1, MOST),
    "save_last": flag,
    "filename": words,
    "dirpath": place,
    "directory": optional(place),
    "auto_insert_metric_name": flag,
    "enable_version_counter": flag,
    "decay": number(0, below=1),
    "best": optional(metric),
    "best_mode": optional(one_of("min", "max")),
    "patience": whole(0, MOST),
    "panels.clips": count,
    "rows": whole(1, 64),
    "refresh_rate": count,
    "signals": signals,
    "requeue": signals,
    "samples.prompts": optional(several(text)),
    "negative_prompt": text,
    "length": whole(1, 4096),
    "adapters": either(place, several(place)),
    # Sampling
    "solver": one_of("unipc", "euler"),
    "solver.name": one_of("unipc", "euler"),
    "steps": whole(1, 1000),
    "guidance": number(0, 100),
    "shift": number(above=0, high=1000),
    "strength": number(-100, 100),
    "few_step.lora": optional(place),
    "centre": optional(several(number(-10, 10), 2, 2)),
    "end_centre": optional(several(number(-10, 10), 2, 2)),
    "axes": optional(several(number(above=0, high=100), 2, 2)),
    "end_axes": optional(several(number(above=0, high=100), 2, 2)),
    "angle": optional(number(-3600, 3600)),
    "end_angle": optional(number(-3600, 3600)),
    "guide.clip": optional(place),
    "guide.mask": optional(place),
    "offload": flag,
    "decode_chunk": optional(whole(1, FRAMES)),
    "count": whole(1, 100_000),
    "guided": flag,
    "formats": several(one_of("png", "webm", "prores", "webp", "apng", "pair", "preview")),
    "sample.settings": optional(place),
    "sample.out": optional(place),
    "overwrite": flag,
    "sample.prompt": optional(text),
    "sample.prompts": optional(place),
    "sample.rgba_vae": either(place, several(place)),
    "sample.steps": optional(whole(1, 1000)),
    "sample.guidance": optional(number(0, 100)),
    "sample.mean_shift": optional(number(-100, 100)),
    "follow.mean_shift": optional(number(-100, 100)),
    "follow.count": whole(3, 100_000),
    "follow.out": optional(place),
    # Export
    "checkpoint": place,
    "run": optional(place),
    "to": one_of("acetate", "wan-alpha", "comfyui", "diffusers"),
    "ema": optional(flag),
    "export.rgba_vae": optional(place),
    "decoder_only": flag,
    "dit": one_of("merged", "svd-lora", "dora"),
    "export.out": optional(place),
    # Questions before a run
    "estimate.out": optional(place),
    "cost.out": optional(place),
    "cost.gpus": several(whole(1, 1_000_000)),
    "cost.strategies": several(one_of("ddp", "fsdp")),
    "efficiency": number(above=0, high=1),
    "bandwidth_share": number(above=0, high=1),
    "overlap": share,
    "latency_us": weight,
    "least_scaling": share,
    "global_batch": optional(count),
    "cost.clips": count,
    "samples_per_clip": count,
    "prompt_tokens": count,
    "clip_mb": positive,
    "peak_tflops": positive,
    "fp32_tflops": positive,
    "memory_gib": positive,
    "gpus_per_node": count,
    "link_gb_s": positive,
    "node_gb_s": positive,
    "gpu.name": words,
    "benchmark.out": optional(place),
    "parts": several(one_of("step", "reader")),
    "benchmark.base_dim": whole(1, 1024),
    "benchmark.precision": one_of("float32", "bfloat16"),
    "threads": optional(whole(1, 4096)),
    "benchmark.warmup": whole(0, 1000),
    "repeats": whole(1, 100_000),
    "reader.clips": count,
    "size": whole(16, SIDE),
    # Data preparation
    "executor": one_of("local", "ray"),
    "workers": whole(0, PROCESSES),
    "preview": flag,
    "replace": flag,
    "long_prompts": one_of("error", "truncate"),
    "duplicates.colour": whole(0, 255),
    "max_clips": count,
    "max_mb": number(1, 1e6),
    "val_fraction": number(0, below=1),
    "ingest.workers": optional(whole(0, PROCESSES)),
    "detect_packed": flag,
    "max_pixels": whole(1, MOST),
    "max_frames": whole(1, 10**6),
    "memory_gb": number(above=0, high=1e5),
    "seconds": number(above=0, high=1e6),
    "megapixels_per_second": number(above=0, high=1e6),
    "colour": either(one_of("auto", "straight", "black", "white", "matte"), flag),
    "alpha_low": either(auto, whole(0, 255)),
    "alpha_high": either(auto, whole(0, 255)),
    "matte": one_of("auto", "normal", "empty", "full", "flickers"),
    "crop": either(auto, flag, words),
    "still": either(auto, flag),
    "cuts": either(auto, flag, words),
    "manifest": place,
    "min_alpha": whole(1, 255),
    "trim": flag,
    "empty": one_of("refuse", "keep"),
    "full": one_of("refuse", "keep"),
    "flickers": one_of("refuse", "keep"),
    "bleed": optional(whole(0, SIDE)),
    "max_side": optional(whole(1, SIDE)),
    "shard.fps": optional(number(0.01, 1000)),
    "default_fps": number(0.01, 1000),
    "clips": count,
    "synthesize.size": either(whole(8, SIDE), several(either(whole(8, SIDE), several(whole(8, SIDE), 2, 2)))),
    "rules": anything,
    "distance": whole(0, 128),
    "duplicates.keep": one_of("best", "first"),
    "scores": optional(place),
    "caption.prompts": optional(place),
    "captioner": optional(place),
    "caption.overwrite": one_of("missing", "all"),
    "missing": text,
    "template": words,
    "instruction": words,
    "pictures": whole(1, 1000),
    "images": one_of("several", "sheet"),
    "background": one_of("grey", "checkerboard"),
    "max_tokens": whole(1, 100_000),
    "inspect.out": optional(place),
    "sample": whole(1, 100_000),
    "inspect.frames": whole(1, 1000),
    "side": whole(16, 4096),
    "lengths": several(strides(4, 1, FRAMES)),
    "max_aspect": number(1, 100),
    "variants": whole(1, 8),
    "cache_latents.frames": several(strides(4, 1, FRAMES)),
    "cache_latents.space_multiple": optional(whole(1, 1024)),
    "sizes": optional(several(several(whole(8, SIDE), 2, 2))),
    "allow_empty_buckets": flag,
    "smallest": number(0.05, 1),
    "cache_latents.dtype": one_of("float16", "bfloat16"),
    "threshold": number(above=0, below=1),
    "aligned": flag,
    "raster": one_of("exact", "opencv"),
    "enlargements": whole(0, 1000),
    "per_tar": whole(1, 100_000),
    "gpus": weight,
}  # fmt: skip

MISSING = "???"
OURS = ("acetate", "lightning")  # whose settings the table knows
ABOUT_RUNS = ("estimate", "cost")  # which need no data, and ask about other machines than this one
UNCHECKED = {"paths", "logger", "hydra"}
# Settings whose value is taken to the letter, whatever signs it holds
LITERAL = {"prompt", "negative_prompt", "template", "instruction", "missing"}


def rule_of(program: str, path: str) -> Rule | None:
    """That of the longest end of PROGRAM.PATH in the table; None where there is none."""
    parts = [program, *path.split(".")]
    for start in range(len(parts)):
        rule = RULES.get(".".join(parts[start:]))
        if rule is not None:
            return rule
    return None


def settings_of(program: str, config: DictConfig, path: str = "") -> Iterator[tuple[str, Any, Rule | None]]:
    """Every setting that lies in `config`: its path, its value, its rule.

    Lists are one value, and so are mappings with a rule of their own. A reference is followed; one
    to a setting without a value is left out, as that setting comes itself. `???` is a value.
    """
    for name in map(str, config):
        at = f"{path}.{name}" if path else name
        if name.startswith("_") or at in UNCHECKED:
            continue
        rule = rule_of(program, at)
        if OmegaConf.is_missing(config, name):
            yield at, MISSING, rule
            continue
        try:
            value = config[name]
        except OmegaConfBaseException:
            continue
        if isinstance(value, DictConfig) and (rule is None or "_target_" in value):
            if str(value.get("_target_", "acetate")).split(".")[0] in OURS:  # others check their own
                yield from settings_of(program, value, at)
        else:
            yield at, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value, rule


def check_settings(program: str, config: DictConfig) -> None:
    """Raises SettingError for the first setting that breaks its rule or, where a program needs them
    all, has no value."""
    asks = program in ABOUT_RUNS
    for path, value, rule in settings_of(program, config):
        if rule is None:
            continue
        if value == MISSING:
            if asks:
                continue
            raise SettingError(path, value, f"{path} has no value: must be {rule.says}. Give {path}=...")
        rule.check(path, value)
    if not asks:
        _check_batch(config)


def _check_batch(config: DictConfig) -> None:
    """Raises SettingError for training clips that the memory of this machine cannot hold."""
    data = config.get("data")
    if not isinstance(data, DictConfig) or not {"frames", "height", "width"} <= set(data):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("batch_size", "val_batch_size"):
        clips = data.get(name) or 1
        size = 16 * clips * data.frames * data.height * data.width  # rgb and alpha, float32
        if size > memory:
            raise SettingError(
                f"data.{name}",
                clips,
                f"data.{name}={clips} clips of data.frames={data.frames}, data.height={data.height}, "
                f"data.width={data.width} take {size / 2**30:,.0f} GiB, and this machine has "
                f"{memory / 2**30:.0f}. Lower one of them.",
            )
