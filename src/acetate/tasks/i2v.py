"""DoRA training of image-to-video models on cached RGBA latents: the first frame of a clip, and
perhaps its last, are given."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate.draws import ClipDraws
from acetate.lightning_seams import batch_number
from acetate.models.condition import condition_channels, widen, with_mask
from acetate.models.dit import velocity
from acetate.models.image_encoder import TOKENS
from acetate.models.wan import Geometry
from acetate.tasks.dit import DoRATask
from acetate.tasks.example import Load


class I2VTask(DoRATask):
    """Trains as DoRATask does, with a condition behind the noisy latents (models.condition).

    A text base gets a wider patch embedding, which starts at zero and trains beside DoRA; an
    image-to-video base stays as it is, and reads the cached CLIP embedding where it takes one.
    condition_dropout: share of clips that see neither, all zeros, so that the model samples from
    text alone, too. caption_swap: share of the others that see the prompt of the clip before them
    in their rank's batch, so that the picture is believed where the prompt says another thing.
    time_stride: of the VAE.
    """

    def __init__(
        self,
        *,
        condition_dropout: float,
        time_stride: int,
        caption_swap: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        shares = {"condition_dropout": condition_dropout, "caption_swap": caption_swap}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"task.{name} {share}; a share in [0, 1].")
        self.condition_dropout, self.caption_swap = condition_dropout, caption_swap
        self.time_stride = time_stride
        self.given, self.widened = "first", False
        self.image_encoder: dict[str, Any] = {}

    def extend(self, transformer: WanTransformer3DModel) -> None:
        config, wanted = transformer.config, self.time_stride
        wanted += config.out_channels
        found = condition_channels(transformer)
        if found not in (0, wanted):
            raise ValueError(
                f"{self.base.transformer} reads {config.in_channels} channels; an image-to-video "
                f"base reads {config.out_channels + wanted}, a text base {config.out_channels}. "
                "Choose another wan.transformer=."
            )
        if found:
            return
        if self.shards is not None:
            raise ValueError(
                f"{self.base.transformer} is a text base, whose patch embedding is made wider; "
                "that is not sharded. Give trainer=ddp, or an image-to-video base."
            )
        widen(transformer, wanted, self.adapter_dtype)
        self.widened, self.shardable = True, False

    def setup(self, stage: str) -> None:
        super().setup(stage)
        manifest = self.trainer.datamodule.manifest  # pyright: ignore[reportAttributeAccessIssue]
        if "condition" not in manifest:
            raise ValueError(
                "These latents were cached without a condition, for text alone. Cache them anew "
                "with condition=first (acetate prep cache_latents ... condition=first), or train "
                "experiment=dit_dora on them."
            )
        if manifest["geometry"]["time_stride"] != self.time_stride:
            raise ValueError(
                f"task.time_stride={self.time_stride}; the latents' is "
                f"{manifest['geometry']['time_stride']}. Give that one."
            )
        self.given = manifest["condition"]
        self.image_encoder = manifest.get("image_encoder", {})

    def check_fit(self, batch: dict[str, Any]) -> None:
        super().check_fit(batch)
        assert self.transformer is not None
        width, found = self.transformer.config.image_dim, batch.get("image_embeds")
        if width is not None and (found is None or found.shape[2] != width):
            held = "none" if found is None else f"such of {found.shape[2]}"
            raise ValueError(
                f"{self.base.transformer} reads a CLIP embedding of the picture, {width} wide; the "
                f"cached samples hold {held}. Cache them anew with wan.image_encoder= of that "
                "base, as its wan= has it."
            )

    def channels(self, batch: dict[str, Any]) -> int:
        return 2 * batch["latents"].shape[1] + self.time_stride

    def field(self, batch: dict[str, Any]) -> Callable[..., Tensor]:
        condition = with_mask(batch["condition"], self.given, self.time_stride)
        embeds = batch.get("image_embeds")
        if "without" in batch:
            condition = condition.masked_fill(batch["without"][:, None, None, None, None], 0)
            embeds = embeds if embeds is None else embeds * ~batch["without"][:, None, None]
        return partial(velocity, self.transformer, condition=condition, image_embeds=embeds)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return super().training_step(self.drawn(batch, batch_number(self.trainer)), batch_idx)

    def drawn(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """Returns the batch with what this step's clips see: `without` (B,), no picture, and
        another clip's prompt."""
        draws = ClipDraws(batch["key"], self.seed, "condition", step, device=self.device)
        without = draws.integers(1_000_000) < 1_000_000 * self.condition_dropout
        swapped = draws.integers(1_000_000) < 1_000_000 * self.caption_swap
        swapped = (swapped & ~without)[:, None, None]
        context = torch.where(swapped, batch["context"].roll(1, 0), batch["context"])
        return {**batch, "without": without, "context": context}

    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        batch = super().example_batch(load, geometry)
        assert self.transformer is not None
        if (width := self.transformer.config.image_dim) is not None:
            batch["image_embeds"] = torch.empty(load.batch_size, TOKENS, width)
        return {**batch, "condition": torch.empty_like(batch["latents"])}

    def facts(self) -> dict[str, Any]:
        assert self.transformer is not None
        condition = {
            "given": self.given,
            "channels": condition_channels(self.transformer),
            "widened": self.widened,
        }
        facts = {**super().facts(), "condition": condition}
        if self.transformer.config.image_dim is not None:
            facts["image_encoder_sha256"] = self.image_encoder.get("sha256", "")
        return facts
