"""Configs as the programs compose them."""

import copy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import acetate.commands  # noqa: F401  (registers the resolvers that conf/ uses)
from acetate.cli import run
from tests.paths import ROOT

PLACES = ("outputs", "data", "cache", "run")


def composed(folder: Path, *overrides: str) -> DictConfig:
    """config.yaml with overrides; everything a run writes goes below the folder."""
    config = copy.deepcopy(_composed(*overrides))
    config.paths.update({name: str(folder) for name in PLACES})
    return config


@cache
def _composed(*overrides: str) -> DictConfig:
    """Hydra takes a third of a second."""
    places = [f"paths.{name}=." for name in PLACES]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("config", [f"paths.root={ROOT}", *places, *overrides])


def called(name: str, *arguments: str) -> None:
    """`acetate NAME ARGUMENTS` in this process."""
    GlobalHydra.instance().clear()
    run(name, arguments)
    GlobalHydra.instance().clear()
