"""Starts a new run from adapters that are trained already, out of any file that holds them."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from acetate.formats.checkpoints import read_trained
from acetate.formats.rgba_vae import read_rgba_vae
from acetate.formats.trained import PREFIX
from acetate.formats.wan_alpha import dora_from_wan_alpha, is_dora, rank_of
from acetate.models.adapters import check_fit, trainable_state
from acetate.models.sharding import shard_like
from acetate.models.weights import SUFFIXES, read_weights

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

    source: as of `read_start`. Raises ValueError for another base, rank or scale, with the settings
    to give.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = {name: json.loads(value) for name, value in pl_module.adapter_metadata().items()}  # type: ignore
        state, facts, file = read_start(self.source, own["kind"])
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


def read_start(source: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Returns tensors named as in a task of this kind (of `checkpoints.KINDS`), the known facts
    of them, and their file.

    source: a run or a checkpoint of acetate, an adapter file, or a released Wan-Alpha file. Raises
    FileNotFoundError and ValueError as `read_trained` and `read_rgba_vae` do.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in SUFFIXES and path.suffix != ".ckpt":
        names = read_weights(path, wrapped=True)
        if kind == "dit_dora" and is_dora(names):
            state = dora_from_wan_alpha(names, str(path))
            rank = rank_of(state)
            return _named(state, kind), {"rank": rank, "alpha": rank}, str(path)
        if kind == "rgba_vae" and not any(name.startswith("vae.") for name in names):
            path, state, facts = read_rgba_vae(source)
            return _named(state, kind), facts, str(path)
    trained = read_trained(source)
    if trained.kind != kind:
        raise ValueError(
            f"init={source} holds a {trained.kind}, this experiment trains a {kind}. Give another "
            "one."
        )
    return _named(trained.state, kind), trained.facts, str(trained.path)


def _named(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {PREFIX[kind] + name: value for name, value in state.items()}
