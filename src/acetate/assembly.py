"""Puts a DiT and its adapters together from their files, and holds what was trained together
against what is given."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from omegaconf import DictConfig
from torch import nn

from acetate.blank import blank_transformer
from acetate.commands.recorded import preset_of
from acetate.formats.few_step import merge_few_step
from acetate.formats.trained import read_whole_adapters
from acetate.formats.wan_alpha import dora_from_wan_alpha, is_dora, rank_of
from acetate.models import experts
from acetate.models.adapters import load_trainable
from acetate.models.condition import TEXT_ALONE, condition_channels, widen_as_trained
from acetate.models.dit import add_dora, merge_dora
from acetate.models.joint import attach_joint, start_joint
from acetate.models.loading import load_transformer, transformer_sha256
from acetate.models.plain_vae import PlainVAE
from acetate.models.rgba_vae import RGBADecoders
from acetate.models.weights import read_weights

# What the released t2v.safetensors was trained with; the file itself does not say
RELEASED = {
    "mean_shift": 0.05,
    "ellipse": {"threshold": 0.1, "raster": "opencv", "enlargements": 10},
}


def load_dit(
    config: DictConfig, device: str, expert: str = "high"
) -> tuple[WanTransformer3DModel, dict[str, Any]]:
    """Returns the DiT with DoRA, then the few-step LoRA, merged into its weights, and the metadata
    of the DoRA file. expert: of `experts.PARTS`; `high` is the DiT of a base with one."""
    low = expert == "low"
    transformer = load_transformer(
        config.wan.transformer_2 if low else config.wan.transformer,
        getattr(torch, config.wan.dtype),
        part=experts.PARTS[expert],
    )
    facts: dict[str, Any] = {}
    dora, few = (config.dora_2, "lora_2") if low else (config.dora, "lora")
    if dora not in (None, experts.AS_IT_IS):
        facts = put_dora(transformer, dora, expert if config.wan.transformer_2 else None)
    if config.few_step[few] not in (None, experts.AS_IT_IS):
        if is_joint(facts):
            raise ValueError(
                f"few_step.{few}={config.few_step[few]}: few-step LoRA is merged after DoRA, and "
                f"{facts['file']} is a joint model. Leave it out."
            )
        path = Path(config.few_step[few]).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"few_step.{few}={path} does not exist. Give a file, or a folder of its shards."
            )
        merge_few_step(transformer, read_weights(path), config.few_step.strength, str(path))
    cast(nn.Module, transformer).to(device)
    return transformer, facts


def put_dora(
    transformer: WanTransformer3DModel, source: str, expert: str | None = None
) -> dict[str, Any]:
    """Merges adapters of experiment=dit_dora, or of the released t2v.safetensors (alpha = rank, no
    metadata); puts those of experiment=dit_joint on, which colour tokens must not see. expert: of a
    base with two, whose adapters they must be."""
    path = Path(source).expanduser()
    if path.is_file() and is_dora(state := read_weights(path)):
        adapters, facts = dora_from_wan_alpha(state, str(path)), dict(RELEASED)
        rank = alpha = rank_of(adapters)
    else:
        path, adapters, facts = read_whole_adapters(source, "dit_dora", "dit_joint")
        rank, alpha = facts["rank"], facts["alpha"]
        experts.check_own(path, facts, expert)
        found = transformer_sha256(transformer)
        if found != facts["transformer_sha256"]:
            raise ValueError(
                f"{path} was trained on another DiT ({facts['base']}). {wan_for(facts)}, or the "
                "files as wan.transformer=."
            )
    if is_joint(facts):
        attach_joint(transformer, rank, alpha, bool(facts["rgb_attends_alpha"]))
        start_joint(transformer, seed=0)
        load_trainable(transformer, adapters, str(path))
        transformer.requires_grad_(False)
        return facts | {"file": str(path)}
    add_dora(transformer, rank, alpha)
    widen_as_trained(transformer, facts)
    load_trainable(transformer, adapters, str(path))
    merge_dora(transformer)
    return facts | {"file": str(path)}


def wan_for(facts: Mapping[str, Any]) -> str:
    """Says the way out where adapters meet another base than theirs."""
    preset = preset_of(str(facts["base"]))
    return "Choose the wan= it was trained with" + (f", by its name wan={preset}" if preset else "")


def is_joint(facts: Mapping[str, Any]) -> bool:
    """Returns whether the file's model makes colour and alpha of the plain VAE side by side."""
    return facts.get("kind") == "dit_joint"


def check_experts(config: DictConfig) -> None:
    """Raises ValueError where what is given for one expert of a base is missing for the other, or
    given for a base with one DiT."""
    wan, few = config.wan, config.few_step
    pairs = {"dora": (config.dora, config.dora_2), "few_step.lora": (few.lora, few.lora_2)}
    experts.check_given(wan.transformer_2, wan.boundary, pairs)


def check_pictured(config: DictConfig) -> None:
    """Raises ValueError for a DiT that takes no picture, before it is loaded, as far as its config
    and the file of its DoRA tell."""
    try:
        base, facts = blank_transformer(config.wan.transformer, torch.float32), {}
        if config.dora is not None:
            facts = read_whole_adapters(config.dora, "dit_dora", "dit_joint")[2]
    except (FileNotFoundError, ValueError):  # of another layout, or for `load_dit` to refuse
        return
    if not condition_channels(base) and "condition" not in facts:
        of = f"wan.transformer={config.wan.transformer}" if not facts else f"dora={config.dora}"
        raise ValueError(f"{of}: {TEXT_ALONE}")


def check_guided(facts: Mapping[str, Any], guided: bool) -> None:
    """Raises ValueError for a joint model that a guide or a mean shift would lead."""
    if guided and is_joint(facts):
        raise ValueError(
            f"{facts['file']} is a joint model: its noise has no mean shift, and no guide can lead "
            "it. Leave guide and mean_shift out, or sample a model of experiment=dit_dora."
        )


def check_models(facts: dict[str, Any], vae: RGBADecoders, text_sha256: str) -> None:
    """Raises ValueError for a VAE or a text encoder that the DoRA was not trained with; warns where
    no file tells."""
    if is_joint(facts) != isinstance(vae, PlainVAE):
        raise ValueError(
            f"{facts['file']} is a joint model, which writes latents of the plain VAE. Give "
            "rgba_vae=null."
            if is_joint(facts)
            else "rgba_vae=null is the plain VAE, which a model of experiment=dit_joint alone "
            "writes for. Give the rgba_vae= that the latents of this one were cached with."
        )
    for name, found, way_out in (
        (
            "vae_sha256",
            vae.latents_sha256(),
            "Give the rgba_vae= that its latents were cached with.",
        ),
        ("text_encoder_sha256", text_sha256, "Choose the wan= that its latents were cached with."),
    ):
        if found is None:
            if name in facts:
                warnings.warn(
                    "rgba_vae holds decoders only, which do not say whether they are of the VAE "
                    f"({facts[name][:12]}) that this DoRA was trained with.",
                    stacklevel=2,
                )
        else:
            check_hash(facts, name, found, way_out)


def check_hash(
    facts: Mapping[str, Any],
    name: str,
    found: str,
    way_out: str = "Choose the wan= that its latents were cached with.",
) -> None:
    """Raises ValueError for another model than the DoRA was trained with, as far as it says."""
    if facts.get(name, found) != found:
        raise ValueError(
            f"The DoRA's {name} is {facts[name][:12]}, this one's {found[:12]}. {way_out}"
        )
