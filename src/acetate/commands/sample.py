"""python -m acetate.commands.sample prompt="..." [name=value ...]: text to RGBA clips in the formats editors open."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from diffusers import WanTransformer3DModel
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from acetate import regions
from acetate.callbacks.samples import contact_sheet, save_picture
from acetate.data.transforms import resize, to_float, window
from acetate.export import dora_from_wan_alpha, merge_few_step
from acetate.models.adapters import load_trainable, read_adapters
from acetate.models.dit import FINGERPRINT, add_dora, merge_dora
from acetate.models.loading import load_transformer, weights_sha256
from acetate.models.rgba_vae import RGBAVAE, load_rgba_vae
from acetate.models.text import TextEncoder, pad_context
from acetate.models.wan import Geometry
from acetate.sampling import EllipsePath, Solver, check_size, decode, initial_noise, sample_latents
from acetate.video_io import read_rgba
from acetate.video_out import check_formats, write_clip

CONF = str(Path(__file__).parents[3] / "conf")
ON_SHEET = 8  # clips


def load_dit(config: DictConfig, device: str) -> tuple[WanTransformer3DModel, dict[str, Any]]:
    """The DiT with DoRA, then the few-step LoRA, merged into its weights; and what the DoRA file says of itself."""
    transformer = load_transformer(config.wan.transformer, getattr(torch, config.wan.dtype))
    facts: dict[str, Any] = {}
    if config.dora is not None:
        facts = put_dora(transformer, config.dora)
    if config.few_step.lora is not None:
        path = Path(config.few_step.lora)
        if not path.is_file():
            raise FileNotFoundError(f"few_step.lora={path} does not exist.")
        merge_few_step(transformer, load_file(path), config.few_step.strength)
    return transformer.to(device), facts


def put_dora(transformer: WanTransformer3DModel, source: str) -> dict[str, Any]:
    """Merges adapters of experiment=dit_dora, or of the released t2v.safetensors (alpha = rank, no metadata)."""
    path = Path(source)
    if path.is_file() and released(state := load_file(path)):
        adapters, facts = dora_from_wan_alpha(state), {}
        rank = alpha = next(value.shape[0] for name, value in adapters.items() if ".lora_A." in name)
    else:
        path, state, facts = read_adapters(source, kind="dit_dora")
        adapters = {name.removeprefix("transformer."): value for name, value in state.items()}
        rank, alpha = facts["rank"], facts["alpha"]
        found = weights_sha256(transformer, FINGERPRINT)
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


def check_models(facts: dict[str, Any], vae: RGBAVAE, text: TextEncoder) -> None:
    """Raises ValueError for a VAE or a text encoder that the DoRA was not trained with."""
    for name, found, way_out in (
        ("vae_sha256", vae.latents_sha256(), "Give the rgba_vae= that its latents were cached with."),
        ("text_encoder_sha256", text.sha256(), "Choose the wan= that its latents were cached with."),
    ):
        if facts.get(name, found) != found:
            raise ValueError(f"The DoRA's {name} is {facts[name][:12]}, this one's {found[:12]}. {way_out}")


def guide_ellipses(config: DictConfig, geometry: Geometry, threshold: dict[str, Any]) -> Tensor | None:
    """(1, F, 5) from the guide settings: an alpha clip, an ellipse, or none."""
    guide = config.guide
    _, frames, height, width = geometry.latent_shape(config.frames, config.height, config.width)
    if guide.clip is not None:
        clip = torch.from_numpy(read_rgba(Path(guide.clip)).frames)
        clip = clip[window(len(clip), config.frames, 0)]
        _, alpha = resize(*to_float(clip), config.height, config.width)
        return regions.fit_ellipses(alpha[None], geometry.time_stride, geometry.space_stride, **threshold)
    if guide.centre is None and guide.axes is None:
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


def batches(jobs: Sequence[tuple[int, str, int]], size: int) -> list[Sequence[tuple[int, str, int]]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


@hydra.main(version_base=None, config_path=CONF, config_name="command/sample")
def main(config: DictConfig) -> None:
    check_formats(config.formats)
    prompts, solver = read_prompts(config), solver_of(config)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_rgba_vae(
        vae=config.wan.vae, adapters=config.rgba_vae, chunk=config.decode_chunk, frozen_dtype=config.wan.dtype
    )
    text = TextEncoder(config.wan.text_encoder, config.wan.prompt_length, device)
    transformer, facts = load_dit(config, device)
    check_size(config.frames, config.height, config.width, vae.geometry, transformer.config.patch_size)
    check_models(facts, vae, text)
    mean_shift = facts.get("mean_shift", 0.0) if config.mean_shift is None else config.mean_shift
    guides = guide_ellipses(config, vae.geometry, facts.get("ellipse", {}))
    negative = text.context([config.negative_prompt]).to(device)
    embeds = {prompt: text(prompt) for prompt in prompts}
    del text  # UMT5-XXL takes 11 GB
    shape = vae.geometry.latent_shape(config.frames, config.height, config.width)
    jobs = [(i, prompt, config.seed + n) for i, prompt in enumerate(prompts) for n in range(config.count)]
    out, shown = Path(config.out), []
    for part in tqdm(batches(jobs, config.batch_size), desc="clips", unit="batch"):
        started = time.perf_counter()
        noise = initial_noise([seed for _, _, seed in part], shape, guides, mean_shift, device)
        context = pad_context([embeds[prompt] for _, prompt, _ in part], config.wan.prompt_length).to(device)
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
                        "rgba_vae": config.rgba_vae, "few_step": OmegaConf.to_container(config.few_step)}  # fmt: skip
            write_settings(stem, settings)
            shown = [*shown, (f"{prompt[-70:]} seed {seed}", rgb, alpha)][:ON_SHEET]
            tqdm.write(f"{files[0]} ({(time.perf_counter() - started) / len(part):.1f} s)")
    save_picture(contact_sheet(shown, out.name), out / "sheet.png")
    print(f"sheet       {out / 'sheet.png'}")


def write_settings(stem: Path, settings: dict[str, Any]) -> None:
    path = stem.with_name(f"{stem.name}.json")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(settings, indent=1))
    temporary.replace(path)


if __name__ == "__main__":
    main()
