"""Exports of the RGBA-VAE, and what an export is."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from omegaconf import DictConfig
from torch import Tensor

from acetate.assembly import wan_for
from acetate.formats.checkpoints import Trained
from acetate.formats.names import original_vae_name
from acetate.formats.wan_alpha import decoder_of, trainable_to_wan_alpha
from acetate.models.adapters import load_trainable, trainable_state
from acetate.models.loading import load_vae
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.wan import merged_vae
from acetate.replacing import write_tensors

# dim_mult and num_res_blocks of the one Wan2.1 VAE that ComfyUI builds
VAE_SHAPE = ([1, 2, 4, 4], 2)
TWO_VAES = (
    "vae/, vae_alpha/: decode the same latents with both; alpha = (mean of vae_alpha's three "
    "channels + 1) / 2"
)


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


def check_base(trained: Trained, name: str, found: str) -> None:
    if trained.facts[name] != found:
        raise ValueError(
            f"{trained.path} was trained on another base ({trained.facts['base']}, {name} "
            f"{trained.facts[name][:12]}) than this one ({found[:12]}). {wan_for(trained.facts)}, "
            "or its files as wan.vae= and wan.transformer=."
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
            "NOTE: ComfyUI builds Wan2.1's VAE only; this base has dim_mult "
            f"{list(base.config.dim_mult)}, {blocks} residual blocks a stage and does not load "
            "there"
        )
    return Export(writers, notes)


def vae_to_diffusers(trained: Trained, config: DictConfig) -> Export:
    vaes = merged_vaes(*trained_vae(trained, config))
    writers = {"vae": vaes["rgb"].save_pretrained, "vae_alpha": vaes["alpha"].save_pretrained}
    return Export(writers, ["AutoencoderKLWan.from_pretrained loads either folder", TWO_VAES])
