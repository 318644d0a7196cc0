"""RGBA-VAE: Wan's frozen encoder seen twice, a merge block, and Wan's decoder twice with LoRA."""

import copy
import hashlib

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from acetate.models.adapters import add_lora, load_trainable, read_adapters
from acetate.models.loading import load_vae, weights_sha256
from acetate.models.merge import FeatureMerge
from acetate.models.wan import Geometry, WanDecoder, WanEncoder, WanHead
from acetate.regions import check_clip_shape


class RGBAVAE(nn.Module):
    """Colour and alpha in Wan's latent space (Wan-Alpha, section 3.1).

    merge_init: `residual` (raw = Wan's own latents of rgb + merge, merge starts at zero) or `scratch`.
    average_alpha: alpha is the mean of its decoder's three channels; False keeps all three (released code).
    checkpointing: recompute decoder stages in the backward pass. chunk: latent frames at a time for clips too
    long to run whole; None runs them whole. frozen_dtype: of all that does not train.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        vae: AutoencoderKLWan,
        merge_init: str,
        lora_rank: int,
        lora_alpha: float,
        average_alpha: bool = True,
        checkpointing: bool = False,
        chunk: int | None = None,
        frozen_dtype: str = "float32",
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"model.chunk={chunk}; latent frames at a time, at least 1, or null for whole clips.")
        if chunk is not None and checkpointing:
            raise ValueError(
                "model.checkpointing recomputes whole clips. Set model.chunk=null, or checkpointing=false."
            )
        self.geometry = Geometry.of(vae)
        if {len(self.geometry.mean), len(self.geometry.std)} != {self.geometry.channels}:
            raise ValueError(
                f"{vae.config.get('_name_or_path')}: {len(self.geometry.mean)} latent means and "
                f"{len(self.geometry.std)} deviations for {self.geometry.channels} channels. Repair its config.json."
            )
        self.source, self.base_sha256 = vae.config.get("_name_or_path", ""), weights_sha256(vae)
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.merge_init, self.average_alpha, self.chunk = merge_init, average_alpha, chunk
        vae.requires_grad_(False)
        self.encoder, self.head = WanEncoder(vae), WanHead(vae)
        features = vae.encoder.norm_out.gamma.shape[0]
        self.merge = FeatureMerge(features, self.geometry.channels, merge_init)
        self.decoder_rgb = WanDecoder(copy.deepcopy(vae), checkpointing)
        self.decoder_alpha = WanDecoder(copy.deepcopy(vae), checkpointing)
        for decoder in (self.decoder_rgb, self.decoder_alpha):
            add_lora(decoder.net, lora_rank, lora_alpha)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, frozen_dtype))
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(self.geometry.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(self.geometry.std).view(shape), persistent=False)

    def encode(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Raw latents (B, 16, F, h, w).

        rgb (B, 3, T, H, W) in [-1, 1] already hard-rendered over a background; alpha (B, 1, T, H, W) in [0, 1].
        """
        check_clip_shape(*alpha.shape[2:], self.geometry.time_stride, self.geometry.space_stride)
        dtype = self.encoder.net.conv_in.weight.dtype
        matte = (alpha * 2 - 1).expand_as(rgb)
        with torch.no_grad():  # frozen, and its input is data
            both = self.encoder(torch.cat([rgb, matte]).to(dtype), self.chunk)
            rgb_features, alpha_features = both.chunk(2)
            wan_latents = self.head(rgb_features)[0] if self.merge_init == "residual" else None
        merged = self.merge(rgb_features.to(self.mean.dtype), alpha_features.to(self.mean.dtype))
        return merged if wan_latents is None else wan_latents + merged

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """rgb_hat (B, 3, T, H, W) about [-1, 1] and alpha_hat (B, 1, T, H, W) about [0, 1]; neither is clamped."""
        raw = raw.to(self.decoder_rgb.post_quant_conv.weight.dtype)
        rgb_hat = self.decoder_rgb(raw, self.chunk).to(self.mean.dtype)
        matte = self.decoder_alpha(raw, self.chunk).to(self.mean.dtype)
        if self.average_alpha:
            matte = matte.mean(1, keepdim=True)
        return rgb_hat, (matte + 1) / 2

    def normalise(self, raw: Tensor) -> Tensor:
        """What the DiT sees: (raw - mean) / std per channel, with the base VAE's constants."""
        return (raw - self.mean) / self.std

    def denormalise(self, normalised: Tensor) -> Tensor:
        return normalised * self.std + self.mean

    def latents_sha256(self) -> str:
        """Of what latents depend on: the base, the merge block and how it starts. Decoder LoRA has no part in it."""
        digest = hashlib.sha256(f"{self.base_sha256}{self.merge_init}{weights_sha256(self.merge)}".encode())
        return digest.hexdigest()


def load_rgba_vae(
    *, vae: str, adapters: str, chunk: int | None = None, frozen_dtype: str = "float32", checkpointing: bool = False
) -> RGBAVAE:
    """A trained RGBA-VAE: base `vae` and an adapter file of experiment=vae_rgba, or the newest one below a folder.

    Frozen. Raises FileNotFoundError without a file, and ValueError for adapters of another kind or of another base.
    """
    path, state, facts = read_adapters(adapters, kind="rgba_vae")
    base = load_vae(vae)
    model = RGBAVAE(
        vae=base,
        merge_init=facts["merge_init"],
        lora_rank=facts["lora_rank"],
        lora_alpha=facts["lora_alpha"],
        average_alpha=facts["average_alpha"],
        checkpointing=checkpointing,
        chunk=chunk,
        frozen_dtype=frozen_dtype,
    )
    if model.base_sha256 != facts["base_sha256"]:
        raise ValueError(
            f"{path} was trained on another base VAE ({facts['base']}, sha256 {facts['base_sha256'][:12]}) than {vae} "
            f"({model.base_sha256[:12]}). Choose the wan= it was trained with."
        )
    load_trainable(model, {name.removeprefix("vae."): value for name, value in state.items()}, str(path))
    return model.eval().requires_grad_(False)
