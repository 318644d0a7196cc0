"""Measures finished clips of one or several systems, alone or against true ones: a table of clips,
a summary with intervals, and paired differences."""

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from acetate.cli import run
from acetate.commands.recorded import run_of
from acetate.console import printable
from acetate.media.clip import Limits
from acetate.replacing import check_out
from acetate.vgg import lpips_network
from data_prep.bad_clips import print_bad
from data_prep.candidates import Candidate
from data_prep.executor import alone_and_lean, progress
from data_prep.finished import clips_of, named, place_of, said_of
from data_prep.measuring import Choices, Measured, Reconstruct, Work, measured
from data_prep.summary import check_ours, print_summary, row_of, summarised, write_tables

TOLD = 5  # names in a message


def stratum_of(candidate: Candidate, folder: Path) -> str:
    """Returns what kind of clip it is: as its table's column or its JSON says, else the folder that
    it lies in."""
    said = candidate.row.get("stratum") or said_of(candidate).get("stratum")
    return printable(said) if said else place_of(candidate, folder)


def works(folders: Sequence[Path], references: Path | None, through: bool) -> list[Work]:
    """Returns every clip of every folder, with its reference. through: each goes through a VAE.
    Raises FileNotFoundError and ValueError where there is nothing to measure."""
    for setting, folder in [*(("folders", f) for f in folders), ("references", references)]:
        if folder and not folder.is_dir():
            raise NotADirectoryError(
                f"{setting}={printable(folder)} is not a folder. Name one that holds clips."
            )
    for folder in folders:
        trained = run_of(str(folder))
        if trained is not None and trained.is_relative_to(folder):
            raise ValueError(
                f"folders={printable(folder)} is a run, not a folder of clips. Give run={folder}: "
                "that measures its last checkpoint."
            )
    found = [clips_of(folder) for folder in folders]
    empty = [str(folder) for folder, clips in zip(folders, found, strict=True) if not clips]
    if empty:
        raise ValueError(
            f"folders={', '.join(empty)}: no clip was found there. Give a folder of clips with "
            "alpha; docs/media.md lists what is read."
        )
    true = clips_of(references) if references else {}
    if references and not any(name in true for clips in found for name in clips):
        raise ValueError(
            f"references={references}: {_few(true)} there, and {_few(found[0])} in {folders[0]}; "
            "a clip and its reference have one name, whatever their formats. Rename one of them."
        )
    made = []
    for system, folder, clips in zip(named(folders), folders, found, strict=True):
        for name in sorted(clips):
            own = stratum_of(clips[name], folder)
            if references is None:
                made.append(Work(system, name, own, clips[name], through=through))
            elif name in true:
                stratum = own or stratum_of(true[name], references)
                made.append(Work(system, name, stratum, clips[name], true[name]))
            else:
                made.append(Work(system, name, own, clips[name], why=_unmatched(name, true)))
    return made


def _few(names: Mapping[str, Any]) -> str:
    """Returns the first names in words."""
    shown = [printable(name) for name in sorted(names)[:TOLD]]
    return ", ".join(shown) + (", ..." if len(names) > TOLD else "") if shown else "no clip is"


def _unmatched(name: str, true: Mapping[str, Candidate]) -> str:
    near = difflib.get_close_matches(name, true, 1)
    hint = f", the nearest is {printable(near[0])}" if near else ""
    return f"no reference has its name{hint}. Rename one of them."


def missing(works: Sequence[Work], references: Path | None) -> list[str]:
    """Says which references a system has no clip of."""
    if references is None:
        return []
    true, systems = set(clips_of(references)), dict.fromkeys(work.system for work in works)
    lines = []
    for system in systems:
        left = true - {work.name for work in works if work.system == system}
        if left:
            lines.append(f"{system} has no clip of {len(left)} references: "
                         f"{_few(dict.fromkeys(left))}")  # fmt: skip
    return lines


def lost(work: Work, why: str) -> Measured:
    """Returns what stands for a clip whose process was ended."""
    return Measured(why=why)


def prepared(number: int, run: str | None) -> Reconstruct | None:
    """Prepares a process that measures, alone or beside others; loads the VAE that clips go
    through, if any."""
    alone_and_lean()
    if run is None:
        return None
    from data_prep.through import reconstruction  # seconds to import

    return reconstruction(run)


def measure(again: Reconstruct | None, work: Work, choices: Choices) -> Measured:
    """Returns `measured`, in the form that a process with a setup is asked in."""
    return measured(work, choices, again)


def main(config: DictConfig) -> Path:
    out = Path(config.out)
    check_out(out, folder=True)
    check_ours(out)
    if config.lpips:
        for net in ("vgg",) if config.alphavae is False else ("vgg", "alex"):
            lpips_network("set lpips=false", net=net)
    folders = [Path(folder).resolve() for folder in config.folders]
    references = Path(config.references).resolve() if config.references else None
    if config.run and references:
        raise ValueError(
            f"run={config.run} and references={references} are both given: clips that go through "
            "the run's VAE are compared with themselves. Leave one of them out."
        )
    todo = works(folders, references, config.run is not None)
    published = None if config.alphavae == "auto" else config.alphavae
    limits = Limits(max_pixels=config.max_pixels, max_frames=config.max_frames)
    choices = Choices(config.lpips, published, config.cut_longer, limits)
    function = partial(measure, choices=choices)
    settings = {"executor": "local", "workers": config.workers, "lost": lost,
                "setup": partial(prepared, run=config.run)}  # fmt: skip
    with progress(function, todo, desc="clips", **settings) as results:
        done = list(results)
    console = Console(markup=False, highlight=False, width=120)
    bad = {str(work): found.why for work, found in done if found.why}
    print_bad(console, bad, None if len(bad) == len(done) else out / "clips.csv")
    rows = [row_of(work, found) for work, found in done]
    if len(bad) == len(done):
        raise ValueError(
            f"folders={', '.join(map(str, config.folders))}: no clip could be measured; the "
            "reasons stand above. Nothing was written."
        )
    summary = summarised(rows)
    print_summary(console, rows, summary)
    for line in missing(todo, references):
        console.print(line, soft_wrap=True)
    write_tables(console, out, rows, summary)
    return out


if __name__ == "__main__":
    run("evaluate")
