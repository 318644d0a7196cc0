"""RGBA-VAE training: merge block and decoder LoRA on a frozen Wan2.1 VAE (method of Wan-Alpha,
section 3)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from lightning import LightningModule
from torch import Tensor

from acetate import alpha as compositing
from acetate.draws import ClipDraws
from acetate.losses.diffusion import DiffusionLoss
from acetate.losses.ranks import moments
from acetate.losses.vae import VAELoss
from acetate.metrics.alpha import AlphaQuality
from acetate.metrics.rgb import CompositeQuality, RGBQuality
from acetate.models.compiled import compile_forward
from acetate.models.dit import VelocityField, check_latent_grid, compile_blocks
from acetate.models.ops import fuse_norms
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.wan import Geometry, WanDecoder, WanEncoder, WanHead
from acetate.regions import check_clip_shape
from acetate.tasks.adapter import AdapterTask
from acetate.tasks.example import Group, Load, MeasuredTask
from acetate.tasks.logs import Means, clips_in, log_means, log_quality, share_of, step_means

# parts of the loss; the others are means over a rank's own clips
OF_ALL_RANKS = ("diffusion", "moments")


class Draw(NamedTuple):
    """Random draws for a batch: three backgrounds (B, 3, 1, 1, 1), flow noise, step ids (B,)."""

    encoder: Tensor
    soft: Tensor
    hard: Tensor
    noise: Tensor
    step_ids: Tensor


class RGBAVAETask(AdapterTask, MeasuredTask):
    """Trains reconstruction in three views and, where `diffusion` has a judge, its loss on the
    latents.

    background_per: one palette colour per `clip` and use, or per `batch` (released). moment_weight:
    of the penalty that holds the normalised latents' per-channel mean at 0 and variance at 1, the
    base's own. lpips: measure it in validation (needs VGG16 weights). compile: compiles the VAE's
    halves, the losses and the judge, once for each shape of clips. fused_norm: on a GPU a kernel
    computes norm and SiLU of the VAE (models.norm_kernel). optimization: as in AdapterTask.
    """

    def __init__(
        self,
        *,
        build_vae: Callable[[], RGBAVAE],
        loss: VAELoss,
        diffusion: DiffusionLoss,
        moment_weight: float,
        background_per: str,
        lpips: bool,
        seed: int,
        compile: bool = False,
        fused_norm: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if background_per not in ("clip", "batch"):
            raise ValueError(f"task.background_per {background_per!r}; known: clip, batch.")
        self.build_vae, self.loss, self.diffusion = build_vae, loss, diffusion
        self.moment_weight, self.compile_parts = moment_weight, compile
        self.fused_norm = fused_norm
        self.background_per, self.lpips, self.seed = background_per, lpips, seed
        self.means, self.step_means, self.latent_means = Means(), Means(), Means()
        self.vae: RGBAVAE | None = None
        self.judge: VelocityField | None = None

    def configure_model(self) -> None:
        if self.vae is not None:
            return
        self.vae = self.build_vae()
        if self.shards is not None:
            self.vae.shard(self.shards)
        if self.diffusion.mode != "off":
            self.judge = self.diffusion.build_judge(mesh=self.shards)
        if self.fused_norm:
            fuse_norms(self.vae)
        if self.compile_parts:
            self.vae.compile_halves()
            compile_forward(self.loss)
            if self.judge is not None:
                compile_blocks(self.judge.transformer)
        geometry = self.vae.geometry
        self.composite_quality = CompositeQuality(lpips=self.lpips)
        self.alpha_quality = AlphaQuality(
            time_stride=geometry.time_stride, space_stride=geometry.space_stride
        )

    def draw(self, batch: dict[str, Any], *parts: object) -> Draw:
        """Returns the draws of a batch, the same for the same parts and clip keys."""
        draws = ClipDraws(batch["key"], self.seed, *parts, device=batch["alpha"].device)
        colors = [draws.integers(8) for _ in range(3)]
        if self.background_per == "batch":
            colors = [c[:1].expand_as(c) for c in colors]
        noise = draws.normal(self.vae.geometry.latent_shape(*batch["alpha"].shape[2:]))
        return Draw(
            *map(compositing.palette_colors, colors),
            noise,
            draws.integers(len(self.diffusion.levels)),
        )

    def step(
        self, batch: dict[str, Any], draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Returns loss, its parts, rgb_hat, alpha_hat and the normalised latents."""
        rgb, alpha, vae = batch["rgb"], batch["alpha"], self.vae
        self.check_shape(alpha)
        support = compositing.harden(alpha, self.loss.eps)
        raw = vae.encode(compositing.over(rgb, support, draw.encoder), alpha)
        rgb_hat, alpha_hat = vae.decode(raw)
        loss, parts = self.loss(
            rgb_hat, alpha_hat, rgb, alpha, draw.soft, draw.hard, vae.encoder.feature_maps
        )
        latents = vae.normalise(raw)
        if self.judge is not None:
            strides = vae.geometry.time_stride, vae.geometry.space_stride
            judged = raw if self.diffusion.latents == "raw" else latents
            parts["diffusion"] = self.diffusion(
                judged, alpha, draw.noise, draw.step_ids, self.judge, *strides
            )
            loss = loss + parts["diffusion"]
        if self.moment_weight:
            parts["moments"] = self.moment_weight * moment_penalty(latents[: clips_in(batch)])
            loss = loss + parts["moments"]
        return loss, parts, rgb_hat, alpha_hat, latents

    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        size = load.batch_size
        rgb, alpha = (torch.empty(size, channels, *load.pixels) for channels in (3, 1))
        return {"key": load.keys, "rgb": rgb, "alpha": alpha}

    def example_loss(self, batch: dict[str, Any]) -> Tensor:
        return self.step(batch, self.draw(batch, "train", 0))[0]

    def sharded(self) -> list[Group]:
        judges = [] if self.judge is None else [self.judge.transformer]
        whole = (self.vae.merge, self.vae.decoder_rgb, self.vae.decoder_alpha)
        return [*((part, []) for part in whole), *((judge, [*judge.blocks]) for judge in judges)]

    def check_shape(self, alpha: Tensor) -> None:
        """Raises ValueError for a clip that the VAE, or the judge, cannot take."""
        geometry = self.vae.geometry
        check_clip_shape(*alpha.shape[2:], geometry.time_stride, geometry.space_stride)
        if self.judge is not None:
            check_latent_grid(self.judge.transformer, *alpha.shape[3:], geometry.space_stride)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        draw = self.draw(batch, "train", self.global_step)
        loss, parts, _, _, latents = self.step(batch, draw)
        size = clips_in(batch)
        values = {"train/loss": loss, **{f"train/{name}": value for name, value in parts.items()}}
        log_means(self, self.step_means, values, size)
        self.log_latents(latents[:size].detach(), size)
        whole = sum(parts[name] for name in OF_ALL_RANKS if name in parts)
        return {"loss": share_of(self, loss, size, whole), "parts": parts}

    def log_latents(self, latents: Tensor, size: int) -> None:
        """Logs mean and standard deviation in the base's normalised space, where the DiT expects 0
        and 1: of each channel, as z/, which dashboards show after all else, and of all, over the
        step's clips."""
        rows = (
            latents.double().transpose(0, 1).flatten(1)
            if size
            else latents.new_zeros(latents.shape[1], 1)
        )
        sums = {"mean": rows.mean(1), "square": rows.square().mean(1)}
        values = {
            f"{name}_{c:02}": x for name, of_all in sums.items() for c, x in enumerate(of_all)
        }
        means = step_means(self, self.latent_means, values, size)
        if not means:
            return
        mean, square = (
            torch.stack([means[f"{n}_{c:02}"] for c in range(len(rows))]).double() for n in sums
        )
        deviation = (square - mean**2).clamp_min(0).sqrt()
        of_all = (square.mean() - mean.mean() ** 2).clamp_min(0).sqrt()
        self.log_dict({"latents/mean": mean.mean(), "latents/std": of_all}, batch_size=max(1, size))
        for c, pair in enumerate(zip(mean, deviation, strict=True)):
            names = (f"z/mean_{c:02}", f"z/std_{c:02}")
            self.log_dict(dict(zip(names, pair, strict=True)), batch_size=max(1, size))

    def validation_draw(self, batch: dict[str, Any]) -> Draw:
        """Returns draws that are the same at every validation, a function of the clips' keys."""
        return self.draw(batch, "val", 0)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        loss, parts, rgb_hat, alpha_hat, _ = self.step(batch, self.validation_draw(batch))
        alpha_hat, size = compositing.one_channel(alpha_hat), clips_in(batch)
        self.means.add(
            {"val/loss": loss, **{f"val/{name}": value for name, value in parts.items()}}, size
        )
        if size:
            self.composite_quality.update(rgb_hat, alpha_hat, batch["rgb"], batch["alpha"])
            self.alpha_quality.update(alpha_hat, batch["alpha"])
        return {"loss": loss, "rgb_hat": rgb_hat, "alpha_hat": alpha_hat}

    def on_validation_epoch_end(self) -> None:
        self.means.log(self)
        log_quality(self, rgb=self.composite_quality, alpha=self.alpha_quality)

    def facts(self) -> dict[str, Any]:
        vae = self.vae
        return {
            "kind": vae.kind,
            "base": vae.source,
            "base_sha256": vae.base_sha256,
            "merge_init": vae.merge_init,
            "lora_rank": vae.lora_rank,
            "lora_alpha": vae.lora_alpha,
            "average_alpha": vae.average_alpha,
            "eps": self.loss.eps,
        }


def moment_penalty(latents: Tensor) -> Tensor:
    """Returns the penalty of the batch on all ranks; where no gradients are kept, in validation,
    the mean of each clip's own."""
    parts = [latents] if torch.is_grad_enabled() else latents.split(1)
    means, variances = zip(
        *(moments(part.transpose(0, 1).flatten(1)) for part in parts), strict=True
    )
    return (torch.stack(means) ** 2 + (torch.stack(variances) - 1) ** 2).mean()


class PlainVAETask(LightningModule):
    """Measures the frozen base VAE on the same clips as plain RGB: the ceiling of an RGBA-VAE on
    its latents.

    Each composite over the 8 palette colours goes through the base by itself, and so does alpha as
    a grey picture.
    """

    def __init__(self, *, vae: AutoencoderKLWan, lpips: bool) -> None:
        super().__init__()
        self.geometry = Geometry.of(vae)
        self.encoder, self.head, self.decoder = WanEncoder(vae), WanHead(vae), WanDecoder(vae)
        self.requires_grad_(False)
        self.rgb_quality = RGBQuality(lpips=lpips)
        self.alpha_quality = AlphaQuality(
            time_stride=self.geometry.time_stride, space_stride=self.geometry.space_stride
        )

    def forward(self, video: Tensor) -> Tensor:
        """Returns the reconstruction of (B, 3, T, H, W) in [-1, 1], unclamped."""
        dtype = self.head.norm_out.gamma.dtype
        return self.decoder(self.head(self.encoder(video.to(dtype)))[0]).to(video.dtype)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        rgb, alpha = batch["rgb"], batch["alpha"]
        for color in compositing.palette(rgb.device):
            composite = compositing.over(rgb, alpha, color)
            self.rgb_quality.update(self(composite), composite)
        matte = self((alpha * 2 - 1).expand_as(rgb)).mean(1, keepdim=True)
        self.alpha_quality.update((matte + 1) / 2, alpha)

    def on_validation_epoch_end(self) -> None:
        log_quality(self, rgb=self.rgb_quality, alpha=self.alpha_quality)
