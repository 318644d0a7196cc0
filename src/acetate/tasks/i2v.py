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
from acetate.models.wan import Geometry
from acetate.tasks.dit import DoRATask
from acetate.tasks.example import Load


class I2VTask(DoRATask):
    """Trains as DoRATask does, with a condition behind the noisy latents (models.condition).

    A text base gets a wider patch embedding, which starts at zero and trains beside DoRA; an
    image-to-video base stays as it is. condition_dropout: share of clips that see none, all zeros,
    so that the model samples from text alone, too. time_stride: of the VAE.
    """

    def __init__(self, *, condition_dropout: float, time_stride: int, **settings: Any) -> None:
        super().__init__(**settings)
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"task.condition_dropout {condition_dropout}; a share in [0, 1].")
        self.condition_dropout, self.time_stride = condition_dropout, time_stride
        self.given, self.widened = "first", False

    def extend(self, transformer: WanTransformer3DModel) -> None:
        config, wanted = transformer.config, self.time_stride
        wanted += config.out_channels
        found = condition_channels(transformer)
        if found not in (0, wanted) or config.image_dim is not None:
            what = (
                "reads a CLIP embedding of the picture, which is not supported yet"
                if found == wanted
                else f"reads {config.in_channels} channels; an image-to-video base reads "
                f"{config.out_channels + wanted}, a text base {config.out_channels}"
            )
            raise ValueError(f"{self.base.transformer} {what}. Choose another wan.transformer=.")
        if found:
            return
        if self.shards is not None:
            raise ValueError(
                f"{self.base.transformer} is a text base, whose patch embedding is made wider; "
                "that is not sharded. Give trainer=ddp, or an image-to-video base."
            )
        widen(transformer, wanted, self.adapter_dtype)
        self.widened = True

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

    def channels(self, batch: dict[str, Any]) -> int:
        return 2 * batch["latents"].shape[1] + self.time_stride

    def field(self, batch: dict[str, Any]) -> Callable[..., Tensor]:
        condition = with_mask(batch["condition"], self.given, self.time_stride)
        if "without" in batch:
            condition = condition.masked_fill(batch["without"][:, None, None, None, None], 0)
        return partial(velocity, self.transformer, condition=condition)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        draws = ClipDraws(
            batch["key"], self.seed, "condition", batch_number(self.trainer), device=self.device
        )
        without = draws.integers(1_000_000) < 1_000_000 * self.condition_dropout
        return super().training_step({**batch, "without": without}, batch_idx)

    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        batch = super().example_batch(load, geometry)
        return {**batch, "condition": torch.empty_like(batch["latents"])}

    def facts(self) -> dict[str, Any]:
        assert self.transformer is not None
        condition = {
            "given": self.given,
            "channels": condition_channels(self.transformer),
            "widened": self.widened,
        }
        return {**super().facts(), "condition": condition}
