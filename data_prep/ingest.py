"""Finds RGBA material in a folder, decodes each clip once, and writes one JSON line for it: what it
is and shows."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from acetate.cli import run
from acetate.console import printable
from acetate.media.sequences import is_sequence
from acetate.replacing import check_out, write_json
from acetate.video_io import IMAGES, VIDEOS
from data_prep.bad_clips import SHOWN, BadClips, print_bad
from data_prep.candidates import Folder, clip_key, pictures, sidecar, stamps, survey
from data_prep.examine import (
    SETTINGS,
    Outcome,
    Settings,
    Task,
    as_json,
    examine,
    guard,
    lost,
    of_json,
    said_of_names,
)
from data_prep.executor import check, progress
from data_prep.found import Found
from data_prep.groups import grouped
from data_prep.journal import lock_of, only_writer, open_journal, read_journal, write_lines


@dataclass(frozen=True)
class Ingested:
    """clips and bad (key -> reason) in the order of the files. notes: of tables, sequences and
    groups. files: every file of the folder, and what became of it.

    seconds: of one core, that decoding and measuring the clips took; 0 for those that an earlier
    run did.
    """

    clips: list[Found]
    bad: dict[str, str]
    notes: list[str]
    files: list[dict[str, Any]]
    seconds: float


def ingest(
    *,
    source: Path,
    out: Path,
    bad_clip_budget: int,
    settings: Settings = SETTINGS,
    executor: str = "local",
    workers: int = 0,
    preview: bool = False,
) -> Ingested:
    """Writes `out` (JSON lines) and beside it NAME.report.json, unless `preview`.

    What is finished is kept in NAME.journal.jsonl until all is, so that a run that was interrupted
    goes on. Each file is decoded in a process that may be killed, except with workers=0. Raises
    FileNotFoundError without a source, ValueError for a table that cannot be used, and TooManyBad
    past the budget or ValueError where no clip is found, which write the report alone.
    """
    check(executor, workers)
    if not preview:
        check_out(out)
    source, journal = source.resolve(), out.with_name(out.stem + ".journal.jsonl")
    written = {path.resolve() for path in (out, report_of(out), journal, lock_of(out))}
    with nullcontext() if preview else only_writer(out):
        folder = survey(source, written)
        tasks = list(_tasks(source, folder, settings, guarded=workers > 0))
        # Before anything is decoded: a file that changes later is decoded again by a run that goes
        # on.
        prints = [_fingerprint(task) for task in tasks]
        done = {} if preview else _finished(journal)
        todo = [(task, seen) for task, seen in zip(tasks, prints, strict=True) if seen not in done]
        fresh = _outcomes(todo, None if preview else journal, executor, workers)
        known = done | fresh
        outcomes = [known[seen] for seen in prints]
        pairs = list(zip(tasks, outcomes, strict=True))
        looks = {task.key: outcome.look for task, outcome in pairs if outcome.look}
        found = [(task.candidate, outcome.found) for task, outcome in pairs if outcome.found]
        clips, said = grouped(source, found, looks)
        notes = [*folder.notes, *said]
        bad = {task.key: outcome.reason for task, outcome in pairs if outcome.reason is not None}
        files = _account(source, folder, tasks, outcomes)
        if not preview:
            report = {"clips": len(clips), "bad": bad, "notes": notes, "files": files}
            if files:
                write_json(report_of(out), report)
            BadClips(bad_clip_budget).add(bad)
            if not clips:
                journal.unlink(missing_ok=True)
                raise ValueError(nothing_found(source, files, bad, report_of(out)))
            write_lines(out, map(asdict, clips))
            journal.unlink(missing_ok=True)
    return Ingested(clips, bad, notes, files, sum(outcome.seconds for outcome in fresh.values()))


def report_of(out: Path) -> Path:
    return out.with_name(out.stem + ".report.json")


def _tasks(source: Path, folder: Folder, settings: Settings, guarded: bool) -> Iterator[Task]:
    taken: set[str] = set()
    for candidate in folder.candidates:
        key = clip_key(source, candidate.path, taken)
        taken.add(key)
        yield Task(key, candidate, settings, guarded)


def _finished(journal: Path) -> dict[str, Outcome]:
    """Returns outcomes by the fingerprint of their tasks; what another version wrote counts for
    nothing."""
    done = {}
    for line in read_journal(journal):
        try:
            done[line["task"]] = of_json(line["outcome"])
        except (KeyError, TypeError):
            continue
    return done


def _outcomes(
    todo: list[tuple[Task, str]], journal: Path | None, executor: str, workers: int
) -> dict[str, Outcome]:
    """Yields outcomes by the fingerprints beside the tasks; each is in the journal before the
    next."""
    tasks = [task for task, _ in todo]
    guards = {"setup": partial(guard, tasks[0].settings), "lost": lost} if workers and tasks else {}
    function = examine if guards else partial(examine, None)
    settings = {"executor": executor, "workers": workers, "name": attrgetter("key"), **guards}
    fresh = {}
    with (
        progress(function, tasks, **settings) as results,
        open_journal(journal) if journal else nullcontext() as append,
    ):
        for (_, seen), (_, outcome) in zip(todo, results, strict=True):
            fresh[seen] = outcome
            if append:
                append({"task": seen, "outcome": as_json(outcome)})
    return fresh


def _fingerprint(task: Task) -> str:
    """Returns a hash of all that the outcome depends on; a file counts by its size and time."""
    files = [path for file in task.candidate.files for path in pictures(file)]
    text = sidecar(task.candidate.path)
    return hashlib.sha256(
        repr((task, stamps([*files, *([text] if text else [])]))).encode()
    ).hexdigest()


def _account(
    source: Path, folder: Folder, tasks: list[Task], outcomes: list[Outcome]
) -> list[dict[str, Any]]:
    """Returns what became of every file but those that this run writes, in the order of their
    names."""

    def name(path: Path) -> str:
        return printable(path.relative_to(source) if path.is_relative_to(source) else path)

    accounts: dict[str, dict[str, Any]] = {
        name: {"file": name, "ignored": reason} for name, reason in folder.ignored.items()
    }
    for task, outcome in zip(tasks, outcomes, strict=True):
        candidate, found = task.candidate, outcome.found
        used = set(found.files) if found else set()
        first = True
        for path in candidate.files:
            said: dict[str, Any] = {"part of": task.key}
            if found is None:
                said = {"refused": outcome.reason}
            elif str(path.resolve()) not in used:
                said = {"ignored": f"not used: {task.key} has alpha without it"}
            elif first and not is_sequence(path):
                said = {"ingested as": task.key, **({"notes": found.notes} if found.notes else {})}
            first = first and "ignored" in said
            for file in pictures(path):
                accounts[name(file)] = {"file": name(file), **said}
        if text := sidecar(candidate.path):
            accounts[name(text)] = {"file": name(text), "prompt of": task.key}
    for path in folder.files:
        accounts.setdefault(name(path), {"file": name(path), "ignored": "not part of any clip"})
    return [accounts[name] for name in sorted(accounts)]


def nothing_found(
    source: Path, files: Sequence[dict[str, Any]], bad: Mapping[str, str], report: Path
) -> str:
    """Returns what to say where no clip came of a folder: what was looked for, and what there
    was."""
    looked = (
        f"{', '.join(IMAGES + VIDEOS)} with alpha, pairs of colour and alpha (NAME_fgr + NAME_pha, "
        "NAME + NAME_matte), and videos with both in one picture, in it and the folders below"
    )
    if not files:
        return f"source={source} holds no files; looked for {looked}"
    why = [f"{key}: {reason}" for key, reason in bad.items()]
    why += [f"{file['file']}: {file['ignored']}" for file in files if "ignored" in file]
    return (
        f"source={source}: none of its {len(files)} files became a clip ({'; '.join(why[:3])}; "
        f"{report} has all). Looked for {looked}"
    )


def print_summary(console: Console, out: Path, report: Path | None, result: Ingested) -> None:
    frames, clips = Counter[str](), Counter(clip.kind for clip in result.clips)
    for clip in result.clips:
        frames[clip.kind] += clip.frames
    table = Table("kind", "clips", "frames")
    for kind, count in clips.most_common():
        table.add_row(kind, str(count), str(frames[kind]))
    ignored = sum("ignored" in file for file in result.files)
    total, rate = sum(frames.values()), f"{result.seconds:.1f} s of one core"
    if result.seconds:
        rate += f", {total / result.seconds:.0f} frames/s"
    console.print(
        f"{out}: {len(result.files)} files, {ignored} of them ignored; {len(result.clips)} clips, "
        f"{len(result.bad)} refused; {rate}",
        soft_wrap=True,
    )
    console.print(table)
    reasons = Counter(file["ignored"].split(":")[0] for file in result.files if "ignored" in file)
    for reason, count in reasons.most_common():
        console.print(f"{count} ignored: {reason}", soft_wrap=True)
    for note in result.notes[:SHOWN]:
        console.print(f"note: {note}", soft_wrap=True)
    if len(result.notes) > SHOWN:
        console.print(f"{len(result.notes) - SHOWN} more notes: {report or 'preview=false'}")
    if said := said_of_names([clip.prompt for clip in result.clips]):
        console.print(said, soft_wrap=True)
    print_bad(console, result.bad, report)


def print_preview(console: Console, clips: list[Found]) -> None:
    """Prints a line for each clip: what would be written, and why where that is not plain."""
    for clip in clips:
        decisions = clip.decisions or {}
        found = [
            f"{name}: {decisions[name]}"
            for name in ("crop", "cuts", "still")
            if decisions.get(name)
        ]
        found += [f"matte: {decisions['matte']}"] if decisions.get("matte") != "normal" else []
        rate = f" at {clip.fps:.4g} fps" if clip.fps else ""
        said = "; ".join(["", *clip.notes, *found])
        console.print(
            f"{clip.key}: {clip.kind}, {clip.frames} of {clip.width}x{clip.height}{rate}, colour "
            f"{decisions.get('reasons', {}).get('color', decisions['color'])}{said}",
            soft_wrap=True,
        )


def main(cfg: DictConfig) -> None:
    out, choices = Path(cfg.out), {name: str(value) for name, value in cfg.override.items()}
    limits = [field.name for field in fields(Settings) if field.name != "choices"]
    result = ingest(
        source=Path(cfg.source),
        out=out,
        settings=Settings(choices=choices, **{name: cfg[name] for name in limits}),
        workers=len(os.sched_getaffinity(0)) if cfg.workers is None else cfg.workers,
        **{name: cfg[name] for name in ("bad_clip_budget", "executor", "preview")},
    )
    console = Console(markup=False, highlight=False)  # names may hold brackets
    if cfg.preview:
        print_preview(console, result.clips)
    print_summary(console, out, None if cfg.preview else report_of(out), result)


if __name__ == "__main__":
    run("prep ingest")
