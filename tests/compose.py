"""Configs as the programs compose them."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import acetate.commands  # noqa: F401  (registers the resolvers that conf/ uses)
from tests.paths import ROOT


def composed(run: Path, *overrides: str) -> DictConfig:
    """config.yaml with overrides; everything a run writes goes below `run`."""
    places = [
        f"paths.root={ROOT}",
        f"paths.outputs={run}",
        f"paths.data={run}",
        f"paths.cache={run}",
        f"paths.run={run}",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("config", [*places, *overrides])
