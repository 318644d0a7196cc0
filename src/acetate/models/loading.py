"""Wan's VAE, DiT and text encoder from a diffusers folder, a hub name, or the original files: one code path.

A source is a folder (diffusers layout, or the original release's), a single file, or a hub name such as
`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`. Loading is strict: every missing, unused or misshapen tensor is an error.
"""

import hashlib
import inspect
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from acetate.models.adapters import check_fit

WAN_HEAD_DIM = 128
M = TypeVar("M", bound=nn.Module)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def load_vae(source: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """Wan2.1's VAE, or another of its architecture; geometry and normalisation come from its config.

    Raises FileNotFoundError (no such source) and ValueError (weights that do not fit), naming the tensors.
    """
    path = locate(source, "vae")
    state = _read_state(path)
    if any(name.startswith("encoder.downsamples.") for name in state):
        config = _original_vae_config(state, path)
        state = convert_wan_vae_to_diffusers(state)
    else:
        config = _read_config(path, AutoencoderKLWan)
    with init_empty_weights():
        vae = AutoencoderKLWan(**config)
    return _assign(vae, state, path, dtype)


def load_transformer(source: str, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Wan2.1's DiT. Raises as `load_vae` does."""
    path = locate(source, "transformer")
    state = _read_state(path)
    state = {name.removeprefix("model.diffusion_model."): value for name, value in state.items()}
    if "text_embedding.0.weight" in state:
        config = _original_transformer_config(state, path)
        state = convert_wan_transformer_to_diffusers(state)
    else:
        config = _read_config(path, WanTransformer3DModel)
    with init_empty_weights():
        transformer = WanTransformer3DModel(**config)
    return _assign(transformer, state, path, dtype)


def locate(source: str, part: str) -> Path:
    """The file or folder that holds `part` (vae, transformer, ...) of `source`."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / part).is_dir():
            return path / part
        original = sorted(path.glob("*VAE*.pth"))  # the original release keeps it beside the DiT
        return original[0] if part == "vae" and original else path
    if path.is_file():
        return path
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise FileNotFoundError(
            f"{source} does not exist. wan= sources are a diffusers folder, an original Wan file "
            "(Wan2.1_VAE.pth, *.safetensors), or a hub name such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    try:
        folder = Path(snapshot_download(source, allow_patterns=[f"{part}/*"]))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is neither a local path nor could it be fetched from the hub ({type(error).__name__}). "
            "Download it where there is a network and give its folder instead."
        ) from error
    if not (folder / part).is_dir():
        raise FileNotFoundError(f"{source} has no folder {part}/; its diffusers version has (…-Diffusers).")
    return folder / part


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        files = [path]
    else:
        files = next((found for suffix in WEIGHT_SUFFIXES if (found := sorted(path.glob(f"*{suffix}")))), [])
    if not files or files[0].suffix not in WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"{path} holds no weights ({', '.join(WEIGHT_SUFFIXES)}).")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                part = load_file(file)
            else:
                zipped = zipfile.is_zipfile(file)  # files from before torch 1.6 are not, and cannot be mapped
                part = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}). It is truncated or no weight file: fetch it anew."
            ) from error
        if not isinstance(part, dict):
            raise ValueError(f"{file} holds a {type(part).__name__}, no state dict. Give a file of weights.")
        state.update(part)
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{files[0]} holds {others[0]!r}, which is no tensor: a training checkpoint rather than weights? "
            "Give the file of weights that was exported from it."
        )
    return state


def _read_config(path: Path, model: type[nn.Module]) -> dict:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; weights in diffusers names need it beside them.")
    known = inspect.signature(model.__init__).parameters
    return {key: value for key, value in _read_json(file).items() if key in known}


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Fetch it anew.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}; a config is an object of names and values.")
    return value


def _original_vae_config(state: dict[str, Tensor], path: Path) -> dict:
    """Shape of an original VAE read off its tensors; normalisation constants are Wan2.1's."""
    dim = _shape(state, "encoder.conv1.weight", path)[0]
    widths, halvings, blocks, last = [], [], 0, dim
    index = 0
    while any(name.startswith(f"encoder.downsamples.{index}.") for name in state):
        prefix = f"encoder.downsamples.{index}"
        if f"{prefix}.resample.1.weight" in state:
            widths.append(last // dim)
            halvings.append(f"{prefix}.time_conv.weight" in state)
        else:
            last = _shape(state, f"{prefix}.residual.2.weight", path)[0]
            blocks += not halvings
        index += 1
    return {
        "base_dim": dim,
        "z_dim": _shape(state, "conv2.weight", path)[0],
        "dim_mult": [*widths, last // dim],
        "num_res_blocks": blocks,
        "temperal_downsample": halvings,
    }


def _original_transformer_config(state: dict[str, Tensor], path: Path) -> dict:
    """Shape of an original DiT read off its tensors. The number of heads leaves no trace there: an original
    config.json beside the weights gives it, else heads are 128 wide, as in every Wan2.1."""
    dim, channels, *patch = _shape(state, "patch_embedding.weight", path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    stored = _read_json(file) if file.is_file() else {}
    heads = stored.get("num_heads", dim // WAN_HEAD_DIM)
    if not heads or dim % heads:
        raise ValueError(
            f"{path}: width {dim} is no multiple of {WAN_HEAD_DIM}. Put a config.json with num_heads beside it."
        )
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": _shape(state, "head.head.weight", path)[0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": _shape(state, "text_embedding.0.weight", path)[1],
        "freq_dim": _shape(state, "time_embedding.0.weight", path)[1],
        "ffn_dim": _shape(state, "blocks.0.ffn.0.weight", path)[0],
        "num_layers": len(blocks),
        "cross_attn_norm": "blocks.0.norm3.weight" in state,
        "eps": stored.get("eps", 1e-6),
    }


def weights_sha256(model: nn.Module, values: int | None = None) -> str:
    """Of all tensors in fp32, by name: the same for every layout and precision that holds the same numbers.

    values: of each tensor only so many, evenly spread, and in bfloat16, which tells 14B weights apart in a second, the
    same whatever precision they are held in. Empty for a model on the meta device.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if value.is_meta:
            return ""  # shapes without numbers
        flat = value.flatten()
        if values is not None:
            flat = flat[:: max(1, value.numel() // values)].to(torch.bfloat16)
        digest.update(name.encode())
        digest.update(flat.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shape(state: dict[str, Tensor], name: str, path: Path) -> torch.Size:
    if name not in state:
        raise ValueError(f"{path} lacks {name}: not the original Wan2.1 weights, or a truncated file.")
    return state[name].shape


def _assign(model: M, state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> M:
    check_fit(dict(model.state_dict()), state, str(path))
    precise = set(model._keep_in_fp32_modules or ())  # diffusers' own list: norms and the time embedding
    dtypes = {name: dtype if precise.isdisjoint(name.split(".")) else torch.float32 for name in state}
    model.load_state_dict({name: value.to(dtypes[name]) for name, value in state.items()}, assign=True)
    model.register_to_config(_name_or_path=str(path))  # pyright: ignore[reportCallIssue]
    return model.eval().requires_grad_(False)
