"""Checks that what a command is to read is there, before it imports what reads it, which takes
seconds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from acetate.commands.recorded import CHOSEN
from acetate.console import printable

LOST = "does not exist. "
TRAINED = f"{LOST}Name a run, a name's folder below outputs/, or a file"
MODEL = {"dora": f"{TRAINED}; null: the base.", "rgba_vae": f"{TRAINED}."}
FILE = f"{LOST}Give a file, or leave it out."
PICTURE = f"{LOST}Give a picture with alpha."
SHARDS = f"{LOST}`acetate prep synthesize` and `acetate prep shard` make clip shards."
FOLDER = "is not a folder. Name one that holds clips."
# Settings of each command, with what is said of a place that is not there
PLACES: dict[str, dict[str, str]] = {
    "sample": {
        "prompts": "does not exist; it is a text file with one prompt per line.",
        "image": PICTURE, "last_image": PICTURE, "guide.clip": FILE, "guide.mask": FILE, **MODEL,
    },
    "follow": MODEL,
    "view": {"folders": FOLDER, "reference": FOLDER},
    "evaluate": {"folders": FOLDER, "references": FOLDER},
    "inspect": {"shards": SHARDS},
    "cache_latents": {"shards": SHARDS, "rgba_vae": f"{TRAINED}."},
}  # fmt: skip


def check_places(program: str, config: DictConfig) -> None:
    """Raises FileNotFoundError for the first place that is not there, by its setting. Places with
    `://` are others to ask for."""
    for name, said in PLACES.get(program, {}).items():
        for place in _listed(OmegaConf.select(config, name)):
            path = Path(CHOSEN.sub("", place)).expanduser()
            if "://" not in place and not path.exists():
                raise FileNotFoundError(f"{name}={printable(place)} {said}")


def _listed(value: Any) -> Iterable[str]:
    """Returns the texts of a setting: of one, or of a list."""
    return map(str, value) if OmegaConf.is_config(value) else () if value is None else (str(value),)
