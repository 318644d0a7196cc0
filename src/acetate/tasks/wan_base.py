"""Trains the tiny base model itself: a plain RGB VAE and a text-to-video flow model of Wan's
architecture."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from acetate import flow
from acetate.data import synthetic
from acetate.data.endless import EndlessDataModule
from acetate.draws import ClipDraws
from acetate.flow import NoiseLevels
from acetate.losses.terms import SobelL1
from acetate.metrics.rgb import RGBQuality
from acetate.models.dit import velocity
from acetate.models.loading import load_transformer
from acetate.models.wan import Geometry, WanDecoder, WanEncoder, WanHead, replace_folder, save_vae
from acetate.tasks.example import Group, Load, MeasuredTask
from acetate.tasks.logs import Means, log_means
from acetate.tasks.optim import with_warmup


def start_as_image_model_(vae: AutoencoderKLWan) -> None:
    """Initialises a VAE so that it learns images at once, and clips after that.

    Temporal taps that look back start at zero and temporal resampling at averaging and repeating: a
    causal convolution then is the 2-D convolution of its last tap. Residual and attention branches
    end in zeros, and the other weights are twice torch's default, which shrinks signals to a third
    per layer: 20.7 dB after 400 steps where the default stands at 15.2 (measured). Latents start
    with little noise, variance e^-6.
    """
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.zero_()
            elif isinstance(module, WanAttentionBlock):
                module.proj.weight.zero_()
            elif name.endswith("time_conv"):
                _repeat_or_average_(module)
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
                module.weight.mul_(2)
                if module.weight.ndim == 5:
                    module.weight[:, :, :-1] = 0
        vae.quant_conv.bias[vae.config.z_dim :] = -6


def _repeat_or_average_(time_conv: nn.Module) -> None:
    channels = time_conv.in_channels
    time_conv.weight.zero_()
    time_conv.bias.zero_()
    taps = time_conv.weight[..., 0, 0]  # (out, in, 3)
    if time_conv.stride[0] == 2:
        taps[:, :, 1] = taps[:, :, 2] = torch.eye(channels) / 2
    else:
        taps[:channels, :, 2] = taps[channels:, :, 2] = torch.eye(channels)


class WanVAETask(MeasuredTask):
    """Minimises L = |x_hat - x|^2 + w_edge |edge(x_hat) - edge(x)|_1 + w_kl KL(q(z|x) || N(0, 1)),
    z ~ q.

    `init_from` is a diffusers folder to go on from (an image model before clips); `save_to`
    receives the trained VAE in diffusers layout with its measured latent mean and standard
    deviation.
    """

    def __init__(
        self,
        *,
        vae: AutoencoderKLWan,
        lr: float,
        warmup_steps: int,
        edge_weight: float,
        kl_weight: float,
        seed: int,
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
        self.lr, self.warmup_steps, self.seed = lr, warmup_steps, seed
        self.edge_weight, self.kl_weight, self.sobel_l1 = edge_weight, kl_weight, SobelL1()
        self.save_to = Path(save_to)
        self.quality, self.step_means = RGBQuality(), Means()
        self.latents: list[Tensor] = []

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        video = batch["video"]
        mean, log_variance = self.head(self.encoder(video))
        log_variance = log_variance.clamp(-30, 20)
        draws = ClipDraws(batch["key"], self.seed, "train", self.global_step, device=self.device)
        latents = mean + (0.5 * log_variance).exp() * draws.normal(mean.shape[1:])
        video_hat = self.decoder(latents)
        parts = {
            "mse": (video_hat - video).square().mean(),
            "edge": self.edge_weight * self.sobel_l1(video_hat, video),
            "kl": self.kl_weight * 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean(),
        }
        loss = sum(parts.values())
        values = {"train/loss": loss, **{f"train/{name}": value for name, value in parts.items()}}
        log_means(self, self.step_means, values, len(batch["key"]))
        return {"loss": loss, "parts": parts}

    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        return {"key": load.keys, "video": torch.empty(load.batch_size, 3, *load.pixels)}

    def example_loss(self, batch: dict[str, Any]) -> Tensor:
        return self.training_step(batch, 0)["loss"]

    def sharded(self) -> list[Group]:
        return [(self, [])]

    def on_validation_epoch_start(self) -> None:
        self.latents.clear()

    def validation_step(self, batch: dict, batch_idx: int) -> dict:
        latents, _ = self.head(self.encoder(batch["video"]))
        video_hat = self.decoder(latents)
        self.quality.update(video_hat, batch["video"])
        self.latents.append(latents.float().cpu())
        return {"rgb_hat": video_hat}

    def on_validation_epoch_end(self) -> None:
        self.log_dict(
            {f"val/{name}": value for name, value in self.quality.compute().items()}, prog_bar=True
        )
        self.quality.reset()
        per_channel = torch.cat([x.transpose(0, 1).flatten(1) for x in self.latents], 1)
        self.vae.register_to_config(
            latents_mean=per_channel.mean(1).tolist(), latents_std=per_channel.std(1).tolist()
        )
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            save_vae(self.vae, self.save_to)

    def configure_optimizers(self) -> dict:
        return with_warmup(
            self.vae.parameters(),
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.trainer.max_steps,
        )


def known_prompts() -> list[str]:
    """Prompts of the transparent clips and of the composites that the tiny base is shown."""
    transparent = [
        synthetic.render(kind, seed, 1, 8, 8).prompt
        for kind in synthetic.KINDS
        for seed in range(60)
    ]
    clips = EndlessDataModule(
        frames=1, height=8, width=8, batch_size=1, val_clips=1, seed=0, num_workers=0, smallest=0.45
    ).numbered(start=0, length=400, step=1)
    return transparent + [str(clips[number]["prompt"]) for number in range(len(clips))]


def train_tokenizer(
    prompts: Sequence[str], vocabulary: int, length: int
) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE with T5's special tokens; like T5's it appends </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )


class WanDiTTask(MeasuredTask):
    """Trains a small text-to-video Wan DiT with its own text encoder, by flow matching on a frozen
    VAE's latents.

    l = |DiT(x_t, t, prompt) - (noise - z)|^2, z normalised, one noise level per clip, drawn from a
    schedule of `shift`: Wan's 5 is for large pictures and leaves small ones few levels where shapes
    and colours are decided. Validation draws with Wan's. text: width and layers of the text
    encoder, and the vocabulary of its tokenizer. Prompts are dropped with probability
    `prompt_dropout`. `save_to` receives transformer, text_encoder and tokenizer in
    diffusers layout; `init_from` is such a folder to go on from.
    """

    def __init__(
        self,
        *,
        vae: AutoencoderKLWan,
        transformer: WanTransformer3DModel,
        text: Mapping[str, int],
        prompt_length: int,
        prompt_dropout: float,
        shift: float,
        lr: float,
        warmup_steps: int,
        seed: int,
        save_to: str,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.levels, self.train_levels = flow.schedule(), flow.schedule(shift=shift)
        self.geometry = Geometry.of(vae)
        self.encoder, self.head = WanEncoder(vae.requires_grad_(False)), WanHead(vae)
        self.transformer = transformer
        self.tokenizer = train_tokenizer(known_prompts(), text["vocabulary"], prompt_length)
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer),
                d_model=text["width"],
                d_kv=text["width"] // 4,
                num_heads=4,
                d_ff=2 * text["width"],
                num_layers=text["layers"],
                dropout_rate=0.0,  # chance belongs to the clip, not to hidden generator state
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        if init_from is not None:
            self.start_from(Path(init_from))
        self.prompt_length, self.prompt_dropout = prompt_length, prompt_dropout
        self.lr, self.warmup_steps, self.seed = lr, warmup_steps, seed
        self.save_to, self.step_means = Path(save_to), Means()
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(self.geometry.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(self.geometry.std).view(shape), persistent=False)

    def start_from(self, folder: Path) -> None:
        """Takes over transformer, text encoder and tokenizer of an earlier training."""
        self.transformer.load_state_dict(load_transformer(str(folder)).state_dict())
        text = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.text_encoder.load_state_dict(text.state_dict())
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")

    def context(self, prompts: list[str]) -> Tensor:
        """Returns (B, L, text_width), zeros after each prompt's last token, as Wan's DiT reads
        UMT5."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.prompt_length,
            return_tensors="pt",
        ).to(self.device)
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return embeds * tokens.attention_mask[..., None]

    def step(self, batch: dict[str, Any], draws: ClipDraws, levels: NoiseLevels) -> Tensor:
        ids = levels.seen(draws.integers(len(levels)))
        kept = draws.integers(1000) >= 1000 * self.prompt_dropout
        prompts = [
            prompt if keep else ""
            for prompt, keep in zip(batch["prompt"], kept.tolist(), strict=True)
        ]
        latents = self.latents(batch)
        return self.error(latents, prompts, draws.normal(latents.shape[1:]), levels, ids)

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """Returns normalised latents of clips, or of what the head has made of them before."""
        with torch.no_grad():
            kept = batch.get("latents")
            raw = self.head(self.encoder(batch["video"]))[0] if kept is None else kept
            return (raw - self.mean) / self.std

    def error(
        self, latents: Tensor, prompts: list[str], noise: Tensor, levels: NoiseLevels, ids: Tensor
    ) -> Tensor:
        """Returns the mean squared error of the velocity at the noise levels of steps ids (B,)."""
        field = partial(velocity, self.transformer)
        return flow.squared_error(latents, noise, levels, ids, field, self.context(prompts)).mean()

    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        video = torch.empty(load.batch_size, 3, *load.pixels)
        return {"key": load.keys, "video": video, "prompt": [""] * load.batch_size}

    def example_loss(self, batch: dict[str, Any]) -> Tensor:
        ids = torch.zeros(len(batch["key"]), dtype=torch.long, device=batch["video"].device)
        noise = torch.empty(
            len(ids), *self.geometry.latent_shape(*batch["video"].shape[2:]), device=ids.device
        )
        return self.error(self.latents(batch), batch["prompt"], noise, self.train_levels, ids)

    def sharded(self) -> list[Group]:
        return [(self, [])]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        draws = ClipDraws(batch["key"], self.seed, "train", self.global_step, device=self.device)
        loss = self.step(batch, draws, self.train_levels)
        log_means(self, self.step_means, {"train/loss": loss}, len(batch["key"]))
        return {"loss": loss}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Logs val/prompt_gain: by how much the error grows where each clip has its neighbour's
        prompt; a DiT that does not read prompts has 0."""
        others = {**batch, "prompt": [*batch["prompt"][1:], *batch["prompt"][:1]]}
        loss, other = (
            self.step(
                each, ClipDraws(batch["key"], self.seed, "val", device=self.device), self.levels
            )
            for each in (batch, others)
        )
        shared = {"batch_size": len(batch["key"]), "sync_dist": True}
        self.log("val/loss", loss, prog_bar=True, **shared)
        self.log("val/prompt_gain", other - loss, **shared)
        return {"loss": loss}

    def on_validation_epoch_end(self) -> None:
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            half = WanTransformer3DModel.from_config(self.transformer.config).half()
            half.load_state_dict(self.transformer.state_dict())
            replace_folder(self.save_to / "transformer", half.save_pretrained)
            text = UMT5EncoderModel(self.text_encoder.config).half()
            text.load_state_dict(self.text_encoder.state_dict())
            replace_folder(self.save_to / "text_encoder", text.save_pretrained)
            self.tokenizer.backend_tokenizer.no_padding()  # those of the last call are kept else
            self.tokenizer.backend_tokenizer.no_truncation()
            replace_folder(self.save_to / "tokenizer", self.tokenizer.save_pretrained)

    def configure_optimizers(self) -> dict:
        return with_warmup(
            self.parameters(),
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.trainer.max_steps,
        )
