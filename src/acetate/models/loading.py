"""Loads Wan's VAE, DiT and text encoder from a diffusers folder, a hub name, or the original files:
one code path.

A source is a folder (diffusers layout, or the original release's), a single file, or a hub name
such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`. Loading is strict: every missing, unused or misshapen
tensor is an error.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from torch import Tensor, nn

from acetate.documents import FieldError, Schema
from acetate.models import experts
from acetate.models.adapters import listed
from acetate.models.configs import building, config_of_model
from acetate.models.hub import from_hub, is_hub_name
from acetate.models.weights import Weights, assign, open_weights, read_json, read_weights
from acetate.settings import number, whole

FINGERPRINT = 256  # values of each tensor that tell one DiT from another
WAN_HEAD_DIM = 128
# of the original release's config.json, what is read
ORIGINAL = Schema({}, {"num_heads": whole(1, 2**12), "eps": number(0, 1)})
M = TypeVar("M", bound=nn.Module)
# of files that hold the DiT as a part of a whole
DIT_PREFIX = re.compile(r"(model\.)?diffusion_model\.")


def load_vae(source: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """Loads Wan2.1's VAE, or another of its architecture; geometry and normalisation come from its
    config.

    Raises FileNotFoundError (no such source) and ValueError (weights that do not fit), naming the
    tensors.
    """
    weights = open_weights(locate(source, "vae"))
    if any(name.startswith("encoder.downsamples.") for name in weights.meta):
        config = _original_vae_config(weights)
        rename = lambda name: diffusers_vae_name(name, config["num_res_blocks"])  # noqa: E731
    else:
        config, rename = config_of_model(weights.path, AutoencoderKLWan, weights.meta), None
    with building(weights.path):
        vae = AutoencoderKLWan(**config)
    return _fill(vae, weights, renamed(weights.meta, rename), dtype)


def load_transformer(
    source: str,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[WanTransformer3DModel], object] | None = None,
    part: str = "transformer",
) -> WanTransformer3DModel:
    """Loads Wan's DiT. Raises as `load_vae` does. prepare: as in `weights.assign`, of the frozen
    model. part: of `experts.PARTS`, where the source holds two of them."""
    weights = open_weights(locate(source, part))
    original = renamed(weights.meta, lambda name: DIT_PREFIX.sub("", name, count=1))
    if "text_embedding.0.weight" in original:
        config = _original_transformer_config(weights, original)
        names = renamed(original, diffusers_dit_name)
        names = {name: original[key] for name, key in names.items()}
    else:
        config = config_of_model(weights.path, WanTransformer3DModel, weights.meta)
        names = renamed(weights.meta)
    with building(weights.path):
        transformer = WanTransformer3DModel(**config)
    _fill(transformer, weights, names, dtype, prepare)
    held = read_weights(weights.path)
    sha256 = tensors_sha256({name: held[key] for name, key in names.items()}, FINGERPRINT)
    transformer.register_to_config(_sha256=sha256)  # pyright: ignore[reportCallIssue]
    return transformer


def diffusers_vae_name(original: str, res_blocks: int = 2) -> str:
    """Translates the name of a tensor of the VAE. res_blocks: per stage of the encoder, the decoder
    has one more; Wan2.1's has 2."""
    # diffusers' map is for Wan2.1's own 3 + 1 places per decoder stage; a smaller VAE's are put in
    # these
    if match := re.match(r"decoder\.upsamples\.(\d+)\.", original):
        stage, place = divmod(int(match[1]), res_blocks + 2)
        place = 4 * stage + (3 if place == res_blocks + 1 else place)
        original = f"decoder.upsamples.{place}.{original[match.end() :]}"
    (name,) = convert_wan_vae_to_diffusers({original: None})
    return name


def diffusers_dit_name(original: str) -> str:
    """Translates the name of a tensor of the DiT."""
    (name,) = convert_wan_transformer_to_diffusers({original: None})
    return name


def renamed(names: Iterable[str], rename: Callable[[str], str] | None = None) -> dict[str, str]:
    """Returns rename(name) -> name. Raises ValueError where two of them become one."""
    result: dict[str, str] = {}
    for name in names:
        new = name if rename is None else rename(name)
        if new in result:
            raise ValueError(
                f"{name} and {result[new]} are the same tensor under two names. Remove one of them."
            )
        result[new] = name
    return result


def locate(source: str, part: str) -> Path:
    """Returns the file or folder that holds `part` (vae, transformer, ...) of `source`."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / part).is_dir():
            return path / part
        if (path / experts.ORIGINAL.get(part, part)).is_dir():
            return path / experts.ORIGINAL[part]
        if part == experts.PARTS["low"] and (path / "transformer").is_dir():
            raise FileNotFoundError(
                f"{source} has no {part}/ (nor {experts.ORIGINAL[part]}/): only Wan2.2's A14B has "
                "two experts. Give its folder or file as wan.transformer_2=, or null for one DiT."
            )
        original = sorted(path.glob("*VAE*.pth"))  # the original release keeps it beside the DiT
        if part == "vae" and len(original) > 1:
            raise ValueError(
                f"{path} holds {listed([file.name for file in original])}. Name the file."
            )
        return original[0] if part == "vae" and original else path
    if path.is_file():
        return path
    if not is_hub_name(source):
        raise FileNotFoundError(
            f"{source} does not exist. wan= sources are a diffusers folder, an original Wan file "
            "(Wan2.1_VAE.pth, *.safetensors), or a hub name such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    setting = {"tokenizer": "text_encoder", "image_processor": "image_encoder"}.get(part, part)
    folder = from_hub(source, f"wan.{setting}", allow=[f"{part}/*"])
    if not (folder / part).is_dir():
        raise FileNotFoundError(
            f"{source} has no folder {part}/; its diffusers version has (…-Diffusers)."
        )
    return folder / part


def _original_vae_config(weights: Weights) -> dict:
    """Reads the shape of an original VAE off its tensors; normalisation constants are Wan2.1's."""
    dim = weights.shape("encoder.conv1.weight")[0]
    widths, halvings, blocks, last = [], [], 0, dim
    index = 0
    while any(name.startswith(f"encoder.downsamples.{index}.") for name in weights.meta):
        prefix = f"encoder.downsamples.{index}"
        if f"{prefix}.resample.1.weight" in weights.meta:
            widths.append(last // dim)
            halvings.append(f"{prefix}.time_conv.weight" in weights.meta)
        else:
            last = weights.shape(f"{prefix}.residual.2.weight")[0]
            blocks += not halvings
        index += 1
    return {
        "base_dim": dim,
        "z_dim": weights.shape("conv2.weight")[0],
        "dim_mult": [*widths, last // dim],
        "num_res_blocks": blocks,
        "temperal_downsample": halvings,
    }


def _original_transformer_config(weights: Weights, names: dict[str, str]) -> dict:
    """Reads the shape of an original DiT off its tensors. The number of heads leaves no trace
    there: an original config.json beside the weights gives it, else heads are 128 wide, as in every
    Wan2.1.

    names: Wan's own -> the file's.
    """

    def shape(name: str) -> torch.Size:
        return weights.shape(names.get(name, name))

    dim, channels, *patch = shape("patch_embedding.weight")
    path = weights.path
    file = (path if path.is_dir() else path.parent) / "config.json"
    stored = read_json(file) if file.is_file() else {}
    try:
        ORIGINAL.check(stored)
    except FieldError as error:
        raise ValueError(f"{file}: {error}. Fetch it anew.") from error
    heads = stored.get("num_heads", dim // WAN_HEAD_DIM)
    if not heads or dim % heads:
        raise ValueError(
            f"{path}: width {dim} is no multiple of {WAN_HEAD_DIM}. Put a config.json with "
            "num_heads beside it."
        )
    blocks = {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": shape("head.head.weight")[0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "num_layers": len(blocks),
        "cross_attn_norm": "blocks.0.norm3.weight" in names,
        **(
            {"image_dim": shape("img_emb.proj.0.weight")[0], "added_kv_proj_dim": dim}
            if "img_emb.proj.0.weight" in names
            else {}
        ),
        "eps": stored.get("eps", 1e-6),
    }


def weights_sha256(model: nn.Module) -> str:
    """Hashes all tensors in fp32, by name: the same for every layout and precision that holds the
    same numbers."""
    return tensors_sha256(model.state_dict())


def transformer_sha256(transformer: WanTransformer3DModel) -> str:
    """Hashes FINGERPRINT values of each tensor, evenly spread, which tells 14B weights apart in a
    second. They were taken from the file, so that every precision it is loaded in gives the same;
    empty for weights of no file."""
    return transformer.config.get("_sha256", "")


def tensors_sha256(state: Mapping[str, Tensor], values: int | None = None) -> str:
    """Hashes all tensors in fp32, by name, or `values` of each, evenly spread."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if value.is_meta:
            return ""  # shapes without numbers
        flat = value.flatten()
        if values is not None:
            flat = flat[:: max(1, value.numel() // values)].bfloat16()
        digest.update(name.encode())
        digest.update(flat.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _fill(
    model: M,
    weights: Weights,
    names: dict[str, str],
    dtype: torch.dtype,
    prepare: Callable[[M], object] | None = None,
) -> M:
    model.eval().requires_grad_(False)
    # diffusers' own list: norms and the time embedding
    precise = set(model._keep_in_fp32_modules or ())
    dtype_of = lambda name: dtype if precise.isdisjoint(name.split(".")) else torch.float32  # noqa: E731
    assign(model, weights, names, dtype_of, prepare)
    model.register_to_config(_name_or_path=str(weights.path))  # pyright: ignore[reportCallIssue]
    return model
