"""python -m acetate.commands.sample prompt="..." [name=value ...]: text to RGBA clips in the formats editors open."""

import json
import os
import platform
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from acetate import regions
from acetate.callbacks.samples import contact_sheet, save_picture
from acetate.commands import device_of
from acetate.commands.program import program
from acetate.commands.recorded import (
    as_trained,
    metadata,
    preset_of,
    quoted,
    run_of,
    value_of,
    without,
)
from acetate.commands.runs import new_folder
from acetate.data.transforms import covering_box, crop, resize, to_float, window
from acetate.formats.few_step import merge_few_step
from acetate.formats.gauss_mask import read_gauss_mask
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.formats.wan_alpha import dora_from_wan_alpha
from acetate.models.adapters import load_trainable, read_adapters
from acetate.models.dit import add_dora, merge_dora
from acetate.models.loading import load_transformer, transformer_sha256
from acetate.models.rgba_vae import RGBADecoders
from acetate.models.text import TextEncoder
from acetate.models.wan import Geometry
from acetate.models.weights import read_weights
from acetate.replacing import write_json
from acetate.sampling import EllipsePath, Solver, check_size, decode, initial_noise, sample_latents
from acetate.video_io import read_rgba
from acetate.video_out import SUFFIXES, check_formats, write_clip

ON_SHEET = 8  # clips
OF_THE_CALL = ("prompts", "count", "batch_size", "offload", "device", "out", "overwrite", "settings", "paths")
SIZE = {
    name: (f"callbacks.samples.{name}", f"wan.{name}") for name in ("frames", "height", "width", "fps")
}  # of a run's clips, in its config
HALF_AXIS = 0.61  # of a Gaussian, at the ends of its half axes
# What the released t2v.safetensors was trained with; the file itself does not say
RELEASED = {"mean_shift": 0.05, "ellipse": {"threshold": 0.1, "raster": "opencv", "enlargements": 10}}


def load_dit(config: DictConfig, device: str) -> tuple[WanTransformer3DModel, dict[str, Any]]:
    """The DiT with DoRA, then the few-step LoRA, merged into its weights; and what the DoRA file says of itself."""
    transformer = load_transformer(config.wan.transformer, getattr(torch, config.wan.dtype))
    facts: dict[str, Any] = {}
    if config.dora is not None:
        facts = put_dora(transformer, config.dora)
    if config.few_step.lora is not None:
        path = Path(config.few_step.lora).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"few_step.lora={path} does not exist. Give a file, or a folder of its shards.")
        merge_few_step(transformer, read_weights(path), config.few_step.strength, str(path))
    return transformer.to(device), facts


def put_dora(transformer: WanTransformer3DModel, source: str) -> dict[str, Any]:
    """Merges adapters of experiment=dit_dora, or of the released t2v.safetensors (alpha = rank, no metadata)."""
    path = Path(source).expanduser()
    if path.is_file() and released(state := read_weights(path)):
        adapters, facts = dora_from_wan_alpha(state, str(path)), dict(RELEASED)
        rank = alpha = next(value.shape[0] for name, value in adapters.items() if ".lora_A." in name)
    else:
        path, state, facts = read_adapters(source, kind="dit_dora")
        adapters = {name.removeprefix("transformer."): value for name, value in state.items()}
        rank, alpha = facts["rank"], facts["alpha"]
        found = transformer_sha256(transformer)
        if found != facts["transformer_sha256"]:
            raise ValueError(
                f"{path} was trained on another DiT ({facts['base']}). {wan_for(facts)}, or the files as "
                "wan.transformer=."
            )
    add_dora(transformer, rank, alpha)
    load_trainable(transformer, adapters, str(path))
    merge_dora(transformer)
    return facts | {"file": str(path)}


def wan_for(facts: Mapping[str, Any]) -> str:
    """The way out where adapters meet another base than theirs."""
    preset = preset_of(str(facts["base"]))
    return "Choose the wan= it was trained with" + (f", by its name wan={preset}" if preset else "")


def released(state: dict[str, Tensor]) -> bool:
    return any(re.search(r"(self|cross)_attn\.[qkvo]\.lora_A", name) for name in state)


def check_models(facts: dict[str, Any], vae: RGBADecoders, text_sha256: str) -> None:
    """Raises ValueError for a VAE or a text encoder that the DoRA was not trained with; warns where no file tells."""
    for name, found, way_out in (
        ("vae_sha256", vae.latents_sha256(), "Give the rgba_vae= that its latents were cached with."),
        ("text_encoder_sha256", text_sha256, "Choose the wan= that its latents were cached with."),
    ):
        if found is None and name in facts:
            warnings.warn(
                f"rgba_vae holds decoders only, which do not say whether they are of the VAE ({facts[name][:12]}) that "
                "this DoRA was trained with.",
                stacklevel=2,
            )
        elif facts.get(name, found) != found:
            raise ValueError(f"The DoRA's {name} is {facts[name][:12]}, this one's {found[:12]}. {way_out}")


def guide_mask(config: DictConfig, geometry: Geometry, threshold: dict[str, Any]) -> Tensor | None:
    """G (1, 1, F, h, w) in [0, 1] from the guide settings: a mask file, an alpha clip, an ellipse, or none."""
    return guide_of(config, geometry, threshold)[0]


def guide_of(config: DictConfig, geometry: Geometry, threshold: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """G as of `guide_mask`, and its ellipses (1, F, 5), of a mask file those around its inner part."""
    grid = geometry.latent_shape(config.frames, config.height, config.width)[1:]
    if config.guide.mask is not None:
        if others := [name for name, value in config.guide.items() if value is not None and name != "mask"]:
            raise ValueError(f"guide.mask and guide.{others[0]} are both given; G comes from one of them.")
        mask = read_gauss_mask(Path(config.guide.mask).expanduser(), grid)
        return mask, regions.fit_ellipses((mask > HALF_AXIS).float(), 1, 1)
    ellipses = guide_ellipses(config, geometry, threshold)
    return None if ellipses is None else regions.gaussian(ellipses, *grid[1:]), ellipses


def guide_ellipses(config: DictConfig, geometry: Geometry, threshold: dict[str, Any]) -> Tensor | None:
    """(1, F, 5) from an alpha clip or an ellipse of the guide settings, or none."""
    guide = config.guide
    drawn = [
        name for name in ("centre", "axes", "angle", "end_centre", "end_axes", "end_angle") if guide[name] is not None
    ]
    if guide.clip is not None and drawn:
        raise ValueError(f"guide.clip and guide.{drawn[0]} are both given; the ellipse comes from one of them.")
    _, frames, height, width = geometry.latent_shape(config.frames, config.height, config.width)
    if guide.clip is not None:
        clip = torch.from_numpy(read_rgba(Path(guide.clip)).frames)
        clip = clip[window(len(clip), config.frames, 0)]
        box = covering_box(*clip.shape[1:3], config.height, config.width)
        _, alpha = resize(*to_float(crop(clip, *box)), config.height, config.width)
        return regions.fit_ellipses(alpha[None], geometry.time_stride, geometry.space_stride, **threshold)
    if not drawn:
        return None
    given = {name: value for name, value in OmegaConf.to_container(guide).items() if value is not None}  # type: ignore
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return EllipsePath(**given).ellipses(frames, height, width)


def check_settings(config: DictConfig) -> None:
    """What shows before anything is loaded. Raises ValueError and FileNotFoundError."""
    check_formats(config.formats)
    if not config.formats:
        raise ValueError("formats=[]: no file would be written. Name some of formats=[png,webm,preview].")
    for name, value in config.guide.items():
        pair = str(name).removeprefix("end_") in ("centre", "axes")
        if pair and value is not None and (isinstance(value, str | int | float) or len(value) != 2):
            what = "shares of width and height" if "centre" in str(name) else "lengths, shares of the shorter side"
            raise ValueError(f"guide.{name}={value}; needed: two numbers, {what}. Example: guide.{name}=[0.5,0.5]")
    for name in ("mask", "clip"):
        if config.guide[name] is not None and not Path(config.guide[name]).expanduser().exists():
            raise FileNotFoundError(f"guide.{name}={config.guide[name]} does not exist. Give a file, or leave it out.")
    if config.out is not None:
        out = Path(config.out).expanduser()
        file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
        if file is not None:
            raise ValueError(f"out={config.out}: {file} is a file. Give a folder, which need not exist.")


def read_prompts(config: DictConfig) -> list[str]:
    if (config.prompt is None) == (config.prompts is None):
        raise ValueError('Give either prompt="..." or prompts=FILE with one prompt per line.')
    if config.prompt is not None:
        return [mended(str(config.prompt))]
    path = Path(config.prompts).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"prompts={path} does not exist; it is a text file with one prompt per line.")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={path} is not UTF-8 ({error}). Save it as UTF-8 text.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path} is empty; it is a text file with one prompt per line.")
    return prompts


def mended(text: str) -> str:
    """Bytes of a command line that are no text, which no file could hold, become question marks."""
    return text.encode(errors="replace").decode()


def solver_of(config: DictConfig) -> Solver:
    """A few-step LoRA means 4 steps without guidance, unless they are given."""
    few = config.few_step.lora is not None
    steps, guidance = (4, 1.0) if few else (50, 5.0)
    return Solver(
        name=config.solver,
        steps=steps if config.steps is None else config.steps,
        guidance=guidance if config.guidance is None else config.guidance,
        shift=config.shift,
    )


def file_name(number: int, prompt: str, seed: int) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-")
    return f"{number:03d}-{words or 'empty'}-seed{seed}"


def embed(config: DictConfig, prompts: Sequence[str], device: str) -> tuple[Tensor, Tensor, str]:
    """Context of all prompts but the last, that of the last, and the encoder's hash; the encoder is gone after it."""
    text = TextEncoder(config.wan.text_encoder, config.wan.prompt_length, device)
    context = text.context(prompts, truncate=True)
    return context[:-1], context[-1:].to(device), text.sha256()


def batches(jobs: Sequence[tuple[int, str, int]], size: int) -> list[Sequence[tuple[int, str, int]]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def targets(jobs: Sequence[tuple[int, str, int]], formats: Sequence[str]) -> list[str]:
    """Names of all files and folders that the clips are written to."""
    suffixes = [".json", *(suffix for name in formats for suffix in SUFFIXES[name])]
    return [f"{file_name(*job)}{suffix}" for job in jobs for suffix in suffixes]


def check_new(out: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raises FileExistsError that says what of another call is there, and what was set otherwise in it."""
    found = next((out / name for name in names if (out / name).exists()), None)
    if found is None:
        return
    try:
        before = json.loads(next(out / name for name in names if name.endswith(".json")).read_text())
        changed = [f"{name} {before[name]}, now {settings[name]}" for name in sorted(before.keys() & settings.keys())
                   if name not in ("prompt", "seed", "mean_shift") and before[name] != settings[name]]  # fmt: skip
    except (OSError, ValueError, AttributeError):
        changed = []
    why = f", made with {'; '.join(changed)[:300]}" if changed else ""
    raise FileExistsError(
        f"{found} exists{why}. Nothing is overwritten unasked: give another out= or seed=, leave out= away "
        "for a new folder, or overwrite=true."
    )


def folder_for(config: DictConfig) -> Path:
    """out=, or a folder of this call alone."""
    if config.out is not None:
        return Path(config.out).expanduser()
    return new_folder(Path("samples") / time.strftime("%Y-%m-%d_%H-%M-%S"))


def origin(source: Any, kind: str) -> dict[str, Any]:
    """File, run and step of weights, as far as they say."""
    try:
        file = read_adapters(source, kind)[0] if isinstance(source, str) else None
    except (FileNotFoundError, ValueError):  # released files, which were read as what they are
        file = None
    if file is None:
        return {"file": source}
    run, facts = run_of(str(file)), metadata(file)
    return {"file": str(file), "run": None if run is None else str(run), "step": facts.get("step"),
            "averaged": facts.get("averaged")}  # fmt: skip


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("acetate", "torch", "diffusers")}


def settings_first(given: Sequence[str]) -> list[str]:
    """What `settings=CLIP.json` holds, then what the run of `dora=`, or of `rgba_vae=`, recorded."""
    first: list[str] = []
    file = value_of(given, "settings")
    if file not in (None, "null"):
        first = [f"{name}={quoted(value)}" for name, value in read_settings(Path(str(file)).expanduser()).items()]
        first = without(first, given)
        given = [*first, *given]
    dora, vae = value_of(given, "dora"), value_of(given, "rgba_vae")
    if dora is None:
        dora = f"{outputs_of(given)}/demo_dit"
    if dora != "null":
        return [*as_trained(dora, "dora", given, {"rgba_vae": ("rgba_vae",), **SIZE}), *first]
    if vae is not None and not vae.startswith("["):
        return [*as_trained(vae, "rgba_vae", given, {}), *first]
    return first


def outputs_of(given: Sequence[str]) -> str:
    """`paths.outputs`, before it is composed."""
    return value_of(given, "paths.outputs") or f"{os.environ.get('ACETATE_ROOT', '.')}/outputs"


def read_settings(path: Path) -> dict[str, Any]:
    """Of the clip that this JSON stands beside. Raises FileNotFoundError and ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"settings={path} does not exist; it is the .json beside a sampled clip.")
    try:
        held = json.loads(path.read_text())
        settings = {name: value for name, value in held.items() if name != "made_with"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"settings={path} is no JSON of a sampled clip ({error}). Give another one.") from error
    if not {"prompt", "seed", "frames", "height", "width", "steps"} <= settings.keys():
        raise ValueError(f"settings={path} has no prompt, seed, frames, ...: it is not the JSON of a sampled clip.")
    return settings


@program("command/sample", settings_first)
def main(config: DictConfig) -> None:
    check_settings(config)
    prompts, solver = read_prompts(config), solver_of(config)
    jobs = [
        (n // config.count, prompts[n // config.count], config.seed + n) for n in range(len(prompts) * config.count)
    ]
    settings = {
        **{name: value for name, value in OmegaConf.to_container(config, resolve=True).items()  # type: ignore
           if name not in OF_THE_CALL},
        "solver": solver.name, "steps": solver.steps, "guidance": solver.guidance, "shift": solver.shift,
    }  # fmt: skip
    if config.out is not None and not config.overwrite:
        check_new(Path(config.out).expanduser(), targets(jobs, config.formats), settings)
    device = device_of(config)
    adapters = config.rgba_vae if isinstance(config.rgba_vae, str) else list(config.rgba_vae)
    vae = load_rgba_vae(vae=config.wan.vae, adapters=adapters, chunk=config.decode_chunk, frozen_dtype=config.wan.dtype)
    embeds, negative, text_sha256 = embed(config, [*prompts, config.negative_prompt], device)
    transformer, facts = load_dit(config, "cpu" if config.offload else device)
    check_size(config.frames, config.height, config.width, vae.geometry, transformer.config.patch_size)
    check_models(facts, vae, text_sha256)
    mean_shift = facts.get("mean_shift", 0.0) if config.mean_shift is None else config.mean_shift
    if facts and config.mean_shift is None:
        print(f"mean_shift={mean_shift}, ellipse {facts.get('ellipse', 'of the defaults')}, as {facts['file']} says")
    guide, ellipses = guide_of(config, vae.geometry, facts.get("ellipse", {}))
    shape = vae.geometry.latent_shape(config.frames, config.height, config.width)
    outline = None if ellipses is None else regions.outlines(ellipses[0], *shape[2:], config.frames)
    made_with = {
        "versions": versions(), "device": device,
        "dora": None if config.dora is None else origin(config.dora, "dit_dora"),
        "rgba_vae": origin(adapters, "rgba_vae"),
        "ellipses": None if ellipses is None else ellipses[0].tolist(),
    }  # fmt: skip
    if config.settings is not None:
        warn_of_others(Path(config.settings).expanduser(), made_with)
    out: Path | None = None
    shown: list[tuple[str, Tensor, Tensor]] = []
    for part in tqdm(batches(jobs, config.batch_size), desc="clips", unit="batch"):
        started = time.perf_counter()
        noise = initial_noise([seed for _, _, seed in part], shape, guide, mean_shift, device)
        context = embeds[[index for index, _, _ in part]].to(device)
        if config.offload:
            vae.cpu()
            transformer.to(device)
        latents = sample_latents(transformer, noise, context, negative, solver)
        if config.offload:
            transformer.cpu()
        clips = decode(vae.to(device), latents)
        for (number, prompt, seed), (rgb, alpha) in zip(part, clips, strict=True):
            out = folder_for(config) if out is None else out
            stem = out / file_name(number, prompt, seed)
            files = write_clip(stem, rgb, alpha, config.fps, config.formats, outline)
            clip = {"prompt": prompt, "seed": seed, "mean_shift": mean_shift}
            write_json(stem.with_name(f"{stem.name}.json"), {**settings, **clip, "made_with": made_with})
            shown = [*shown, (f"seed {seed}: {prompt or '(empty prompt)'}", rgb, alpha)][:ON_SHEET]
            tqdm.write(f"{files[0]} ({(time.perf_counter() - started) / len(part):.1f} s)")
    assert out is not None
    sheet = sheet_name(out, config.overwrite)
    save_picture(contact_sheet(shown, f"{out.name}: {title_of(config, solver)}", outline), sheet)
    print(f"sheet       {sheet}")


def warn_of_others(path: Path, made_with: Mapping[str, Any]) -> None:
    """Where weights or versions are not those that the clip of this JSON was made with."""
    before = json.loads(path.read_text()).get("made_with", {})
    for name in ("dora", "rgba_vae", "versions", "device"):
        if before.get(name) != made_with[name]:
            warnings.warn(f"{path}: {name} was {before.get(name)}, is {made_with[name]} now.", stacklevel=2)


def sheet_name(out: Path, overwrite: bool) -> Path:
    """Of this call: one of an earlier call stays."""
    names = (out / ("sheet.png" if number == 1 else f"sheet_{number}.png") for number in range(1, 10**6))
    return out / "sheet.png" if overwrite else next(path for path in names if not path.exists())


def title_of(config: DictConfig, solver: Solver) -> str:
    return f"{solver.name}, {solver.steps} steps, guidance {solver.guidance:g}, {config.height}x{config.width}"


if __name__ == "__main__":
    main()
