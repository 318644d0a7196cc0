"""The one command, `acetate COMMAND [name=value ...]`. It imports nothing heavy before a command is
chosen."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any

HELP = ("-h", "--help")


@dataclass(frozen=True)
class Program:
    """A command: its name, the module whose `main(config)` it runs, its config below conf/, and a
    line about it.

    inherits: the function of `acetate.commands.inherited` that takes settings over from a run, if
    any. takes: the setting that bare words of the command line are a list of, if any. of_words: the
    program that runs in its place where that setting is given, if any.
    """

    name: str
    module: str
    config: str
    line: str
    inherits: str | None = None
    takes: str | None = None
    of_words: "Program | None" = None

    @property
    def short(self) -> str:
        """The name without its group."""
        return self.name.rpartition(" ")[2]


def _command(name: str, line: str, inherits: str | None = None) -> Program:
    return Program(name, f"acetate.commands.{name}", f"command/{name}", line, inherits)


def _prep(name: str, line: str) -> Program:
    return Program(f"prep {name}", f"data_prep.{name}", f"prep/{name}", line)


GROUPS: dict[str, tuple[Program, ...]] = {
    "Clips in": (
        _prep("ingest", "find transparent clips in a folder and measure them"),
        _prep("filter", "drop near duplicates and what has no transparency to learn from"),
        _prep("caption", "write a prompt for each clip"),
        _prep("shard", "clean the clips and write them as shards for training"),
        _prep("inspect", "a page that shows the clips of shards"),
        _prep("cache_latents", "encode clips and prompts once, for the DiT stage"),
        _prep("synthesize", "draw procedural clips, for a first try without data"),
        _prep("render", "render physically based clips with Blender"),
        _prep("collect", "list the clips of a free package, for ingest"),
        _prep("open_rgba", "build the named set open-rgba from free packages and drawn clips"),
    ),
    "Training": (
        Program(
            "train", "acetate.commands.train", "config",
            "train a stage: experiment=vae_rgba, then experiment=dit_dora",
        ),
        _command("estimate", "the GPU memory that an experiment needs"),
        _command("cost", "time, GPUs and storage of a recipe at any size"),
    ),
    "Clips out": (
        _command("sample", "prompts to transparent clips", "sample"),
        Program(
            "evaluate", "acetate.commands.evaluate", "command/evaluate",
            "figures of finished clips, or of a trained model on its validation clips",
            "evaluate", "folders",
            Program("evaluate", "data_prep.evaluate", "command/evaluate_clips", ""),
        ),
        _command("follow", "whether samples stay where their guide says", "follow"),
        _command("export", "weights for diffusers, ComfyUI or Wan-Alpha", "export"),
        Program(
            "check", "data_prep.check", "command/check",
            "whether players and editors will see a file's transparency", takes="files",
        ),
        Program(
            "view", "data_prep.view", "command/view",
            "a page that plays transparent clips, of several systems side by side",
            takes="folders",
        ),
    ),
    "Speed": (_command("benchmark", "a training step and the reader against their references"),),
}  # fmt: skip
PROGRAMS = {program.name: program for group in GROUPS.values() for program in group}


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs the command that the arguments name. Raises SystemExit with code 2 where they name
    none."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--completions" in arguments[:1]:
        print("\n".join(completions(os.environ.get("COMP_LINE", ""))))
        return None
    if "--version" in arguments[:1]:
        print(f"acetate {version('acetate')}")
        return None
    if not arguments or arguments[0] in (*HELP, "help"):
        print(overview())
        return None
    if arguments[0] == "prep" and (len(arguments) == 1 or arguments[1] in HELP):
        print(overview(only="prep "))
        return None
    words = 2 if arguments[0] == "prep" else 1
    name = " ".join(arguments[:words])
    if name not in PROGRAMS:
        raise SystemExit(_unknown(name))
    return run(name, arguments[words:])


def run(name: str, arguments: Sequence[str] | None = None) -> Any:
    """Runs the command of that name with the arguments, by default those of this process."""
    from acetate.commands.program import start

    out: object = sys.stdout
    if isinstance(out, TextIOWrapper):  # names of files may be no Unicode
        out.reconfigure(errors="backslashreplace")
    program = PROGRAMS[name]
    given = _named(program.takes, list(sys.argv[1:] if arguments is None else arguments))
    if program.of_words and any(text.startswith(f"{program.takes}=") for text in given):
        program = program.of_words
    return start(program, given)


def _named(setting: str | None, arguments: list[str]) -> list[str]:
    """Returns the arguments with bare words as the list that is the setting's value."""
    if setting is None:
        return arguments
    from acetate.commands.recorded import quoted

    bare = [
        text
        for text in arguments
        if not text.startswith("-") and ("=" not in text or Path(text).exists())
    ]
    rest = [text for text in arguments if text not in bare]
    return [*rest, f"{setting}={quoted(bare)}"] if bare else rest


def overview(only: str = "") -> str:
    """Lists all commands in groups, a line each; `only` keeps those whose name begins with it."""
    lines = [
        "acetate COMMAND [name=value ...]",
        "",
        "Trains video models that output transparency.",
    ]
    for title, programs in GROUPS.items():
        shown = [program for program in programs if program.name.startswith(only)]
        if shown:
            lines += ["", title, *(f"  {program.name:20} {program.line}" for program in shown)]
    return "\n".join([
        *lines, "", "acetate COMMAND --help   its settings, with their defaults",
        "acetate --version        the version",
    ])  # fmt: skip


def _unknown(name: str) -> str:
    """Returns the message for an unknown command, with the nearest one."""
    if "=" in name:
        return (
            f"acetate: {name} is a setting, not a command; a command comes first, as in acetate "
            f"train {name}"
        )
    near = difflib.get_close_matches(name, PROGRAMS, 1, 0.5)
    near = near or [full for full in PROGRAMS if full.rpartition(" ")[2] == name.rpartition(" ")[2]]
    hint = f"; the nearest is acetate {near[0]}" if near else ""
    return f"acetate: there is no command {name!r}{hint}. acetate --help lists them."


def conf() -> Path:
    """Returns the folder of the configs: of the clone, or of the installed package."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def completions(line: str) -> list[str]:
    """Returns what a shell may put for the last word of a command line: commands, settings, options
    of groups."""
    words = line.split(" ")[1:]
    typed = words[-1] if words else ""
    given = " ".join(words[:-1])
    name = next((name for name in PROGRAMS if given == name or given.startswith(f"{name} ")), None)
    if name is None:
        rest = [
            full[len(given) + 1 if given else 0 :] for full in PROGRAMS if full.startswith(given)
        ]
        return sorted({full.split(" ")[0] for full in rest if full.startswith(typed)})
    if "=" in typed:
        group, _, option = typed.partition("=")
        names = sorted(file.stem for file in (conf() / group).glob("*.yaml"))
        return [found for found in names if found.startswith(option)]  # shells divide words at `=`
    text = (conf() / f"{PROGRAMS[name].config}.yaml").read_text()
    keys = [key for key in re.findall(r"^(\w+):", text, re.M) if key not in ("defaults", "hydra")]
    keys += re.findall(r"^  - (?:optional )?/?(\w+): ", text, re.M)
    return sorted(f"{key}=" for key in dict.fromkeys(keys) if key.startswith(typed))
