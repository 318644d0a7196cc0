"""TransPixeler's scheme on Wan's DiT (arXiv 2501.03006): colour and alpha latents of the plain VAE
in one sequence, as a baseline."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from acetate.models.dit import shard_transformer
from acetate.models.joint import STREAMS, attach_joint, start_joint
from acetate.models.wan import Geometry
from acetate.tasks.dit import DoRATask
from acetate.tasks.example import Load


class JointTask(DoRATask):
    """Minimises l = w(t) |DiT(x_t, t, prompt) - (noise - z)|^2 of z = (colour, alpha), one t per
    clip and for both; LoRA on alpha tokens and the alpha embedding train.

    rgb_attends_alpha: as in `models.joint`. rgba_vae: null, as nothing but the plain VAE is read.
    mean_shift: 0, as there is no guide. dora: the other settings of DoRATask. Raises ValueError for
    an RGBA-VAE, for a shift, and for ranks that share clips.
    """

    scheme = "joint"

    def __init__(
        self,
        *,
        rgb_attends_alpha: bool = True,
        rgba_vae: str | None = None,
        mean_shift: float = 0.0,
        **dora: Any,
    ) -> None:
        if mean_shift:
            raise ValueError(
                f"task.mean_shift={mean_shift}: noise is shifted for a guide, which a joint model "
                "does not have. Set 0, or train experiment=dit_dora."
            )
        if rgba_vae is not None:
            raise ValueError(
                f"rgba_vae={rgba_vae}: a joint model reads latents of the plain VAE. Leave it out, "
                "or train experiment=dit_dora."
            )
        if dora.get("context_parallel", 1) > 1:
            raise ValueError(
                f"task.context_parallel={dora['context_parallel']}: colour and alpha of a joint "
                "model are two halves of its tokens, which are not shared out. Give 1."
            )
        super().__init__(mean_shift=mean_shift, **dora)
        self.rgb_attends_alpha = rgb_attends_alpha

    def adapt(self, transformer: WanTransformer3DModel) -> None:
        attach_joint(transformer, self.rank, self.alpha, self.rgb_attends_alpha, self.adapter_dtype)
        if self.shards is not None:
            shard_transformer(transformer, self.shards)

    def start(self, transformer: WanTransformer3DModel) -> None:
        start_joint(transformer, self.seed)

    def shifted(self, noise: Tensor, batch: dict[str, Any]) -> Tensor:
        return noise

    def example_batch(self, load: Load, geometry: Geometry | None) -> dict[str, Any]:
        batch = super().example_batch(load, geometry)
        return {**batch, "latents": torch.cat([batch["latents"]] * STREAMS, 2)}

    def facts(self) -> dict[str, Any]:
        facts = super().facts()
        del facts["mean_shift"]
        return {**facts, "kind": "dit_joint", "rgb_attends_alpha": self.rgb_attends_alpha}
