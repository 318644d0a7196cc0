"""Builds the loggers of a run, tells them about it, and ends it for all of them."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from acetate.callbacks.metrics_file import MetricsFile
from acetate.callbacks.story import Story
from acetate.commands import launched
from acetate.commands.runs import overrides_of_sweep, rank
from acetate.redaction import redacted

if TYPE_CHECKING:  # only a run with a dashboard imports wandb
    from acetate.callbacks.dashboards import WandbRun

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "hydra-core", "wandb")
# modules of tasks whose runs are evaluated and exported
MEASURED = ("vae", "dit", "i2v", "joint")
SOURCE = Path(__file__).parents[3]


def build_loggers(config: DictConfig) -> list[Logger]:
    """Builds metrics.csv, which every run has, and those of `logger`, a mapping from names to
    targets.

    Raises ValueError for an entry that is none, as `+logger.offline=true` adds.
    """
    settings: dict[str, Any] = dict(config.get("logger") or {})
    for name, value in settings.items():
        if not (OmegaConf.is_dict(value) and "_target_" in value) and value is not None:
            raise ValueError(
                f"logger.{name}={value}; below logger are loggers by name. Their own settings are "
                "below those, as in logger=wandb logger.wandb.offline=true."
            )
    found: list[Logger] = [] if settings.get("csv") else [MetricsFile(config.paths.run)]
    for name, value in settings.items():
        if value is not None:
            found.append(instantiate(value, **(_of_job(config, value) if name == "wandb" else {})))
    return found


def build_story(config: DictConfig) -> Story:
    """Builds the story of the composed run."""
    return Story(
        name=job_name(config),
        folder=_short(config.paths.run),
        objective=config.get("objective"),
        data=_data(config),
        device=_device(config),
        settings=about(config),
        commands=_commands(config),
    )


def finish_loggers(loggers: list[Logger], failed: bool) -> None:
    """Closes the loggers. A wandb run ends here: a sweep's next job begins another."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            cast("WandbRun", logger).finish(failed)
        else:
            logger.finalize("failed" if failed else "success")


def about(config: DictConfig) -> dict[str, Any]:
    """Returns the settings of a run, resolved and without secrets, and under `run` what it is made
    of."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    commit, dirty = _git()
    sweep = _sweep_folder()
    run = {
        "command": shlex.join(redacted(["python", *sys.argv])),
        "overrides": redacted(_overrides()),
        "sweep": sweep and sweep.name,
        "folder": str(Path(config.paths.run).absolute()),
        "commit": commit,
        "uncommitted_changes": dirty,
        "device": _device(config),
        "processes": int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))),
        "host": platform.node(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }
    return {**redacted(settings), "run": run}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # of a dashboard that is not used
        return None


def job_name(config: DictConfig) -> str:
    """Returns NAME, and for a sweep's job the overrides that tell it from the others."""
    return " ".join([config.name, *redacted(_swept())])


def _of_job(config: DictConfig, settings: DictConfig) -> dict[str, Any]:
    """Returns the name, group and tags for wandb where the settings leave them open."""
    sweep = _sweep_folder()
    choices = [_choice("experiment"), _choice("sweep"), _stage(config)]
    tags = [tag for tag in choices if tag]
    found = {"name": job_name(config), "group": sweep and sweep.name, "tags": tags}
    return {name: value for name, value in found.items() if settings.get(name) is None}


def _stage(config: DictConfig) -> str:
    """Returns the module of the task: `vae`, `dit`, `i2v`, `joint` or `wan_base`."""
    return config.task._target_.split(".")[-2]


def _choice(group: str) -> str | None:
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _sweep_folder() -> Path | None:
    """Returns the folder of the sweep that the run is a job of; None where it is none."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    hydra = HydraConfig.get()
    return Path(hydra.runtime.output_dir).parents[len(Path(str(hydra.sweep.subdir)).parts) - 1]


def _swept() -> list[str]:
    """Returns the job's overrides that may differ in other jobs of its sweep."""
    sweep, parser = _sweep_folder(), OverridesParser.create()
    if chosen := os.environ.get("WANDB_SWEEP_PARAM_PATH"):  # of wandb's agent
        of_agent = yaml.safe_load(Path(chosen).read_text())
        return [text for text in _overrides() if text.partition("=")[0] in of_agent]
    if sweep is None:
        return []
    given = parser.parse_overrides(overrides_of_sweep(sweep))
    same = {one.key_or_group for one in given if not one.is_sweep_override()}
    return [text for text in _overrides() if parser.parse_override(text).key_or_group not in same]


def _commands(config: DictConfig) -> dict[str, str]:
    """Returns the commands that can come next, as lines for a shell; a run knows its other settings
    itself."""
    sweep, stage, run = _sweep_folder(), _stage(config), shlex.quote(_short(config.paths.run))
    if sweep is None:
        ranks = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's
        run_by = "python -m acetate.torchrun" if launched("nodes") == 1 else "torchrun"
        start = f"{run_by} --nproc-per-node {ranks} train.py" if ranks else "acetate train"
        lines = {"go on": f"{start} resume={run}"}
    else:
        folder = shlex.quote(_short(str(sweep)))
        jobs = _line(overrides_of_sweep(sweep), "trainer.max_steps=", "hydra.sweep.dir=")
        lines = {"go on": f"acetate train -m {jobs} hydra.sweep.dir={folder} resume=auto"}
    if stage not in MEASURED:
        return lines
    lines["evaluate"] = f"acetate evaluate run={run}"
    if stage != "vae":
        dora = {
            None: f"dora={run}",
            "high": f"dora={run} dora_2=RUN_OF_LOW",
            "low": f"dora=RUN_OF_HIGH dora_2={run}",
        }[OmegaConf.select(config, "task.base.expert")]
        picture = "image=PICTURE.png " if stage == "i2v" else ""
        lines["sample"] = f"acetate sample {dora} {picture}prompt='a ring of fire'"
    lines["export"] = f"acetate export checkpoint={run} to=acetate"
    return lines


def _line(overrides: list[str], *without: str) -> str:
    return shlex.join(
        redacted(
            [text for text in overrides if not text.startswith(("resume=", "init=", *without))]
        )
    )


def _data(config: DictConfig) -> str:
    """Returns the places of the training data, in words."""
    for name in ("latents", "shards"):
        if name in config.data:
            value = OmegaConf.to_container(config.data, resolve=True)[name]  # type: ignore[index,call-overload]
            places = [value] if isinstance(value, str) else list(value)
            return ", ".join(_short(redacted(place)) for place in places)
    return "clips that are drawn on the fly"


def _device(config: DictConfig) -> str:
    """Returns the name of this process's device."""
    if config.trainer.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return (
        "CPU" if config.trainer.accelerator in ("auto", "cpu") else str(config.trainer.accelerator)
    )


def _git() -> tuple[str | None, bool | None]:
    """Returns the commit of this source and whether tracked files differ from it, on rank 0
    alone."""
    if rank() > 0 or not (SOURCE / ".git").exists():
        return None, None
    said = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(SOURCE), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None, None
        said.append(done.stdout.strip())
    return said[0], bool(said[1])


def _short(path: str) -> str:
    """Returns the path relative to the working directory where it lies below it, else absolute."""
    if "://" in path:
        return path
    place = Path(path).absolute()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)
