"""DoRA training of Wan's DiT on cached RGBA latents with mean-shifted noise (method of Wan-Alpha,
section 3.3)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate import flow, regions
from acetate.data.latents import MADE_WITH
from acetate.draws import ClipDraws
from acetate.lightning_seams import batch_number, leave_out_of_ddp
from acetate.models.dit import (
    FrozenDiT,
    attach_dora,
    checkpoint_blocks,
    compile_blocks,
    shard_transformer,
    start_dora,
    velocity,
)
from acetate.models.held import held_layers
from acetate.models.loading import transformer_sha256
from acetate.models.ulysses import ClipRanks, check_heads, share_tokens
from acetate.models.wan import Geometry
from acetate.steps import ends_step, logs_step
from acetate.tasks.adapter import AdapterTask
from acetate.tasks.example import Group, Load, MeasuredTask
from acetate.tasks.logs import Means, clips_in, log_means, share_of

VAL_LEVELS = 4  # noise levels of the validation loss, evenly spread over the steps
# The way to latents of either scheme
CACHED_BY = {
    "rgba": "Give those of acetate prep cache_latents rgba_vae=RUN, or train experiment=dit_joint.",
    "joint": "Give those of acetate prep cache_latents scheme=joint, or train experiment=dit_dora.",
}
BINS = 10  # ranges of timesteps that the training loss is logged by


class DoRATask(AdapterTask, MeasuredTask):
    """Minimises l = w(t) |DiT(x_t, t, prompt) - (noise~ - z)|^2 with noise~ = noise + mean_shift (1
    - G), one t per clip.

    rank, alpha: of DoRA. G is the Gaussian ellipse that the cache holds. checkpointing: blocks are
    computed again in the backward pass, all but what attention gives where keep_attention is true;
    `offload`: and what a block begins with waits in the CPU's memory.
    compile: compiles the blocks, once for each shape of clips. caption_dropout: share of clips that
    see the empty prompt. noise: how noise levels are drawn; null: as Wan. alpha_floor:
    what an empty cell's error counts in training beside a full one's, by coverage in between; null:
    all the same. context_parallel: ranks that share a clip. optimization: as in AdapterTask.
    """

    schedule_levels = staticmethod(flow.schedule)
    adapter_dtype = torch.float32
    scheme = "rgba"  # of the latents
    binned: Tensor

    def __init__(
        self,
        *,
        base: FrozenDiT,
        rank: int,
        alpha: float,
        checkpointing: bool | str,
        mean_shift: float,
        caption_dropout: float,
        seed: int,
        keep_attention: bool = True,
        compile: bool = False,
        noise: flow.NoiseDraws | None = None,
        alpha_floor: float | None = None,
        context_parallel: int = 1,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"task.caption_dropout {caption_dropout}; a share in [0, 1].")
        base.check_step(checkpointing, compile)
        if compile and checkpointing == "offload":
            raise ValueError(
                "task.checkpointing=offload is not for compiled blocks (task.compile=true). Give "
                "task.checkpointing=true, or task.compile=false."
            )
        self.base, self.rank, self.alpha, self.checkpointing = base, rank, alpha, checkpointing
        self.keep_attention, self.compile_blocks = keep_attention, compile
        self.mean_shift, self.caption_dropout, self.seed = mean_shift, caption_dropout, seed
        self.alpha_floor, self.context_parallel = alpha_floor, context_parallel
        self.ranks: ClipRanks | None = None
        self.noise, self.levels = noise or flow.NoiseDraws(), self.schedule_levels()
        self.train_levels = self.schedule_levels(shift=self.noise.shift)
        self.levels_by_shift: dict[float, flow.NoiseLevels] = {}
        self.spans: dict[float, tuple[int, int]] = {}
        first, end = base.span(self.levels)
        middles = first + ((torch.arange(VAL_LEVELS) + 0.5) * (end - first) / VAL_LEVELS).long()
        self.val_ids = {f"val_t/{self.levels.timesteps[i]:04.0f}": int(i) for i in middles}
        # Sums and counts of this rank since the last log; float64, so that a sum does not depend on
        # the order that ranks and resumed runs add in, as integers, which no module-wide cast
        # reaches
        bins = torch.zeros(2, BINS, dtype=torch.float64).view(torch.int64)
        self.register_buffer("binned", bins, persistent=False)
        self.means, self.step_means = Means(), Means()
        self.transformer: WanTransformer3DModel | None = None
        self.cache: dict[str, Any] = {}

    def configure_model(self) -> None:
        if self.transformer is not None:
            return
        self.base.check_shards(self.shards)
        self.transformer = self.base.load(self.adapt).train()
        held = held_layers(self.transformer)
        leave_out_of_ddp(self, [f"transformer.{name}.weight" for name in held])
        self.start(self.transformer)
        self.base_sha256 = transformer_sha256(self.transformer)
        self.extend(self.transformer)
        if self.context_parallel > 1:
            check_heads(self.transformer, self.context_parallel)
            self.ranks = ClipRanks(self.context_parallel)
            share_tokens(self.transformer, self.ranks)
        if self.compile_blocks:
            compile_blocks(self.transformer, bool(self.checkpointing), self.keep_attention)
        elif self.checkpointing:
            offload = self.checkpointing == "offload"
            checkpoint_blocks(self.transformer, self.keep_attention, offload)

    def adapt(self, transformer: WanTransformer3DModel) -> None:
        """Puts adapters on a frozen base without numbers; on many ranks each keeps its shards."""
        attach_dora(transformer, self.rank, self.alpha, self.adapter_dtype)
        if self.shards is not None:
            shard_transformer(transformer, self.shards)

    def start(self, transformer: WanTransformer3DModel) -> None:
        """Gives the adapters their first values, by the seed."""
        start_dora(transformer, self.seed)

    def extend(self, transformer: WanTransformer3DModel) -> None:
        """Adds to the base, whose hash is taken, what a kind of model needs beside adapters; here
        nothing."""

    def setup(self, stage: str) -> None:
        manifest = self.trainer.datamodule.manifest  # pyright: ignore[reportAttributeAccessIssue]
        if (found := manifest.get("scheme", "rgba")) != self.scheme:
            raise ValueError(
                f"data.latents: cached with scheme={found}, this experiment reads those of "
                f"scheme={self.scheme}. {CACHED_BY[self.scheme]}"
            )
        self.cache = {name: manifest[name] for name in MADE_WITH}

    def on_validation_model_eval(self) -> None:
        """Keeps training mode: nothing here depends on it but PEFT, which keeps full-size deltas in
        eval mode."""

    def on_validation_model_train(self) -> None:
        self.transformer.train()

    def check_shared(self, batch: dict[str, Any]) -> None:
        """Raises ValueError where ranks that share their clips have different ones."""
        if self.ranks is not None:
            self.ranks.check_same(batch["key"], self.device)

    def check_fit(self, batch: dict[str, Any]) -> None:
        """Raises ValueError for latents or embeddings of another model than the DiT."""
        config = self.transformer.config
        for name, needed, found in (
            ("latent channels", config.in_channels, self.channels(batch)),
            ("wide text embeddings", config.text_dim, batch["context"].shape[2]),
        ):
            if needed != found:
                raise ValueError(
                    f"{self.base.transformer} reads {needed} {name}, the cached samples have "
                    f"{found}. Cache them with the same wan= as the run."
                )
        if self.alpha_floor is not None and "coverage" not in batch:
            raise ValueError(
                f"task.alpha_floor={self.alpha_floor} weights cells by coverage, which the cached "
                f"samples ({', '.join(batch['key'][:3])}, ...) do not hold: their cache is older. "
                "Cache them anew, with another out=, or give task.alpha_floor=null."
            )

    def channels(self, batch: dict[str, Any]) -> int:
        """Returns how many channels the DiT is given of a batch."""
        return batch["latents"].shape[1]

    def levels_for(self, latents: Tensor) -> flow.NoiseLevels:
        """Returns the noise levels that clips of this size are trained on."""
        shift = self.noise.shift_of(latents)
        if shift == self.noise.shift:
            return self.train_levels
        if shift not in self.levels_by_shift:
            with torch.device(latents.device):  # no copy, for which the device would be waited for
                self.levels_by_shift[shift] = self.schedule_levels(shift=shift)
        return self.levels_by_shift[shift]

    def span_for(self, latents: Tensor) -> tuple[int, int]:
        """Returns the ids of those levels that the base sees of clips of this size: the first one,
        and the one after the last."""
        shift = self.noise.shift_of(latents)
        if shift not in self.spans:
            with torch.device("cpu"):  # whose answer is not waited for
                self.spans[shift] = self.base.span(self.schedule_levels(shift=shift))
        return self.spans[shift]

    def errors(
        self,
        batch: dict[str, Any],
        noise: Tensor,
        ids: Tensor,
        context: Tensor,
        levels: flow.NoiseLevels | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the mean squared error of the velocity per clip, (B,). ids (B,), as `levels.seen`
        gives them; levels: null for those of Wan, which validation measures at. weights (B, 1, F,
        h, w): of cells; null: all count the same."""
        self.check_fit(batch)
        latents, noise = batch["latents"], self.shifted(noise, batch)
        field = self.field(batch)
        levels = levels or self.levels
        errors = flow.squared_error(latents, noise, levels, ids, field, context)
        return (errors if weights is None else weights * errors).flatten(1).mean(1)

    def cell_weights(self, batch: dict[str, Any]) -> Tensor | None:
        if self.alpha_floor is None or "coverage" not in batch:  # which check_fit refuses
            return None
        return regions.by_coverage(batch["coverage"], self.alpha_floor)

    def shifted(self, noise: Tensor, batch: dict[str, Any]) -> Tensor:
        """Returns noise~ of the clips' ellipses."""
        guide = regions.gaussian(batch["ellipses"], *noise.shape[-2:])
        return flow.mean_shift(noise, guide, self.mean_shift)

    def field(self, batch: dict[str, Any]) -> Callable[..., Tensor]:
        """Returns the velocity field (x_t, t, context) of a batch."""
        return partial(velocity, self.transformer)

    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        assert geometry is not None, "it trains on latents"
        shape = geometry.latent_shape(*load.pixels)
        return {
            "key": load.keys,
            "latents": torch.empty(load.batch_size, *shape),
            "ellipses": torch.empty(load.batch_size, shape[1], 5),
            "coverage": torch.empty(load.batch_size, 1, *shape[1:]),
            "context": torch.empty(
                load.batch_size, load.prompt_length, self.transformer.config.text_dim
            ),
        }

    def example_loss(self, batch: dict[str, Any]) -> Tensor:
        ids = torch.zeros(len(batch["key"]), dtype=torch.long, device=batch["latents"].device)
        noise, levels = torch.empty_like(batch["latents"]), self.levels_for(batch["latents"])
        weights = self.cell_weights(batch)
        return self.errors(batch, noise, ids, batch["context"], levels, weights).mean()

    def sharded(self) -> list[Group]:
        assert self.transformer is not None, "configure_model comes first"
        return [(self.transformer, [*self.transformer.blocks])]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        self.check_shared(batch)
        draws = ClipDraws(
            batch["key"], self.seed, "train", batch_number(self.trainer), device=self.device
        )
        noise = draws.normal(batch["latents"].shape[1:])
        levels = self.levels_for(batch["latents"])
        ids = levels.seen(self.noise.ids(levels, draws, self.span_for(batch["latents"])))
        dropped = draws.integers(1_000_000) < 1_000_000 * self.caption_dropout
        context = torch.where(dropped[:, None, None], batch["null_context"], batch["context"])
        errors = self.errors(batch, noise, ids, context, levels, self.cell_weights(batch))
        loss, size = (self.noise.weights(levels, ids) * errors).mean(), clips_in(batch)
        log_means(self, self.step_means, {"train/loss": loss, "train/mse": errors.mean()}, size)
        self.log_bins(errors[:size].detach().double(), levels.timesteps[ids[:size]])
        return {"loss": share_of(self, loss, size), "parts": {"mse": errors.mean()}}

    def log_bins(self, errors: Tensor, timesteps: Tensor) -> None:
        """Logs the mean error of all ranks since the last log per range of timesteps; one that no
        clip fell into is left out."""
        places = (timesteps / len(self.levels) * BINS).long().clamp_max(BINS - 1)
        self.binned.view(torch.float64).index_add_(
            1, places, torch.stack([errors, torch.ones_like(errors)])
        )
        if not (logs_step(self) and ends_step(self)):
            return
        width, (sums, counts) = len(self.levels) // BINS, self.bins().tolist()
        means = {
            f"train_t/{place * width:04}-{(place + 1) * width:04}": sums[place] / counts[place]
            for place in range(BINS)
            if counts[place]
        }
        self.log_dict(means, batch_size=1)
        self.binned.zero_()

    def bins(self) -> Tensor:
        """Returns sums and counts (2, bins) of all ranks, which must call this together."""
        # ranks that share a clip count it once
        local = self.binned.view(torch.float64) / self.context_parallel
        if self.trainer.world_size > 1:
            local = self.trainer.strategy.reduce(local.to(self.device), reduce_op="sum")
        return local.cpu()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Measures with the same noise and noise levels at every validation."""
        self.check_shared(batch)
        noise = ClipDraws(batch["key"], self.seed, "val", device=self.device).normal(
            batch["latents"].shape[1:]
        )
        size, values = len(batch["key"]), {}
        for name, step in self.val_ids.items():
            ids = torch.full((size,), step, device=noise.device)
            values[name] = self.errors(batch, noise, ids, batch["context"]).mean()
        self.means.add(
            {**values, "val/loss": torch.stack([*values.values()]).mean()}, clips_in(batch)
        )
        return {}

    def on_validation_epoch_end(self) -> None:
        self.means.log(self)

    def schedule(self) -> dict[str, Any]:
        return {**super().schedule(), "task.warmup": self.warmup.__name__}

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "dit_dora",
            "base": self.base.source,
            **self.base.facts(),
            "transformer_sha256": self.base_sha256,
            "rank": self.rank,
            "alpha": self.alpha,
            "mean_shift": self.mean_shift,
            **self.cache,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["bins"] = tuple(self.bins())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        # older ones have none; one rank takes them for all, on any number of them
        if "bins" in checkpoint and self.trainer.is_global_zero:
            bins = torch.stack([*checkpoint["bins"][:2]]) * self.context_parallel
            self.binned.view(torch.float64).copy_(bins)
