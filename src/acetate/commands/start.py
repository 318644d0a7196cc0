"""Starts a new run from adapters that are trained already."""

import json
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from acetate.models.adapters import check_fit, trainable_state
from acetate.models.sharding import shard_like

Read = Callable[[str, str], tuple[dict[str, Tensor], dict[str, Any], str]]
# What decides the shapes and scales of what trains, and the setting that each has in a run's config
STRUCTURE = {
    "rgba_vae": {name: f"model.{name}" for name in ("merge_init", "lora_rank", "lora_alpha")},
    "dit_dora": {name: f"task.{name}" for name in ("rank", "alpha")},
    "dit_joint": {name: f"task.{name}" for name in ("rank", "alpha", "rgb_attends_alpha")},
}
BASE = ("base_sha256", "transformer_sha256")
MADE_WITH = ("vae_sha256", "text_encoder_sha256")


class StartFrom(Callback):
    """Puts the adapters of `source` in the place of fresh ones, before the first step; all else
    starts anew.

    read(source, kind) gives their tensors, named as in the task, what is known of them, and their
    file. Raises ValueError for another base, rank or scale, with the settings to give.
    """

    def __init__(self, source: str, read: Read) -> None:
        self.source, self.read = source, read

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = {name: json.loads(value) for name, value in pl_module.adapter_metadata().items()}  # type: ignore
        state, facts, file = self.read(self.source, own["kind"])
        self._check(own, facts, file)
        target = trainable_state(pl_module)
        check_fit(target, state, file)
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(shard_like(state[name], tensor))
        rank_zero_info(f"starts from {file}, step {facts.get('step', 'unknown')}")

    def _check(self, own: dict[str, Any], facts: dict[str, Any], file: str) -> None:
        for name in BASE:
            if name in own and facts.get(name, own[name]) != own[name]:
                raise ValueError(
                    f"init={self.source}: {file} was trained on another base "
                    f"({facts.get('base')}). Choose its wan=."
                )
        settings = STRUCTURE[own["kind"]]
        if changed := [name for name in settings if facts.get(name, own[name]) != own[name]]:
            before = ", ".join(f"{name} {facts[name]} (here {own[name]})" for name in changed)
            give = " ".join(f"{settings[name]}={facts[name]}" for name in changed)
            raise ValueError(f"init={self.source}: {file} was trained with {before}. Give {give}.")
        for name in MADE_WITH:
            if name in own and facts.get(name, own[name]) != own[name]:
                rank_zero_warn(
                    f"{file} was trained on latents of another model ({name} {facts[name][:12]}) "
                    f"than these ({own[name][:12]}): it starts further from its aim."
                )
