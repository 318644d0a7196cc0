"""Keeps secrets of a command line from Hydra: what it composes, writes and hands on has tokens in
their place; a program's config, in memory, has them."""

import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import hydra._internal.hydra
import hydra.core.utils
from hydra._internal.core_plugins import basic_sweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from acetate.commands.recorded import name_of, quoted
from acetate.redaction import (
    LOGIN,
    PAIR,
    QUERY,
    SECRET,
    TOKEN,
    is_secret,
    redacted,
    remember,
    scrubbed,
    secrets_of,
    settings_with_secrets,
)

TABLE = "ACETATE_SECRETS"  # environment, also of processes that this one starts: token -> secret


def hide(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with tokens, ***NAME***, in the place of secrets, which go into
    TABLE."""
    table = _table()
    hidden = [text if text.startswith("-") else _hide(text, table) for text in arguments]
    os.environ[TABLE] = json.dumps(table)
    remember(str(secret) for secret in table.values())
    return hidden


def find(arguments: Iterable[str]) -> None:
    """Takes secrets that a run did not record from the environment. Raises ValueError for the first
    that is not there."""
    table = _table()
    for argument in arguments:
        for token in TOKEN.findall(argument):
            variable = "ACETATE_" + re.sub(r"\W", "_", token.strip("*")).upper()
            if token not in table and variable in os.environ:
                table[token] = os.environ[variable]
            if token not in table:
                raise ValueError(
                    f"{name_of(argument)} has a secret, {token}, which runs do not record. Give "
                    f"{name_of(argument)}=... again, or set {variable} in the environment to what "
                    f"{token} stands for."
                )
    os.environ[TABLE] = json.dumps(table)
    remember(str(secret) for secret in table.values())


def refuse_in_jobs(config: DictConfig) -> None:
    """Raises ValueError for settings of YAML files that hold a secret, where a sweep's launcher
    writes the whole config into files for its jobs. config: with Hydra's own settings."""
    launcher = config.hydra.launcher.get("_target_", "")
    held = OmegaConf.to_container(config, resolve=False)
    assert isinstance(held, dict)
    held.pop("hydra")
    if "submitit" in launcher and (found := sorted({*settings_with_secrets(held)})):
        variable = "ACETATE_" + re.sub(r"\W", "_", found[0]).upper()
        raise ValueError(
            f"{', '.join(found)}: a secret in a YAML file, which {launcher.rpartition('.')[2]} "
            "would write for its jobs to read. Take it out of the file: write "
            f"${{oc.env:{variable}}} there and set {variable} in the environment, or give "
            f"{found[0]}=... on the command line."
        )


def reveal(config: DictConfig) -> DictConfig:
    """Returns a program's settings with the secrets in the place of their tokens, and remembers the
    secrets."""
    held = OmegaConf.to_container(config, resolve=False)
    shown = _reveal(held, _table())
    remember(secrets_of(shown))
    if shown == held:
        return config
    found = OmegaConf.create(shown)
    assert isinstance(found, DictConfig)
    OmegaConf.set_struct(found, OmegaConf.is_struct(config))
    return found


def show_without_secrets(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints a traceback without secrets, as sys.excepthook."""
    lines = traceback.format_exception(kind, error, trace)
    print(scrubbed("".join(lines)), end="", file=sys.stderr, flush=True)


def _table() -> dict[str, Any]:
    return json.loads(os.environ.get(TABLE, "{}"))


def _hide(argument: str, table: dict[str, Any]) -> str:
    """Hides the secrets of one override. Tokens are named after settings, so that the same command
    has the same ones."""
    key, equals, text = argument.partition("=")
    name = name_of(argument)
    if not equals or TOKEN.search(text) or (name.startswith("hydra") and "://" not in text):
        return argument

    def token(secret: Any, of: str = name) -> str:
        of = re.sub(r"[^\w.-]+", "-", of)
        numbered = (f"***{of}{f'.{n}' if n > 1 else ''}***" for n in range(1, len(table) + 2))
        one = next(one for one in numbered if table.get(one, secret) == secret)
        table[one] = secret
        return one

    def in_text(match: re.Match[str]) -> str:
        return token(re.sub(r"\\(.)", r"\1", match[0]))  # Hydra's escapes

    def in_value(value: Any, of: str) -> Any:
        if isinstance(value, dict):
            return {name: in_value(item, f"{of}.{name}") for name, item in value.items()}
        if isinstance(value, list):
            return [in_value(item, of) for item in value]
        return token(value, of) if is_secret(of, value) else value

    text = LOGIN.sub(in_text, text)
    text = QUERY.sub(lambda match: f"{match[1]}?{PAIR.sub(in_text, match[2])}", text)
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        value = None if override.is_sweep_override() else override.value()
    except HydraException:
        value = text  # of texts that Hydra cannot read
    if SECRET.search(name) or (isinstance(value, dict | list) and SECRET.search(text)):
        hidden = in_value(value, name)
        if hidden != value:
            return f"{key}={_written(hidden)}"
    return f"{key}={text}"


def _written(value: Any) -> str:
    """Writes a value as `quoted` does, also where names have signs of Hydra's grammar."""
    if isinstance(value, dict):
        items = (
            re.sub(r"[\\:=,(){}\[\]\s]", r"\\\g<0>", str(name)) + ":" + _written(item)
            for name, item in value.items()
        )
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return quoted(value)


def _reveal(value: Any, table: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {_reveal(name, table): _reveal(item, table) for name, item in value.items()}
    if isinstance(value, list):
        return [_reveal(item, table) for item in value]
    if not isinstance(value, str):
        return value
    if value in table:
        return table[value]
    return TOKEN.sub(lambda match: str(table.get(match[0], match[0])), value)


def _recorded(config: Any) -> Any:
    return OmegaConf.create(redacted(OmegaConf.to_container(config, resolve=False)))


class _Records(OmegaConf):
    """Writes Hydra's records without secrets: those of a user's own configs have no token."""

    @staticmethod
    def save(config: Any, f: Any, resolve: bool = False) -> None:
        OmegaConf.save(_recorded(config), f, resolve)

    @staticmethod
    def to_yaml(cfg: Any, *, resolve: bool = False, sort_keys: bool = False) -> str:
        return OmegaConf.to_yaml(_recorded(cfg), resolve=resolve, sort_keys=sort_keys)


# Hydra has no place where what it writes could be changed: .hydra/*.yaml, multirun.yaml, --cfg
hydra.core.utils.OmegaConf = basic_sweeper.OmegaConf = _Records  # type: ignore[misc]
hydra._internal.hydra.OmegaConf = _Records  # type: ignore[misc]
