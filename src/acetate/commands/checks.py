"""Checks that the settings of a program keep their rules, before it does anything."""

import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from acetate.commands.rules import RULES
from acetate.settings import Rule, SettingError

MISSING = "???"
OURS = ("acetate", "lightning")  # whose settings the table knows
ABOUT_RUNS = ("estimate", "cost")  # which need no data, and ask about other machines than this one
UNCHECKED = {"paths", "logger", "hydra"}


def rule_of(program: str, path: str) -> Rule | None:
    """Returns the rule of the longest end of PROGRAM.PATH in the table; None where there is
    none."""
    parts = [program, *path.split(".")]
    for start in range(len(parts)):
        rule = RULES.get(".".join(parts[start:]))
        if rule is not None:
            return rule
    return None


def settings_of(
    program: str, config: DictConfig, path: str = ""
) -> Iterator[tuple[str, Any, Rule | None]]:
    """Yields every setting that lies in `config`: its path, its value, its rule.

    Lists are one value, and so are mappings with a rule of their own. A reference is followed; one
    to a setting without a value is left out, as that setting comes itself. `???` is a value.
    """
    for name in map(str, config):
        at = f"{path}.{name}" if path else name
        if name.startswith("_") or at in UNCHECKED:
            continue
        rule = rule_of(program, at)
        if OmegaConf.is_missing(config, name):
            yield at, MISSING, rule
            continue
        try:
            value = config[name]
        except OmegaConfBaseException:
            continue
        if isinstance(value, DictConfig) and (rule is None or "_target_" in value):
            # others check their own
            if str(value.get("_target_", "acetate")).split(".")[0] in OURS:
                yield from settings_of(program, value, at)
        else:
            yield (
                at,
                OmegaConf.to_container(value, resolve=True)
                if OmegaConf.is_config(value)
                else value,
                rule,
            )


def check_settings(program: str, config: DictConfig) -> None:
    """Raises SettingError for the first setting that breaks its rule or, where a program needs them
    all, has no value."""
    asks = program in ABOUT_RUNS
    for path, value, rule in settings_of(program, config):
        if rule is None:
            continue
        if value == MISSING:
            if asks:
                continue
            raise SettingError(
                path, value, f"{path} has no value: must be {rule.says}. Give {path}=..."
            )
        rule.check(path, value)
    if not asks:
        _check_batch(config)


def _check_batch(config: DictConfig) -> None:
    """Raises SettingError for training clips that the memory of this machine cannot hold."""
    data = config.get("data")
    if not isinstance(data, DictConfig) or not {"frames", "height", "width"} <= set(data):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("batch_size", "val_batch_size"):
        clips = data.get(name) or 1
        size = 16 * clips * data.frames * data.height * data.width  # rgb and alpha, float32
        if size > memory:
            raise SettingError(
                f"data.{name}",
                clips,
                f"data.{name}={clips} clips of data.frames={data.frames}, "
                f"data.height={data.height}, data.width={data.width} take {size / 2**30:,.0f} "
                f"GiB, and this machine has {memory / 2**30:.0f}. Lower one of them.",
            )
