"""Models of a base's shapes without numbers, on the meta device: to measure them, and to know their
sizes before anything is downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan, ModelMixin, WanTransformer3DModel

from acetate.losses.perceptual import LPIPSFeatures, VGGFeatures
from acetate.models.dit import FrozenDiT, VelocityField
from acetate.models.experts import PARTS

# Wan's DiTs where they differ from diffusers' defaults, which are the 14B's and each A14B expert's
WAN21 = {"14B": {}, "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}}
# Beside that, image-to-video DiTs read a condition, and Wan2.1's a CLIP embedding (from diffusers'
# convert_wan_to_diffusers.py)
I2V = {"in_channels": 36}
CLIP = {"image_dim": 1280, "added_kv_proj_dim": 5120}
M = TypeVar("M", bound=ModelMixin)


def blank_vae(source: str) -> AutoencoderKLWan:
    """Builds a VAE as load_vae does, on the meta device. A source that is no diffusers folder has
    Wan2.1's shape."""
    return _blank(AutoencoderKLWan, _diffusers_config(source, "vae") or {}, torch.float32)


def blank_transformer(
    source: str, dtype: torch.dtype, part: str = "transformer"
) -> WanTransformer3DModel:
    """Builds a DiT as load_transformer does, on the meta device. Raises ValueError for a source
    whose shape is not known."""
    config = _diffusers_config(source, part)
    if config is None:
        name = Path(source).name
        config = next((shape for size, shape in WAN21.items() if size in name), None)
        if config is not None and "I2V" in name:
            config = config | I2V | ({} if "A14B" in name else CLIP)
    if config is None:
        raise ValueError(
            f"{source}: the shape of this DiT is not known. Give a diffusers folder (with "
            f"transformer/config.json), or a source whose name says its size ({', '.join(WAN21)})."
        )
    return _blank(WanTransformer3DModel, config, dtype)


class BlankDiT(FrozenDiT):
    """A FrozenDiT whose base has no values."""

    def read(
        self, prepare: Callable[[WanTransformer3DModel], object] | None
    ) -> WanTransformer3DModel:
        part = PARTS[self.expert or "high"]
        transformer = blank_transformer(self.source, getattr(torch, self.dtype), part)
        if prepare is not None:
            prepare(transformer)
        return transformer


def blank_velocity_field(
    *, transformer: str, prompt_length: int, dtype: str, **_: Any
) -> VelocityField:
    """Builds a velocity field as load_velocity_field does, on the meta device."""
    model = blank_transformer(transformer, getattr(torch, dtype))
    return VelocityField(model, torch.empty(1, prompt_length, model.config.text_dim, device="meta"))


def blank_lpips() -> LPIPSFeatures:
    return LPIPSFeatures(pretrained=False)


def blank_vgg(*, imagenet_norm: bool, **_: Any) -> VGGFeatures:
    return VGGFeatures(imagenet_norm=imagenet_norm, pretrained=False)


# Config targets that read weights -> those that build the same without
BLANK = {
    "acetate.models.loading.load_vae": "acetate.blank.blank_vae",
    "acetate.models.dit.FrozenDiT": "acetate.blank.BlankDiT",
    "acetate.models.dit.load_velocity_field": "acetate.blank.blank_velocity_field",
    "acetate.losses.perceptual.LPIPSFeatures": "acetate.blank.blank_lpips",
    "acetate.losses.perceptual.VGGFeatures": "acetate.blank.blank_vgg",
}


def _diffusers_config(source: str, part: str) -> dict[str, Any] | None:
    folder = Path(source).expanduser()
    models: dict[str, Any] = {"vae": AutoencoderKLWan}
    model = models.get(part, WanTransformer3DModel)
    for place in (folder / part, folder):
        if (place / "config.json").is_file():
            config = model.load_config(place)
            return config if config.get("_class_name") == model.__name__ else None
    return None


def _blank(model: type[M], config: dict[str, Any], dtype: torch.dtype) -> M:
    with torch.device("meta"):
        blank = model.from_config(config)
    precise = set(blank._keep_in_fp32_modules or ())
    for name, parameter in blank.named_parameters():
        if precise.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return blank.eval().requires_grad_(False)
