"""Reads a trained RGBA-VAE from any file that holds one: acetate's adapters, Wan-Alpha's releases,
ComfyUI's pair."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acetate.formats.trained import read_whole_adapters
from acetate.formats.wan_alpha import trainable_from_wan_alpha, unwrapped
from acetate.models.adapters import load_trainable
from acetate.models.loading import load_vae
from acetate.models.plain_vae import PlainVAE
from acetate.models.rgba_vae import RGBAVAE, RGBADecoders
from acetate.models.weights import SUFFIXES, read_weights

# What the released VAE was trained with; its files do not say. Its inference averages alpha's three
# channels.
RELEASED = {"merge_init": "scratch", "lora_alpha": 1.0, "average_alpha": True, "eps": 0.0}
CHANNELS = ("rgb", "alpha")  # of ComfyUI's pair, in the names of its files


def load_rgba_vae(
    *,
    vae: str,
    adapters: str | Sequence[str] | None,
    chunk: int | None = None,
    frozen_dtype: str = "float32",
    checkpointing: bool = False,
) -> RGBADecoders:
    """Loads base `vae` with `adapters`, frozen: an RGBAVAE, or RGBADecoders where the files hold no
    merge block.

    adapters: a file of experiment=vae_rgba or the newest one below a folder; the released VAE
    checkpoint (flat, or in a training checkpoint's state_dict); its decoder.bin; or ComfyUI's
    merged pair, as a folder or as [rgb, alpha]; None: the base alone, as a PlainVAE. Raises
    FileNotFoundError without a file, and ValueError for one of another kind, of another base, or
    that does not fit.
    """
    base = load_vae(vae)
    if adapters is None:
        return PlainVAE(vae=base, chunk=chunk, frozen_dtype=frozen_dtype).eval()
    settings: dict[str, Any] = {"checkpointing": checkpointing, "chunk": chunk}
    pair = comfyui_pair(adapters)
    if pair is not None:
        rgb, alpha = (_like(load_vae(str(file)), base, file) for file in pair)
        model = RGBADecoders(rgb=rgb, alpha=alpha, **settings)
    else:
        path, state, facts = read_rgba_vae(str(adapters), base.config.num_res_blocks)
        if any(name.startswith("merge.") for name in state):
            names = ("merge_init", "lora_rank", "lora_alpha", "average_alpha")
            model = RGBAVAE(vae=base, **{name: facts[name] for name in names}, **settings)
            if model.base_sha256 != facts.get("base_sha256", model.base_sha256):
                raise ValueError(
                    f"{path} was trained on another base VAE ({facts['base']}, sha256 "
                    f"{facts['base_sha256'][:12]}) than {vae} ({model.base_sha256[:12]}). Choose "
                    "the wan= it was trained with."
                )
        else:
            model = RGBADecoders(
                rgb=base,
                alpha=copy.deepcopy(base),
                average_alpha=facts["average_alpha"],
                **settings,
            )
            model.adapt(facts["lora_rank"], facts["lora_alpha"])
        load_trainable(model, state, str(path))
    model.cast_frozen(frozen_dtype)
    model.requires_grad_(False)  # after the cast: what was trained stays in fp32
    return model.eval()


def read_rgba_vae(
    source: str, res_blocks: int = 2
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Returns path, trainable tensors in RGBAVAE's names, and the known facts: merge_init,
    lora_rank, eps, ...

    res_blocks: of the base VAE's config, on which released names depend. Raises as `load_rgba_vae`
    does.
    """
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES and path.is_file() and not _is_acetate(path):
        flat = unwrapped(read_weights(path, wrapped=True), str(path))
        state = trainable_from_wan_alpha(flat, res_blocks, str(path))
        ranks = [len(value) for name, value in state.items() if name.endswith(".A")]
        if not ranks or min(ranks) < 1:
            raise ValueError(
                f"{path}: no lora_A in it, or an empty one; every lora_B needs its own. Fetch it "
                "anew."
            )
        return path, state, RELEASED | {"lora_rank": ranks[0]}
    return read_whole_adapters(source, "rgba_vae")


def comfyui_pair(adapters: str | Sequence[str]) -> tuple[Path, Path] | None:
    """Returns (rgb, alpha), where `adapters` is a list of both or a folder that holds both; else
    None."""
    if not isinstance(adapters, str):
        if len(adapters) != 2:
            raise ValueError(f"rgba_vae={list(adapters)}; a pair is two files, [rgb, alpha].")
        rgb, alpha = (Path(file).expanduser() for file in adapters)
        return rgb, alpha
    folder = Path(adapters).expanduser()
    rgb, alpha = (
        sorted(folder.glob(f"*vae_{channel}_channel*.safetensors")) for channel in CHANNELS
    )
    if not rgb and not alpha:
        return None
    if (len(rgb), len(alpha)) != (1, 1):
        raise ValueError(
            f"{folder} holds {len(rgb)} files *vae_rgb_channel* and {len(alpha)} "
            "*vae_alpha_channel*; needed: one of each. Name them as rgba_vae=[RGB,ALPHA]."
        )
    return rgb[0], alpha[0]


def _is_acetate(path: Path) -> bool:
    """Returns whether the file says that it is acetate's, or is too damaged to say anything, which
    `read_adapters` reports."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return "kind" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


def _like(vae: AutoencoderKLWan, base: AutoencoderKLWan, file: Path) -> AutoencoderKLWan:
    """Gives a VAE the base's latent constants, which files in original names cannot hold."""
    constants = {name: base.config[name] for name in ("latents_mean", "latents_std")}
    ours, theirs = vae.config, base.config
    if any(ours[name] != theirs[name] for name in ("z_dim", "dim_mult", "temperal_downsample")):
        raise ValueError(
            f"{file}: latents of another shape than those of {theirs.get('_name_or_path')}. Choose "
            "its wan=."
        )
    vae.register_to_config(**constants)
    return vae
