"""RGBA-VAE: Wan's frozen encoder seen twice, a merge block, and Wan's decoder twice with LoRA."""

import copy
import hashlib
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from acetate.alpha import one_channel
from acetate.models.adapters import add_lora, trainable_state
from acetate.models.compiled import compile_forward
from acetate.models.loading import tensors_sha256, weights_sha256
from acetate.models.merge import FeatureMerge
from acetate.models.sharding import shard
from acetate.models.wan import Geometry, WanDecoder, WanEncoder, WanHead
from acetate.regions import check_clip_shape

DECODERS_ONLY = (
    "these files hold decoders only, and no merge block. Give the released VAE checkpoint "
    "(pytorch_model.bin), or an adapter file of experiment=vae_rgba."
)


class RGBADecoders(nn.Module):
    """Decodes latents with two of Wan's decoders, one for colour, one for alpha. It decodes only.

    rgb, alpha: two VAEs that share no weights. average_alpha: alpha is the mean of its decoder's
    three channels; False keeps all three (released training). checkpointing: recompute decoder
    stages in the backward pass. chunk: latent frames at a time for clips too long to run whole;
    None runs them whole.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        rgb: AutoencoderKLWan,
        alpha: AutoencoderKLWan,
        average_alpha: bool = True,
        checkpointing: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(
                f"model.chunk={chunk}; latent frames at a time, at least 1, or null for whole "
                "clips."
            )
        if chunk is not None and checkpointing:
            raise ValueError(
                "model.checkpointing recomputes whole clips. Set model.chunk=null, or "
                "checkpointing=false."
            )
        self.geometry = Geometry.of(rgb)
        if {len(self.geometry.mean), len(self.geometry.std)} != {self.geometry.channels}:
            raise ValueError(
                f"{rgb.config.get('_name_or_path')}: {len(self.geometry.mean)} latent means and "
                f"{len(self.geometry.std)} deviations for {self.geometry.channels} channels. "
                "Repair its config.json."
            )
        self.average_alpha, self.chunk = average_alpha, chunk
        self.decoder_rgb = WanDecoder(rgb, checkpointing).requires_grad_(False)
        self.decoder_alpha = WanDecoder(alpha, checkpointing).requires_grad_(False)
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(self.geometry.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(self.geometry.std).view(shape), persistent=False)

    def adapt(self, rank: int, alpha: float) -> None:
        """Puts LoRA on every convolution of both decoders."""
        for decoder in (self.decoder_rgb, self.decoder_alpha):
            add_lora(decoder.net, rank, alpha)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (C, F, h, w) of the latents of a clip."""
        return self.geometry.latent_shape(frames, height, width)

    def cast_frozen(self, dtype: str) -> None:
        """Casts all parameters that do not train to this type."""
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))

    def encode(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Raises ValueError: decoders alone cannot encode."""
        raise ValueError(f"No latents without an encoder: {DECODERS_ONLY}")

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns rgb_hat (B, 3, T, H, W) about [-1, 1] and alpha_hat (B, 1 or 3, T, H, W) about
        [0, 1]; neither is clamped."""
        raw = raw.to(self.decoder_rgb.post_quant_conv.weight.dtype)
        rgb_hat = self.decoder_rgb(raw, self.chunk).to(self.mean.dtype)
        matte = self.decoder_alpha(raw, self.chunk).to(self.mean.dtype)
        if self.average_alpha:
            matte = one_channel(matte)
        return rgb_hat, (matte + 1) / 2

    def normalise(self, raw: Tensor) -> Tensor:
        """Returns latents as the DiT sees them: (raw - mean) / std per channel, with the base VAE's
        constants."""
        return (raw - self.mean) / self.std

    def denormalise(self, normalised: Tensor) -> Tensor:
        return normalised * self.std + self.mean

    def latents_sha256(self) -> str | None:
        """Returns None: decoders say nothing of the latents that they were trained on."""
        return None


class RGBAVAE(RGBADecoders):
    """Encodes colour and alpha into Wan's latent space, and decodes them (Wan-Alpha, section 3.1).

    merge_init: `residual` (raw = Wan's own latents of rgb + merge, merge starts at zero) or
    `scratch`. average_alpha, checkpointing, chunk: as RGBADecoders. trainable_dtype: master
    precision of what trains; frozen_dtype: of all else. kind: that of its adapter files.
    """

    kind = "rgba_vae"

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
        trainable_dtype: str = "float32",
        frozen_dtype: str = "float32",
    ) -> None:
        source, base_sha256 = vae.config.get("_name_or_path", ""), weights_sha256(vae)
        vae.requires_grad_(False)
        super().__init__(
            rgb=copy.deepcopy(vae),
            alpha=copy.deepcopy(vae),
            average_alpha=average_alpha,
            checkpointing=checkpointing,
            chunk=chunk,
        )
        self.source, self.base_sha256 = source, base_sha256
        self.lora_rank, self.lora_alpha, self.merge_init = lora_rank, lora_alpha, merge_init
        self.encoder, self.head = WanEncoder(vae), WanHead(vae)
        features = vae.encoder.norm_out.gamma.shape[0]
        self.merge = FeatureMerge(features, self.geometry.channels, merge_init)
        self.adapt(lora_rank, lora_alpha)
        for parameter in trainable_state(self).values():
            parameter.data = parameter.data.to(getattr(torch, trainable_dtype))
        self.cast_frozen(frozen_dtype)

    def encode(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """Returns raw latents (B, 16, F, h, w).

        rgb (B, 3, T, H, W) in [-1, 1] already hard-rendered over a background; alpha (B, 1, T, H,
        W) in [0, 1].
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

    def compile_halves(self, backend: str = "inductor") -> None:
        """Compiles encoder and decoders, as compile_forward does."""
        for half in (self.encoder, self.decoder_rgb, self.decoder_alpha):
            compile_forward(half, backend)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shards the merge block and each decoder, each gathered by itself. Encoder and head stay
        whole on every rank: frozen, used three times a step, 0.1 GB in bf16."""
        shard([self.merge, self.decoder_rgb, self.decoder_alpha], mesh)

    def latents_sha256(self) -> str:
        """Hashes what latents depend on: the base, the merge block and how it starts. Decoder LoRA
        has no part in it."""
        return latents_sha256(self.base_sha256, self.merge_init, self.merge.state_dict())


def latents_sha256(base_sha256: str, merge_init: str, merge: Mapping[str, Tensor]) -> str:
    """Returns RGBAVAE.latents_sha256 of a VAE that is not built. merge: tensors as the block names
    them."""
    text = f"{base_sha256}{merge_init}{tensors_sha256(merge)}"
    return hashlib.sha256(text.encode()).hexdigest()
