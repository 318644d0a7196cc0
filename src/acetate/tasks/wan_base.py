"""Training the tiny base model itself: a plain RGB VAE and a text-to-video flow model of Wan's architecture."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from lightning import LightningModule
from torch import Tensor, nn

from acetate.losses.terms import sobel_l1
from acetate.metrics.rgb import RGBQuality
from acetate.models.wan import WanDecoder, WanEncoder, WanHead, save_vae
from acetate.tasks.optim import adamw_with_warmup


def start_as_image_model_(vae: AutoencoderKLWan) -> None:
    """Temporal taps that look back start at zero, temporal resampling at averaging and repeating.

    A causal convolution then is the 2-D convolution of its last tap, so that training may begin on images and
    go on with clips. Latents start with little noise (variance e^-6): at 1 the signal drowns and nothing is learnt.
    """
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = -6
        for name, module in vae.named_modules():
            if not isinstance(module, nn.Conv3d) or module.kernel_size[0] == 1:
                continue
            if not name.endswith("time_conv"):
                module.weight[:, :, :-1] = 0
                continue
            channels = module.in_channels
            identity = torch.eye(channels)
            module.weight.zero_()
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if module.stride[0] == 2:
                module.weight[:, :, 1, 0, 0] = module.weight[:, :, 2, 0, 0] = identity / 2
            else:
                module.weight[:channels, :, -1, 0, 0] = module.weight[channels:, :, -1, 0, 0] = identity


class WanVAETask(LightningModule):
    """L = |x_hat - x|_1 + w_edge |edge(x_hat) - edge(x)|_1 + w_kl KL(q(z|x) || N(0, 1)), z ~ q.

    `init_from` is a diffusers folder to go on from (an image model before clips); `save_to` receives the
    trained VAE in diffusers layout with its measured latent mean and standard deviation.
    """

    def __init__(
        self,
        *,
        vae: AutoencoderKLWan,
        lr: float,
        warmup_steps: int,
        edge_weight: float,
        kl_weight: float,
        save_to: str,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        if init_from is None:
            start_as_image_model_(vae)
        else:
            vae.load_state_dict(AutoencoderKLWan.from_pretrained(init_from).state_dict())
        self.vae = vae
        self.encoder, self.head, self.decoder = WanEncoder(vae), WanHead(vae), WanDecoder(vae)
        self.lr, self.warmup_steps = lr, warmup_steps
        self.edge_weight, self.kl_weight = edge_weight, kl_weight
        self.save_to = Path(save_to)
        self.quality = RGBQuality()
        self.latents: list[Tensor] = []

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        video = batch["video"]
        mean, log_variance = self.head(self.encoder(video))
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        video_hat = self.decoder(latents)
        parts = {
            "l1": (video_hat - video).abs().mean(),
            "edge": self.edge_weight * sobel_l1(video_hat, video),
            "kl": self.kl_weight * 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean(),
        }
        loss = sum(parts.values())
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        return {"loss": loss, "parts": parts}

    def on_validation_epoch_start(self) -> None:
        self.latents.clear()

    def validation_step(self, batch: dict, batch_idx: int) -> dict:
        latents, _ = self.head(self.encoder(batch["video"]))
        video_hat = self.decoder(latents)
        self.quality.update(video_hat, batch["video"])
        self.latents.append(latents.float().cpu())
        return {"rgb_hat": video_hat}

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.quality.compute().items()}, prog_bar=True)
        self.quality.reset()
        per_channel = torch.cat([x.transpose(0, 1).flatten(1) for x in self.latents], 1)
        self.vae.register_to_config(latents_mean=per_channel.mean(1).tolist(), latents_std=per_channel.std(1).tolist())
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            save_vae(self.vae, self.save_to)

    def configure_optimizers(self) -> dict:
        return adamw_with_warmup(
            self.vae.parameters(),
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.trainer.max_steps,
        )
