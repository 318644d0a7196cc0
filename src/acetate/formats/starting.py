"""Reads adapters that a new run starts from, out of any file that holds them."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from acetate.formats.checkpoints import read_trained
from acetate.formats.rgba_vae import read_rgba_vae
from acetate.formats.trained import PREFIX
from acetate.formats.wan_alpha import dora_from_wan_alpha
from acetate.models.weights import SUFFIXES, read_weights

RELEASED_DORA = re.compile(r"(self|cross)_attn\.[qkvo]\.lora_A")


def read_start(source: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Returns tensors named as in a task of this kind (of `checkpoints.KINDS`), the known facts
    of them, and their file.

    source: a run or a checkpoint of acetate, an adapter file, or a released Wan-Alpha file. Raises
    FileNotFoundError and ValueError as `read_trained` and `read_rgba_vae` do.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in SUFFIXES and path.suffix != ".ckpt":
        names = read_weights(path, wrapped=True)
        if kind == "dit_dora" and any(map(RELEASED_DORA.search, names)):
            state = dora_from_wan_alpha(names, str(path))
            rank = next(len(value) for name, value in state.items() if ".lora_A." in name)
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
