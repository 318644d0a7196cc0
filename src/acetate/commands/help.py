"""Prints `--help`: the comments of the YAML files, beside the settings that they stand at."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from acetate.cli import Program, conf

WIDTH, COLUMN = 100, 32  # of a line, and where comments begin
KEY = re.compile(r"( *)(\w+):(?: |$)(.*)")
GROUP = re.compile(r"  - (?:optional |override )*(/?[\w/]+(?:@[\w.]+)?): ([^#]*)(?:# (.*))?")
# `value # comment`
COMMENT = re.compile(r"""((?:"[^"]*"|'[^']*'|[^#"']|(?<!\s)#)*)(?:# ?(.*))?$""")


@dataclass
class Documented:
    """A YAML file: the comment at its top, and for each setting its path, its text and its comment.

    A comment that begins with two # is the title of what follows; it has no path.
    """

    about: list[str] = field(default_factory=list)
    settings: list[tuple[str, str, str]] = field(default_factory=list)


def read(file: Path) -> Documented:
    """Reads the comments of a config."""
    found, pending, parents = Documented(), list[str](), list[tuple[int, str]]()
    begun = False
    for line in file.read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            if text.startswith("## "):
                found.settings.append(("", "", text[3:]))
            elif not text.startswith("# @package"):
                (pending if begun else found.about).append(text[2:])
            continue
        begun = True
        group, key = GROUP.match(line), KEY.match(line)
        if group and group[3]:
            found.settings.append((group[1].lstrip("/"), group[2].strip(), group[3]))
        elif key and not line.lstrip().startswith("- "):
            while parents and parents[-1][0] >= len(key[1]):
                parents.pop()
            parents.append((len(key[1]), key[2]))
            value, comment = COMMENT.match(f" {key[3]}").groups()  # type: ignore[union-attr]
            words = " ".join([*pending, *([comment] if comment else [])])
            if parents[0][1] not in ("defaults", "hydra"):
                path = ".".join(name for _, name in parents)
                found.settings += _inside(path, value.strip(), words)
        pending = []
    return found


def _inside(path: str, value: str, comment: str) -> Iterator[tuple[str, str, str]]:
    """Yields a setting, and of a mapping on one line that has no comment those in it."""
    if comment or not value.startswith("{"):
        yield path, value, comment
        return
    for name, inner in yaml.safe_load(value).items():
        text = yaml.safe_dump(inner, default_flow_style=True, width=10**6)
        yield from _inside(f"{path}.{name}", text.removesuffix("...\n").strip(), "")


def help_of(program: Program, given: Sequence[str]) -> str:
    """Returns the whole text for a program; `given` are the overrides beside --help, which choose
    what is shown."""
    file = conf() / f"{program.config}.yaml"
    found = read(file)
    lines = list(paragraphs(found.about))
    if program.short == "train":
        lines += [*experiments(), *groups(), "", *chosen(program, given)]
    else:
        lines += ["", "Settings", *rows(found.settings)]
    if program.of_words:
        clips = read(conf() / f"{program.of_words.config}.yaml")
        lines += ["", *paragraphs(clips.about), "", "Settings", *rows(clips.settings)]
    lines += ["", f"acetate {program.name} ... --cfg job prints every setting and starts nothing."]
    return "\n".join(lines)


def paragraphs(about: Sequence[str]) -> Iterator[str]:
    """Yields comment lines as they are: blank ones divide, indented ones are lists."""
    yield from (line.rstrip() for line in about)


def rows(settings: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Yields `name=value comment`, wrapped; mappings without a comment of their own have rows for
    their settings."""
    for name, value, comment in settings:
        if not name:
            yield from ("", f"  {comment}")
        elif value or comment:
            shown = f"  {name}={value}" if value != "" else f"  {name}"
            yield from _row(shown, comment)


def _row(shown: str, comment: str) -> Iterator[str]:
    lines = textwrap.wrap(comment, WIDTH - COLUMN) or [""]
    if len(shown) > COLUMN - 2:
        yield shown
    else:
        yield f"{shown:{COLUMN}}{lines.pop(0)}".rstrip()
    yield from (" " * COLUMN + line for line in lines if line)


def experiments() -> Iterator[str]:
    """Yields all experiments, acetate's and those in ./conf, with their comments up to the commands
    in them."""
    yield from ("", "Experiments")
    for folder in dict.fromkeys((conf(), Path("conf").absolute())):
        for file in sorted((folder / "experiment").glob("*.yaml")):
            words = takewhile(lambda line: not line.startswith(" "), read(file).about)
            yield from _row(f"  experiment={file.stem}", " ".join(words))


def groups() -> Iterator[str]:
    """Yields the other groups of a run and their options."""
    yield from ("", "Groups (GROUP=OPTION)")
    apart = {"command", "prep", "experiment", "hydra", "paths", "gpu"}
    for folder in sorted(
        path for path in conf().iterdir() if path.is_dir() and path.name not in apart
    ):
        for group in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            options = sorted(file.stem for file in group.glob("*.yaml"))
            if options:
                yield from _row(f"  {group.relative_to(conf())}", " | ".join(options))


def chosen(program: Program, given: Sequence[str]) -> Iterator[str]:
    """Yields the settings of the composed config that have a comment or are the experiment's own,
    with their values."""
    from acetate.commands.program import composed

    try:
        config = composed(program.config, given, hydra=True)
    except (HydraException, OmegaConfBaseException) as error:
        yield f"The settings of {' '.join(given)}: {str(error).splitlines()[0]}"
        return
    choices = {
        str(group): str(option) for group, option in config.hydra.runtime.choices.items() if option
    }
    values: Any = OmegaConf.to_container(config, resolve=False)
    comments = {
        name: comment
        for name, _, comment in read(conf() / f"{program.config}.yaml").settings
        if comment
    }
    first = ("experiment", "data", "model", "loss")
    for group in sorted(
        choices, key=lambda name: (name not in first, first.index(name) if name in first else 0)
    ):
        for file in _files(group.partition("@")[0], choices[group]):
            package = _package(file, group)
            for name, value, comment in read(file).settings:
                own = group == "experiment" and value and "${" not in value and "._" not in name
                if name and (comment or own) and not comments.get(f"{package}{name}"):
                    comments[f"{package}{name}"] = comment
    yield f"Settings of experiment={choices.get('experiment')}"
    yield from rows([(name, _shown(values, name), comment) for name, comment in comments.items()
                     if _shown(values, name) is not None])  # type: ignore[misc]  # fmt: skip


def _files(group: str, option: str) -> Iterator[Path]:
    """Yields the file of a group's option and those that it begins with."""
    file = next(
        (
            path
            for root in (conf(), Path("conf"))
            if (path := root / group / f"{option}.yaml").is_file()
        ),
        None,
    )
    if file is None or group.startswith("hydra"):
        return
    yield file
    for base in (yaml.safe_load(file.read_text()) or {}).get("defaults", ()):
        if isinstance(base, str) and base != "_self_":
            yield from _files(group, base)


def _package(file: Path, group: str) -> str:
    """Returns the place of a file's settings, with a dot at its end."""
    said = re.search(r"^# @package (\S+)", file.read_text())
    name = said[1] if said else group.partition("@")[2] or group.replace("/", ".")
    return "" if name == "_global_" else f"{name}."


def _shown(values: Any, name: str) -> str | None:
    """Writes the value at a dotted path as YAML has it on one line; None where there is none, ""
    for a mapping."""
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    if isinstance(values, dict):
        return ""
    return (
        yaml.safe_dump(values, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    )
