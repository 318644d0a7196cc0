"""python -m acetate.commands.sample prompt="..." [name=value ...]: text to RGBA clips in the formats editors open."""

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
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
from acetate.data.latents import covering_box
from acetate.data.shards import write_json
from acetate.data.transforms import crop, resize, to_float, window
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
from acetate.sampling import EllipsePath, Solver, check_size, decode, initial_noise, sample_latents
from acetate.video_io import read_rgba
from acetate.video_out import check_formats, write_clip

ON_SHEET = 8  # clips
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
        adapters, facts = dora_from_wan_alpha(state, str(path)), RELEASED
        rank = alpha = next(value.shape[0] for name, value in adapters.items() if ".lora_A." in name)
    else:
        path, state, facts = read_adapters(source, kind="dit_dora")
        adapters = {name.removeprefix("transformer."): value for name, value in state.items()}
        rank, alpha = facts["rank"], facts["alpha"]
        found = transformer_sha256(transformer)
        if found != facts["transformer_sha256"]:
            raise ValueError(
                f"{path} was trained on another DiT ({facts['base']}). Choose the wan= it was trained with."
            )
    add_dora(transformer, rank, alpha)
    load_trainable(transformer, adapters, str(path))
    merge_dora(transformer)
    return facts


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
    grid = geometry.latent_shape(config.frames, config.height, config.width)[1:]
    if config.guide.mask is not None:
        if others := [name for name, value in config.guide.items() if value is not None and name != "mask"]:
            raise ValueError(f"guide.mask and guide.{others[0]} are both given; G comes from one of them.")
        return read_gauss_mask(Path(config.guide.mask).expanduser(), grid)
    ellipses = guide_ellipses(config, geometry, threshold)
    return None if ellipses is None else regions.gaussian(ellipses, *grid[1:])


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


def read_prompts(config: DictConfig) -> list[str]:
    if (config.prompt is None) == (config.prompts is None):
        raise ValueError('Give either prompt="..." or prompts=FILE with one prompt per line.')
    if config.prompt is not None:
        return [config.prompt]
    path = Path(config.prompts)
    if not path.is_file():
        raise FileNotFoundError(f"prompts={path} does not exist; it is a text file with one prompt per line.")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path} is empty; it is a text file with one prompt per line.")
    return prompts


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
    context = text.context(prompts)
    return context[:-1], context[-1:].to(device), text.sha256()


def batches(jobs: Sequence[tuple[int, str, int]], size: int) -> list[Sequence[tuple[int, str, int]]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


@program("command/sample")
def main(config: DictConfig) -> None:
    check_formats(config.formats)
    prompts, solver = read_prompts(config), solver_of(config)
    device = device_of(config)
    adapters = config.rgba_vae if isinstance(config.rgba_vae, str) else list(config.rgba_vae)
    vae = load_rgba_vae(vae=config.wan.vae, adapters=adapters, chunk=config.decode_chunk, frozen_dtype=config.wan.dtype)
    embeds, negative, text_sha256 = embed(config, [*prompts, config.negative_prompt], device)
    transformer, facts = load_dit(config, "cpu" if config.offload else device)
    check_size(config.frames, config.height, config.width, vae.geometry, transformer.config.patch_size)
    check_models(facts, vae, text_sha256)
    mean_shift = facts.get("mean_shift", 0.0) if config.mean_shift is None else config.mean_shift
    guide = guide_mask(config, vae.geometry, facts.get("ellipse", {}))
    shape = vae.geometry.latent_shape(config.frames, config.height, config.width)
    jobs = [
        (n // config.count, prompts[n // config.count], config.seed + n) for n in range(len(prompts) * config.count)
    ]
    out, shown = Path(config.out), []
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
            stem = out / file_name(number, prompt, seed)
            files = write_clip(stem, rgb, alpha, config.fps, config.formats)
            settings = {"prompt": prompt, "seed": seed, "negative_prompt": config.negative_prompt, **asdict(solver),
                        "mean_shift": mean_shift, "guide": OmegaConf.to_container(config.guide), "dora": config.dora,
                        "rgba_vae": adapters, "few_step": OmegaConf.to_container(config.few_step)}  # fmt: skip
            write_json(stem.with_name(f"{stem.name}.json"), settings)
            shown = [*shown, (f"{prompt[-70:]} seed {seed}", rgb, alpha)][:ON_SHEET]
            tqdm.write(f"{files[0]} ({(time.perf_counter() - started) / len(part):.1f} s)")
    save_picture(contact_sheet(shown, out.name), out / "sheet.png")
    print(f"sheet       {out / 'sheet.png'}")


if __name__ == "__main__":
    main()
