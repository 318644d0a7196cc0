"""DoRA training of Wan's DiT on cached RGBA latents with mean-shifted noise (method of Wan-Alpha, section 3.3)."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate import flow, regions
from acetate.data.latents import MADE_WITH
from acetate.draws import ClipDraws
from acetate.lightning_seams import batch_number
from acetate.losses.diffusion import flow_loss
from acetate.models.adapters import ADAPTER_SCHEMA
from acetate.models.dit import attach_dora, shard_transformer, start_dora, velocity
from acetate.models.loading import load_transformer, transformer_sha256
from acetate.steps import ends_step, logs_step
from acetate.tasks.adapter import AdapterTask
from acetate.tasks.logs import Means, clips_in, log_means, share_of
from acetate.tasks.optim import adamw_with_warmup


class DoRATask(AdapterTask):
    """l = w(t) |DiT(x_t, t, prompt) - (noise~ - z)|^2 with noise~ = noise + mean_shift (1 - G), one t per clip.

    transformer, dtype: source of the frozen base and its precision. rank, alpha, adapter_dtype: of DoRA. G is the
    Gaussian ellipse that the cache holds. caption_dropout: share of clips that see the empty prompt.
    timestep_per `batch`, timestep_dtype `bfloat16`, adapter_dtype `bfloat16` and warmup `third` are the released
    choices. val_timesteps: noise levels, evenly spread over the steps, of the validation loss.
    """

    def __init__(
        self,
        *,
        transformer: str,
        dtype: str,
        rank: int,
        alpha: float,
        adapter_dtype: str,
        checkpointing: bool,
        mean_shift: float,
        caption_dropout: float,
        timestep_per: str,
        timestep_dtype: str,
        timestep_weight: bool,
        val_timesteps: int,
        lr: float,
        warmup_steps: int,
        betas: Sequence[float],
        weight_decay: float,
        seed: int,
        decay_steps: int | None = None,
        warmup: str = "linear",
        bins: int = 10,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("timestep_per", timestep_per, ("clip", "batch")),
            ("timestep_dtype", timestep_dtype, ("float32", "bfloat16")),
            ("adapter_dtype", adapter_dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"task.{name} {value!r}; known: {', '.join(known)}.")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"task.caption_dropout {caption_dropout}; a share in [0, 1].")
        self.source, self.dtype_name, self.checkpointing = transformer, dtype, checkpointing
        self.rank, self.alpha, self.adapter_dtype = rank, alpha, getattr(torch, adapter_dtype)
        self.mean_shift, self.caption_dropout = mean_shift, caption_dropout
        self.timestep_per, self.timestep_dtype = timestep_per, getattr(torch, timestep_dtype)
        self.timestep_weight, self.seed = timestep_weight, seed
        self.lr, self.warmup_steps, self.warmup, self.decay_steps = lr, warmup_steps, warmup, decay_steps
        self.betas, self.weight_decay = betas, weight_decay
        self.levels = flow.schedule()
        count = len(self.levels.sigmas)
        self.val_ids = ((torch.arange(val_timesteps) + 0.5) * count / val_timesteps).long()
        # Of this rank since the last log; float64, so that a sum does not depend on the order that ranks and resumed
        # runs add in
        self.bin_sums, self.bin_counts = torch.zeros(2, bins, dtype=torch.float64)
        self.means, self.step_means = Means(), Means()
        self.transformer: WanTransformer3DModel | None = None
        self.cache: dict[str, Any] = {}

    def configure_model(self) -> None:
        if self.transformer is not None:
            return
        self.adopt(load_transformer(self.source, getattr(torch, self.dtype_name), self.adapt))
        start_dora(self.transformer, self.seed)

    def adapt(self, transformer: WanTransformer3DModel) -> None:
        """Puts adapters on a frozen base without numbers; on many ranks each keeps its shards."""
        attach_dora(transformer, self.rank, self.alpha, self.adapter_dtype)
        if self.shards is not None:
            shard_transformer(transformer, self.shards)

    def adopt(self, transformer: WanTransformer3DModel) -> None:
        """Makes an adapted base the model that trains."""
        self.transformer = transformer
        self.base_sha256 = transformer_sha256(transformer)
        if self.checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()

    def setup(self, stage: str) -> None:
        manifest = self.trainer.datamodule.manifest  # pyright: ignore[reportAttributeAccessIssue]
        self.cache = {name: manifest[name] for name in MADE_WITH}

    def on_validation_model_eval(self) -> None:
        """Training mode stays on: nothing here depends on it but PEFT, which keeps full-size deltas in eval mode."""

    def on_validation_model_train(self) -> None:
        self.transformer.train()

    def check_fit(self, batch: dict[str, Any]) -> None:
        """Raises ValueError for latents or embeddings of another model than the DiT."""
        config = self.transformer.config
        for name, needed, found in (
            ("latent channels", config.in_channels, batch["latents"].shape[1]),
            ("wide text embeddings", config.text_dim, batch["context"].shape[2]),
        ):
            if needed != found:
                raise ValueError(
                    f"{self.source} reads {needed} {name}, the cached samples have {found}. Cache them with the same "
                    "wan= as the run."
                )

    def errors(self, batch: dict[str, Any], noise: Tensor, ids: Tensor, context: Tensor) -> Tensor:
        """Squared error of the velocity per clip, (B,)."""
        self.check_fit(batch)
        latents = batch["latents"]
        guide = regions.gaussian(batch["ellipses"], *latents.shape[-2:])
        noise = flow.mean_shift(noise, guide, self.mean_shift)
        x_t = flow.interpolate(latents, noise, self.levels.sigmas[ids])
        timestep = self.levels.timesteps[ids].to(self.timestep_dtype).float().to(latents.device)
        return flow_loss(velocity(self.transformer, x_t, timestep, context), flow.velocity(latents, noise))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        draws = ClipDraws(batch["key"], self.seed, "train", batch_number(self.trainer), device=self.device)
        noise = draws.normal(batch["latents"].shape[1:])
        drawn = draws.integers(len(self.levels.sigmas))
        ids = flow.seen_ids(drawn, self.levels.timesteps, self.timestep_per, self.timestep_dtype)
        dropped = draws.integers(1_000_000) < 1_000_000 * self.caption_dropout
        context = torch.where(dropped[:, None, None], batch["null_context"], batch["context"])
        errors = self.errors(batch, noise, ids, context)
        weights = self.levels.weights[ids].to(errors.device) if self.timestep_weight else 1.0
        loss, size = (weights * errors).mean(), clips_in(batch)
        log_means(self, self.step_means, {"train/loss": loss, "train/mse": errors.mean()}, size)
        self.log_bins(errors[:size].detach().double().cpu(), ids[:size])
        return {"loss": share_of(self, loss, size), "parts": {"mse": errors.mean()}}

    def log_bins(self, errors: Tensor, ids: Tensor) -> None:
        """Mean error of all ranks since the last log per range of timesteps; one that no clip fell into is left out."""
        count = len(self.bin_sums)
        places = (self.levels.timesteps[ids] / len(self.levels.sigmas) * count).long().clamp_max(count - 1)
        self.bin_sums.index_add_(0, places, errors)
        self.bin_counts.index_add_(0, places, torch.ones_like(errors))
        if not (logs_step(self) and ends_step(self)):
            return
        width, (sums, counts) = len(self.levels.sigmas) // count, self.bins()
        means = {
            f"train_t/{place * width:04}-{(place + 1) * width:04}": float(sums[place] / counts[place])
            for place in counts.nonzero().flatten().tolist()
        }
        self.log_dict(means, batch_size=1)
        self.bin_sums.zero_()
        self.bin_counts.zero_()

    def bins(self) -> Tensor:
        """Sums and counts (2, bins) of all ranks, which must call this together."""
        local = torch.stack([self.bin_sums, self.bin_counts])
        if self.trainer.world_size == 1:
            return local
        return self.trainer.strategy.reduce(local.to(self.device), reduce_op="sum").cpu()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The same noise and noise levels at every validation."""
        noise = ClipDraws(batch["key"], self.seed, "val", device=self.device).normal(batch["latents"].shape[1:])
        size, values = len(batch["key"]), {}
        for step in self.val_ids:
            name = f"val_t/{self.levels.timesteps[step]:04.0f}"
            values[name] = self.errors(batch, noise, step.expand(size), batch["context"]).mean()
        self.means.add({**values, "val/loss": torch.stack([*values.values()]).mean()}, clips_in(batch))
        return {}

    def on_validation_epoch_end(self) -> None:
        self.means.log(self)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw_with_warmup(
            self.transformer.parameters(),
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
        )

    def adapter_metadata(self) -> dict[str, str]:
        facts = {
            "schema": ADAPTER_SCHEMA,
            "kind": "dit_dora",
            "base": self.source,
            "transformer_sha256": self.base_sha256,
            "rank": self.rank,
            "alpha": self.alpha,
            "mean_shift": self.mean_shift,
            **self.cache,
        }
        return {name: json.dumps(value) for name, value in facts.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["bins"] = tuple(self.bins())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "bins" in checkpoint:  # older ones have none
            sums, counts = checkpoint["bins"][:2]
            if self.trainer.is_global_zero:  # for all ranks, on any number of them
                self.bin_sums, self.bin_counts = sums.double(), counts.double()
