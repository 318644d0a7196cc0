"""Configs as the programs compose them."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import acetate.commands  # noqa: F401  (registers the resolvers that conf/ uses)
from acetate.cli import run
from tests.paths import ROOT


def composed(folder: Path, *overrides: str) -> DictConfig:
    """config.yaml with overrides; everything a run writes goes below the folder."""
    places = [
        f"paths.root={ROOT}",
        f"paths.outputs={folder}",
        f"paths.data={folder}",
        f"paths.cache={folder}",
        f"paths.run={folder}",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("config", [*places, *overrides])


def called(name: str, *arguments: str) -> None:
    """`acetate NAME ARGUMENTS` in this process."""
    GlobalHydra.instance().clear()
    run(name, arguments)
    GlobalHydra.instance().clear()
