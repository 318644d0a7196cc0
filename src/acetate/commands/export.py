"""acetate export checkpoint=... to=... [name=value ...]: trained weights in others' formats."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from acetate.cli import run
from acetate.commands import device_of
from acetate.commands.recorded import run_of
from acetate.formats.checkpoints import Trained, read_trained
from acetate.formats.comfyui import native_dora, svd_lora
from acetate.formats.exported import MARK, check_replaceable, write_export
from acetate.formats.names import original_dit_name, original_layer, original_vae_name
from acetate.formats.pipeline import PEFTAdapter, wan_pipeline
from acetate.formats.wan_alpha import decoder_of, dora_to_wan_alpha, trainable_to_wan_alpha
from acetate.models.adapters import load_trainable, trainable_state
from acetate.models.condition import widen_as_trained
from acetate.models.dit import add_dora, dora_layers, merge_dora, merged_weight
from acetate.models.loading import load_transformer, load_vae, transformer_sha256
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.text import TextEncoder
from acetate.models.wan import merged_vae
from acetate.pipeline import check_models, wan_for
from acetate.replacing import write_tensors
from acetate.sampling import Solver

CHOICES = {
    "to": ("acetate", "wan-alpha", "comfyui", "diffusers"),
    "dit": ("merged", "svd-lora", "dora"),
    "dtype": ("float32", "bfloat16", "float16"),
}
OF_A_KIND: dict[tuple[str, str], tuple[str, ...]] = {  # settings that change what is written
    ("acetate", "rgba_vae"): (),
    ("acetate", "dit_dora"): (),
    ("wan-alpha", "rgba_vae"): ("decoder_only",),
    ("wan-alpha", "dit_dora"): (),
    ("comfyui", "rgba_vae"): (),
    ("comfyui", "dit_dora"): ("dit", "rank", "dtype"),
    ("diffusers", "rgba_vae"): (),
    ("diffusers", "dit_dora"): ("dtype", "rgba_vae", "shift"),
}
WORST = 5  # layers of an SVD LoRA that are printed
HEADS = 128  # ComfyUI takes every Wan DiT's heads to be so wide
# dim_mult and num_res_blocks of the one Wan2.1 VAE that ComfyUI builds
VAE_SHAPE = ([1, 2, 4, 4], 2)


class Export(NamedTuple):
    """An export: writers for each path below the output folder, notes for its user, and facts for
    export.json."""

    writers: dict[str, Callable[[Path], object]]
    notes: list[str]
    facts: Mapping[str, Any] = MappingProxyType({})


def tensor_file(state: dict[str, Tensor], facts: dict[str, Any]) -> Callable[[Path], None]:
    """Writes a .safetensors whose metadata are the facts, each as JSON."""
    whole = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return partial(
        write_tensors, whole, metadata={name: json.dumps(value) for name, value in facts.items()}
    )


def trained_vae(trained: Trained, config: DictConfig) -> tuple[RGBAVAE, AutoencoderKLWan]:
    """Returns the RGBA-VAE as it was trained, and its base. Raises ValueError for another base."""
    base, facts = load_vae(config.wan.vae), trained.facts
    settings = {
        name: facts[name] for name in ("merge_init", "lora_rank", "lora_alpha", "average_alpha")
    }
    model = RGBAVAE(vae=base, **settings)
    check_base(trained, "base_sha256", model.base_sha256)
    load_trainable(model, trained.state, str(trained.path))
    return model.eval(), base


def merged_vaes(model: RGBAVAE, base: AutoencoderKLWan) -> dict[str, AutoencoderKLWan]:
    """Returns for colour and for alpha the base with the trained decoder in the place of its
    own."""
    return {
        "rgb": merged_vae(base, model.decoder_rgb),
        "alpha": merged_vae(base, model.decoder_alpha),
    }


def trained_dit(trained: Trained, config: DictConfig) -> WanTransformer3DModel:
    """Returns the DiT with its DoRA as it was trained. Raises ValueError for another base."""
    transformer = load_transformer(config.wan.transformer, getattr(torch, config.dtype))
    check_base(trained, "transformer_sha256", transformer_sha256(transformer))
    add_dora(transformer, trained.facts["rank"], trained.facts["alpha"])
    widen_as_trained(transformer, trained.facts)
    load_trainable(transformer, trained.state, str(trained.path))
    return transformer


def check_base(trained: Trained, name: str, found: str) -> None:
    if trained.facts[name] != found:
        raise ValueError(
            f"{trained.path} was trained on another base ({trained.facts['base']}, {name} "
            f"{trained.facts[name][:12]}) than this one ({found[:12]}). {wan_for(trained.facts)}, "
            "or its files as wan.vae= and wan.transformer=."
        )


def to_acetate(trained: Trained, config: DictConfig) -> Export:
    prefix, use = {
        "rgba_vae": ("vae.", "rgba_vae={file} of sample and cache_latents"),
        "dit_dora": ("transformer.", "dora={file} of sample and follow"),
    }[trained.kind]
    state = {f"{prefix}{name}": value for name, value in trained.state.items()}
    file = f"{trained.kind}.safetensors"
    return Export({file: tensor_file(state, trained.facts)}, [f"{file}: {use.format(file='FILE')}"])


def vae_to_wan_alpha(trained: Trained, config: DictConfig) -> Export:
    model, base = trained_vae(trained, config)
    if model.merge_init != "scratch" and not config.decoder_only:
        raise ValueError(
            f"{trained.path}: a merge block of merge_init={model.merge_init} adds to Wan's own "
            "latents; Wan-Alpha's stands alone and would encode wrongly. Give decoder_only=true "
            "for what its inference reads, or train with model.merge_init=scratch."
        )
    flat = trainable_to_wan_alpha(
        trainable_state(model), model.lora_alpha, base.config.num_res_blocks
    )
    notes = ["decoder.bin: the decoders' LoRA, for Wan-Alpha's inference (--vae_lora_checkpoint)"]
    writers = {"decoder.bin": partial(torch.save, _whole(decoder_of(flat)))}
    if not config.decoder_only:
        writers["pytorch_model.bin"] = partial(torch.save, _whole(flat))
        notes.append(
            "pytorch_model.bin: merge block and LoRA, for Wan-Alpha's DiT stage; Wan2.1_VAE.pth "
            "goes with it"
        )
    return Export(writers, notes)


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors, so that torch.save writes no more than they hold."""
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def check_dora_alone(trained: Trained, way_out: str) -> None:
    """Raises ValueError for adapters with a wider patch embedding, which no LoRA file holds."""
    if trained.facts.get("condition", {}).get("widened"):
        raise ValueError(
            f"{trained.path} holds a wider patch embedding beside its DoRA, as experiment=i2v_dora "
            f"trains on a text base; a LoRA file cannot. {way_out}"
        )


def dit_to_wan_alpha(trained: Trained, config: DictConfig) -> Export:
    check_dora_alone(trained, "Give to=comfyui dit=merged, or to=diffusers.")
    flat = dora_to_wan_alpha(trained.state, trained.facts["alpha"] / trained.facts["rank"])
    notes = ["t2v.safetensors: DoRA in bfloat16, for Wan-Alpha's inference (--lora_path)"]
    return Export({"t2v.safetensors": tensor_file(flat, trained.facts)}, notes)


def vae_to_comfyui(trained: Trained, config: DictConfig) -> Export:
    model, base = trained_vae(trained, config)
    blocks, writers = base.config.num_res_blocks, {}
    for channel, vae in merged_vaes(model, base).items():
        state = {original_vae_name(name, blocks): value for name, value in vae.state_dict().items()}
        writers[f"acetate_vae_{channel}_channel.safetensors"] = tensor_file(state, trained.facts)
    notes = [
        "both files: ComfyUI/models/vae; two VAELoader and two VAEDecode on the same latents give "
        "colour and matte"
    ]
    if (list(base.config.dim_mult), blocks) != VAE_SHAPE:
        notes.append(
            f"NOTE: ComfyUI builds Wan2.1's VAE only; this base has {_shape_of(base)} and does not "
            "load there"
        )
    return Export(writers, notes)


def _shape_of(vae: AutoencoderKLWan) -> str:
    return (
        f"dim_mult {list(vae.config.dim_mult)}, {vae.config.num_res_blocks} residual blocks a stage"
    )


def dit_to_comfyui(trained: Trained, config: DictConfig) -> Export:
    notes = [
        "sample with the noise's mean shifted as in training (mean_shift in the metadata), shift 5"
    ]
    if config.dit != "merged":
        check_dora_alone(trained, "Give dit=merged.")
    if config.dit == "dora":
        tensors = native_dora(trained.state, trained.facts["alpha"])
        notes = [
            "dit_dora.safetensors: ComfyUI/models/loras, LoraLoaderModelOnly at strength 1",
            "WARNING: ComfyUI's versions disagree on DoRA: older ones normalise per input column, "
            "others divide by |W| rather than |W + BA|. Compare with dit=merged before use, or "
            "give dit=svd-lora.",
            *notes,
        ]
        return Export({"dit_dora.safetensors": tensor_file(tensors, trained.facts)}, notes)
    transformer = trained_dit(trained, config)
    if transformer.config.attention_head_dim != HEADS:
        width = transformer.config.attention_head_dim
        notes.append(
            f"NOTE: ComfyUI takes heads to be {HEADS} wide, this base's are {width}: it computes "
            "wrongly there"
        )
    if config.dit == "svd-lora":
        return _svd_lora(transformer, trained, config, notes)
    merge_dora(transformer)
    state = {original_dit_name(name): value for name, value in transformer.state_dict().items()}
    notes = [
        "dit.safetensors: ComfyUI/models/diffusion_models, UNETLoader; the DoRA is in its weights",
        *notes,
    ]
    return Export({"dit.safetensors": tensor_file(state, trained.facts)}, notes)


def _svd_lora(
    transformer: WanTransformer3DModel, trained: Trained, config: DictConfig, notes: list[str]
) -> Export:
    device = device_of(config)

    def deltas() -> Iterator[tuple[str, Tensor]]:
        for name, layer in tqdm(
            dora_layers(transformer).items(), desc="SVD", unit="layer", delay=2, leave=False
        ):
            weight = cast(Tensor, layer.get_base_layer().weight).to(device, torch.float32)
            yield original_layer(name), merged_weight(layer, device=device) - weight

    low = svd_lora(deltas(), config.rank, getattr(torch, config.dtype))
    worst = sorted(low.errors, key=lambda layer: low.errors[layer], reverse=True)[:WORST]
    facts = {
        **trained.facts,
        "lora_rank": config.rank,
        "error": low.error,
        "error_of_layer": low.errors,
    }
    file = f"dit_lora_rank{config.rank}.safetensors"
    notes = [
        f"{file}: ComfyUI/models/loras, LoraLoaderModelOnly; LoRA loaders of diffusers read it too",
        f"error of rank {config.rank}: |D - BA| / |D| = {low.error:.4f} over all layers; worst "
        + ", ".join(f"{layer} {low.errors[layer]:.4f}" for layer in worst),
        *notes,
    ]
    return Export(
        {file: tensor_file(low.tensors, facts)},
        notes,
        {"error": low.error, "error_of_layer": low.errors},
    )


TWO_VAES = (
    "vae/, vae_alpha/: decode the same latents with both; alpha = (mean of vae_alpha's three "
    "channels + 1) / 2"
)


def vae_to_diffusers(trained: Trained, config: DictConfig) -> Export:
    vaes = merged_vaes(*trained_vae(trained, config))
    writers = {"vae": vaes["rgb"].save_pretrained, "vae_alpha": vaes["alpha"].save_pretrained}
    return Export(writers, ["AutoencoderKLWan.from_pretrained loads either folder", TWO_VAES])


def dit_to_diffusers(trained: Trained, config: DictConfig) -> Export:
    transformer = trained_dit(trained, config)
    adapter = PEFTAdapter(transformer)
    merge_dora(transformer)
    writers: dict[str, Callable[[Path], object]] = {}
    notes: list[str] = []
    if not trained.facts.get("condition", {}).get("widened"):  # which PEFT's file would lack
        writers["adapter"] = adapter.save_pretrained
        notes = [
            "adapter/: PEFT's DoRA, PeftModel.from_pretrained(transformer of the base, folder)"
        ]
    if config.rgba_vae is None:
        writers["transformer"] = transformer.save_pretrained
        notes.append(
            "transformer/: WanTransformer3DModel.from_pretrained, DoRA merged; rgba_vae=... makes "
            "a pipeline"
        )
        return Export(writers, notes)
    # it may have kept no average
    second = read_trained(config.rgba_vae, None if config.ema else config.ema)
    if second.kind != "rgba_vae":
        raise ValueError(
            f"rgba_vae={config.rgba_vae} holds a {second.kind}; give a checkpoint of "
            "experiment=vae_rgba."
        )
    model, base = trained_vae(second, config)
    text = TextEncoder(config.wan.text_encoder, config.wan.prompt_length)
    check_models(trained.facts, model, text.sha256())
    vaes = merged_vaes(model, base)
    pipeline = wan_pipeline(
        transformer, vaes["rgb"], text, Solver(shift=config.shift).scheduler("cpu")
    )
    writers.update({".": pipeline.save_pretrained, "vae_alpha": vaes["alpha"].save_pretrained})
    notes += [
        f"the folder: {type(pipeline).__name__}.from_pretrained, called with "
        f"max_sequence_length={config.wan.prompt_length} and latents= the noise, its mean shifted "
        f"by {trained.facts['mean_shift']} outside of the subject's ellipse",
        TWO_VAES,
    ]
    return Export(
        writers,
        notes,
        {"rgba_vae": str(second.path), "rgba_vae_averaged": second.facts["averaged"]},
    )


EXPORTS: dict[tuple[str, str], Callable[[Trained, DictConfig], Export]] = {
    ("acetate", "rgba_vae"): to_acetate,
    ("acetate", "dit_dora"): to_acetate,
    ("wan-alpha", "rgba_vae"): vae_to_wan_alpha,
    ("wan-alpha", "dit_dora"): dit_to_wan_alpha,
    ("comfyui", "rgba_vae"): vae_to_comfyui,
    ("comfyui", "dit_dora"): dit_to_comfyui,
    ("diffusers", "rgba_vae"): vae_to_diffusers,
    ("diffusers", "dit_dora"): dit_to_diffusers,
}


def default_folder(trained: Trained, config: DictConfig) -> Path:
    """Returns outputs/exports/NAME-TIME-step-00000500_FORMAT: NAME-TIME of the run, else the file's
    name."""
    run = run_of(str(trained.path))
    name = trained.path.stem if run is None else f"{run.parent.name}-{run.name}"
    if isinstance(trained.facts.get("step"), int):
        name += f"-step-{trained.facts['step']:08d}"
    name += "_average" if trained.facts["averaged"] else ""
    variant = f"-{config.dit}" if (config.to, trained.kind) == ("comfyui", "dit_dora") else ""
    return Path(config.paths.outputs) / "exports" / f"{name}_{config.to}{variant}"


def free_folder(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Returns the folder, or FOLDER_2, ...: the first that is not there, or holds an export of the
    same with the same settings, which is replaced."""
    for number in range(1, 10**6):
        path = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            before = json.loads((path / MARK).read_text())
        except (OSError, ValueError):
            before = None
        if not path.exists() or (isinstance(before, dict) and facts.items() <= before.items()):
            return path
    raise FileExistsError(f"{folder}: no name is free for a new folder. Give out=.")


def main(config: DictConfig) -> None:
    for name, known in CHOICES.items():
        if config[name] not in known:
            raise ValueError(f"{name}={config[name]}; known: {', '.join(known)}.")
    if not (math.isfinite(config.shift) and config.shift > 0):
        raise ValueError(
            f"shift={config.shift}; a finite number above 0. Wan2.1 is sampled with 3 to 8, mostly "
            "5."
        )
    trained = read_trained(config.checkpoint, config.ema)
    settings = {name: config[name] for name in ("to", *OF_A_KIND[config.to, trained.kind])}
    facts = {
        "checkpoint": str(trained.path),
        **trained.facts,
        "settings": settings,
        "to": config.to,
    }
    if config.out is None:
        out = free_folder(default_folder(trained, config).resolve(), json.loads(json.dumps(facts)))
    else:
        out = Path(config.out).expanduser().resolve()
    check_replaceable(out)  # before the work, too
    export = EXPORTS[config.to, trained.kind](trained, config)
    facts = {**facts, **export.facts}
    sizes = write_export(out, export.writers, facts)
    weights = "the average" if trained.facts["averaged"] else "raw weights"
    print(
        f"{trained.kind} of {trained.path} ({weights}, step {trained.facts.get('step')}) -> {out}"
    )
    for name, size in sizes.items():
        print(f"  {size / 2**20:10.2f} MiB  {name}")
    print("\n".join(export.notes))


if __name__ == "__main__":
    run("export")
