"""Reads a base model's config.json and holds it against the model's own weights before a model is
made."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from acetate.documents import FieldError, Schema, prose, shown
from acetate.models.weights import read_json
from acetate.settings import flag, number, one_of, optional, several, text, whole

WIDTH = whole(1, 2**20)
RATE = number(0, 1)
PLACES = whole(1, 2**14)  # that a table of positions is made for
VAE = Schema(
    {},
    {
        "base_dim": WIDTH, "decoder_base_dim": optional(WIDTH), "z_dim": whole(1, 2**12),
        "dim_mult": several(whole(1, 64), 1, 16), "num_res_blocks": whole(1, 1024),
        "attn_scales": several(number(0), 0, 16), "temperal_downsample": several(flag, 0, 16),
        "dropout": RATE, "latents_mean": several(number(), 1, 2**12),
        "latents_std": several(number(above=0), 1, 2**12), "is_residual": flag,
        "in_channels": whole(1, 1024), "out_channels": whole(1, 1024),
        "patch_size": optional(whole(1, 64)), "scale_factor_temporal": optional(whole(1, 1024)),
        "scale_factor_spatial": optional(whole(1, 1024)),
    },
)  # fmt: skip
TRANSFORMER = Schema(
    {},
    {
        "patch_size": several(whole(1, 64), 3, 3), "num_attention_heads": whole(1, 2**12),
        "attention_head_dim": whole(1, 2**12), "in_channels": whole(1, 2**12),
        "out_channels": whole(1, 2**12), "text_dim": WIDTH, "freq_dim": WIDTH, "ffn_dim": WIDTH,
        "num_layers": whole(1, 2**12), "cross_attn_norm": flag,
        "qk_norm": optional(one_of("rms_norm_across_heads")), "eps": number(0, 1),
        "image_dim": optional(WIDTH), "added_kv_proj_dim": optional(WIDTH),
        "rope_max_seq_len": PLACES, "pos_embed_seq_len": optional(PLACES),
    },
)  # fmt: skip
UMT5 = Schema(
    {},
    {
        "vocab_size": whole(1, 2**24), "d_model": WIDTH, "d_kv": WIDTH, "d_ff": WIDTH,
        "num_layers": whole(1, 2**12), "num_decoder_layers": optional(whole(0, 2**12)),
        "num_heads": whole(1, 2**12), "relative_attention_num_buckets": whole(1, 2**16),
        "relative_attention_max_distance": whole(1, 2**20), "dropout_rate": RATE,
        "classifier_dropout": RATE, "layer_norm_epsilon": number(0, 1),
        "initializer_factor": number(0), "feed_forward_proj": prose(64), "dense_act_fn": prose(64),
        "dtype": optional(one_of("float32", "float16", "bfloat16")),
        "torch_dtype": optional(one_of("float32", "float16", "bfloat16")),
        "model_type": one_of("umt5"), "pad_token_id": optional(whole(0, 2**24)),
        "eos_token_id": optional(whole(0, 2**24)), "decoder_start_token_id": optional(whole(0)),
        "is_decoder": flag, "is_encoder_decoder": flag, "is_gated_act": flag, "use_cache": flag,
        "tie_word_embeddings": flag, "transformers_version": optional(text),
    },
)  # fmt: skip
CLIP = Schema(
    {},
    {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH,
        "num_hidden_layers": whole(1, 2**12), "num_attention_heads": whole(1, 2**12),
        "num_channels": whole(1, 1024), "image_size": whole(1, 2**12), "patch_size": whole(1, 1024),
        "hidden_act": prose(64), "layer_norm_eps": number(0, 1), "attention_dropout": RATE,
        "initializer_factor": number(0), "initializer_range": number(0),
        "model_type": one_of("clip_vision_model"),
    },
)  # fmt: skip
SCHEMAS = {"vae": VAE, "transformer": TRANSFORMER, "text_encoder": UMT5, "image_encoder": CLIP}
# what counts layers, of which each has tensors in the file
LAYERS = {
    "vae": lambda config: config.get("num_res_blocks", 2) * len(config.get("dim_mult", [0] * 4)),
    "transformer": lambda config: config.get("num_layers", 40),
    "text_encoder": lambda config: config.get("num_layers", 8),
    "image_encoder": lambda config: config.get("num_hidden_layers", 12),
}


def read_config(path: Path, kind: str, held: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads the config.json beside weights. kind: of SCHEMAS; held: the
    weights' tensors, by name.

    Raises FileNotFoundError without one, and ValueError that names the file, the field, its value
    and the rule that it breaks.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; weights in diffusers names need it beside them."
        )
    config = read_json(file)
    try:
        SCHEMAS[kind].check(config)
        _check_size(kind, config, held)
    except FieldError as error:
        raise ValueError(f"{file}: {error}. Fetch it anew, or give its own weights.") from error
    return config


@contextmanager
def building(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong while a model without numbers is made inside of it into a
    ValueError that names the weights."""
    try:
        with init_empty_weights():
            yield
    except Exception as error:  # of any kind, where values do not go together
        raise ValueError(
            f"{path}: no model can be made of its config.json or shapes ({type(error).__name__}: "
            f"{error}). Fetch both anew."
        ) from error


def read_beside(kind: Any, folder: Path, what: str, **settings: Any) -> Any:
    """Reads what stands beside a model, by `kind.from_pretrained`. Raises ValueError that names the
    folder for one that cannot be read."""
    try:
        return kind.from_pretrained(folder, **settings)
    except Exception as error:  # of any kind, where its JSON is damaged
        raise ValueError(
            f"{folder} cannot be read as {what} ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}). Fetch it anew."
        ) from error


def config_of_model(
    path: Path, model: type[AutoencoderKLWan | WanTransformer3DModel], held: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Reads a config as `read_config` does and returns the part that diffusers' model takes."""
    kind = "vae" if model is AutoencoderKLWan else "transformer"
    known = inspect.signature(model.__init__).parameters
    return {key: value for key, value in read_config(path, kind, held).items() if key in known}


def _check_size(kind: str, config: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
    """Raises FieldError for a model of more layers, or another width, than its weights have."""
    layers = LAYERS[kind](config)
    if layers > len(held):
        other = {"vae": "num_res_blocks", "image_encoder": "num_hidden_layers"}
        name = other.get(kind, "num_layers")
        raise FieldError(
            f"{name}={shown(config.get(name))}: must be at most what the weights have, which are "
            f"{len(held)} tensors"
        )
    if kind == "vae":
        stages, halvings = config.get("dim_mult"), config.get("temperal_downsample")
        if stages is not None and halvings is not None and len(halvings) != len(stages) - 1:
            raise FieldError(
                f"temperal_downsample={shown(halvings)}: must have one value less than dim_mult, "
                f"which has {len(stages)}"
            )
    if kind == "transformer" and "patch_embedding.weight" in held:
        heads, side = config.get("num_attention_heads", 40), config.get("attention_head_dim", 128)
        width = held["patch_embedding.weight"].shape[0]
        if heads * side != width:
            raise FieldError(
                f"num_attention_heads={heads} times attention_head_dim={side}: must be the width "
                f"of the weights, {width}"
            )
