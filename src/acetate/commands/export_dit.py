"""Exports of the DiT with its DoRA, and of either expert of a base that has two."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from diffusers import WanTransformer3DModel
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from acetate.assembly import check_hash, check_models
from acetate.commands import device_of
from acetate.commands.export_vae import (
    TWO_VAES,
    Export,
    check_base,
    merged_vaes,
    tensor_file,
    trained_vae,
)
from acetate.formats.checkpoints import Trained, read_trained
from acetate.formats.comfyui import native_dora, svd_lora
from acetate.formats.names import original_dit_name, original_layer
from acetate.formats.pipeline import PEFTAdapter, wan_pipeline
from acetate.formats.wan_alpha import dora_to_wan_alpha
from acetate.models import experts
from acetate.models.adapters import load_trainable
from acetate.models.condition import widen_as_trained
from acetate.models.dit import add_dora, dora_layers, merge_dora, merged_weight
from acetate.models.image_encoder import encoder_of
from acetate.models.loading import load_transformer, transformer_sha256
from acetate.models.text import TextEncoder
from acetate.sampling import Solver

WORST = 5  # layers of an SVD LoRA that are printed
HEADS = 128  # ComfyUI takes every Wan DiT's heads to be so wide


def trained_dit(trained: Trained, config: DictConfig) -> WanTransformer3DModel:
    """Returns the DiT, or the expert, with its DoRA as it was trained. Raises ValueError where the
    base is another one."""
    expert = trained.facts.get("expert", "high")
    transformer = load_dit(config, expert)
    check_base(trained, "transformer_sha256", transformer_sha256(transformer))
    add_dora(transformer, trained.facts["rank"], trained.facts["alpha"])
    widen_as_trained(transformer, trained.facts)
    load_trainable(transformer, trained.state, str(trained.path))
    return transformer


def load_dit(config: DictConfig, expert: str) -> WanTransformer3DModel:
    """Loads the base's DiT, of two experts this one. Raises ValueError where it has none."""
    source = config.wan.transformer if expert == "high" else config.wan.transformer_2
    if source is None:
        raise ValueError(
            f"These adapters are of the {expert}-noise expert; wan.transformer_2=null is one DiT. "
            "Choose the wan= that they were trained with, as wan=wan22_a14b."
        )
    return load_transformer(source, getattr(torch, config.dtype), part=experts.PARTS[expert])


def named(trained: Trained, file: str) -> str:
    """Returns the name of a file, with the expert's where the DiT is one of two."""
    expert, (stem, dot, suffix) = trained.facts.get("expert"), file.partition(".")
    return f"{stem}_{expert}_noise{dot}{suffix}" if expert else file


def check_dora_alone(trained: Trained, way_out: str) -> None:
    """Raises ValueError for adapters with a wider patch embedding, which no LoRA file holds."""
    if is_widened(trained):
        raise ValueError(
            f"{trained.path} holds a wider patch embedding beside its DoRA, as experiment=i2v_dora "
            f"trains on a text base; a LoRA file cannot. {way_out}"
        )


def is_widened(trained: Trained) -> bool:
    return bool(trained.facts.get("condition", {}).get("widened"))


def dit_to_wan_alpha(trained: Trained, config: DictConfig) -> Export:
    check_dora_alone(trained, "Give to=comfyui dit=merged, or to=diffusers.")
    flat = dora_to_wan_alpha(trained.state, trained.facts["alpha"] / trained.facts["rank"])
    file = named(trained, "t2v.safetensors")
    notes = [f"{file}: DoRA in bfloat16, for Wan-Alpha's inference (--lora_path)"]
    return Export({file: tensor_file(flat, trained.facts)}, notes)


def dit_to_comfyui(trained: Trained, config: DictConfig) -> Export:
    notes = [
        "sample with the noise's mean shifted as in training (mean_shift in the metadata), shift "
        f"{config.shift:g}"
    ]
    if expert := trained.facts.get("expert"):
        notes.append(
            f"of the {expert}-noise expert: the high one's steps end at timestep "
            f"{1000 * trained.facts['boundary']:g}, as of two KSamplers (Advanced)"
        )
    if config.dit != "merged":
        check_dora_alone(trained, "Give dit=merged.")
    if config.dit == "dora":
        tensors = native_dora(trained.state, trained.facts["alpha"])
        file = named(trained, "dit_dora.safetensors")
        notes = [
            f"{file}: ComfyUI/models/loras, LoraLoaderModelOnly at strength 1",
            "WARNING: ComfyUI's versions disagree on DoRA: older ones normalise per input column, "
            "others divide by |W| rather than |W + BA|. Compare with dit=merged before use, or "
            "give dit=svd-lora.",
            *notes,
        ]
        return Export({file: tensor_file(tensors, trained.facts)}, notes)
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
    file = named(trained, "dit.safetensors")
    notes = [
        f"{file}: ComfyUI/models/diffusion_models, UNETLoader; the DoRA is in its weights",
        *notes,
    ]
    return Export({file: tensor_file(state, trained.facts)}, notes)


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
    file = named(trained, f"dit_lora_rank{config.rank}.safetensors")
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


def dit_to_diffusers(trained: Trained, config: DictConfig) -> Export:
    transformer = trained_dit(trained, config)
    adapter = PEFTAdapter(transformer)
    merge_dora(transformer)
    expert = trained.facts.get("expert", "high")
    part, folder = experts.PARTS[expert], {"high": "adapter", "low": "adapter_2"}[expert]
    writers: dict[str, Callable[[Path], object]] = {}
    notes: list[str] = []
    if not is_widened(trained):  # which PEFT's file would lack
        writers[folder] = adapter.save_pretrained
        notes = [f"{folder}/: PEFT's DoRA, PeftModel.from_pretrained({part} of the base, folder)"]
    if config.rgba_vae is None or expert == "low":
        writers[part] = transformer.save_pretrained
        notes.append(
            f"{part}/: WanTransformer3DModel.from_pretrained, DoRA merged; rgba_vae=... makes "
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
    scheduler = Solver(shift=config.shift).scheduler("cpu")
    low = None
    if config.checkpoint_2 == experts.AS_IT_IS:
        low = load_dit(config, "low")
    elif config.checkpoint_2 is not None:
        low, adapter = merged_low(trained, config)
        if not is_widened(trained):
            writers["adapter_2"] = adapter.save_pretrained
    image = encoder_of(transformer, config.wan.image_encoder)
    if image is not None:
        check_hash(trained.facts, "image_encoder_sha256", image.sha256())
    boundary = config.wan.boundary
    pipeline = wan_pipeline(transformer, vaes["rgb"], text, scheduler, low, boundary, image)
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


def second_of(config: DictConfig) -> Trained:
    """Reads the adapters of the low-noise expert. Raises ValueError for others."""
    second = read_trained(config.checkpoint_2, config.ema)
    if second.kind != "dit_dora":
        raise ValueError(
            f"checkpoint_2={config.checkpoint_2} holds a {second.kind}; it is for the low-noise "
            "expert's DoRA."
        )
    experts.check_own(second.path, {"expert": "high", **second.facts}, "low")
    return second


def merged_low(trained: Trained, config: DictConfig) -> tuple[WanTransformer3DModel, PEFTAdapter]:
    """Returns the low-noise expert with its DoRA merged, and that DoRA. Raises ValueError where it
    was trained on other latents or noise than the high one's."""
    second = second_of(config)
    high, low = ({**one.facts, "file": str(one.path)} for one in (trained, second))
    experts.check_pair(high, low)
    transformer = trained_dit(second, config)
    adapter = PEFTAdapter(transformer)
    merge_dora(transformer)
    return transformer, adapter
