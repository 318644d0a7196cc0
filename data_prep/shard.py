"""Turns an ingested manifest into clip shards: clean alpha, straight colour, lossless."""

import hashlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from acetate.cli import run
from acetate.console import printable
from acetate.data.keys import first_reasons
from acetate.data.shards import MANIFEST, ShardError, read_manifest
from acetate.data.splits import Split, assign_splits
from acetate.data.writer import EncodedClip, ShardWriter, encode_frames
from data_prep.bad_clips import BadClips, print_bad
from data_prep.cleaning import Settings, overrides, pieces
from data_prep.cleaning import done as done_to
from data_prep.examine import said_of_names
from data_prep.executor import alone_and_lean, check, progress
from data_prep.folders import DECISIONS, MEASURED, check_folder, making
from data_prep.found import Found
from data_prep.journal import read_journal, write_lines
from data_prep.plans import Plan, decide, open_line, read_lines

IN_MEMORY = 2**27  # bytes that a clip's encoded pieces can take; what goes beyond waits in files
SPILL = ".pieces"  # folder beside the tars for those
UNSURE = 0.5  # colour below this confidence is listed after the run
STEPS = {
    "crop": "black bars cut off", "still": "films of one picture made stills",
    "cuts": "divided into shots",
    "range": "alpha stretched to 0 and 255", "alpha": "alpha noise snapped",
    "color": "made straight", "trim": "empty margins cut off",
    "matte": "kept with unusual alpha",
}  # fmt: skip


def shard(
    *,
    manifest: Path,
    out: Path,
    settings: Settings,
    val_fraction: float,
    max_clips: int,
    max_bytes: int,
    bad_clip_budget: int,
    executor: str,
    workers: int,
    replace: bool = False,
) -> dict[str, Any]:
    """Writes the shards and returns their manifest; a run that was interrupted goes on where its
    last tar ended.

    A folder that already holds these very clips is left as it is; one that holds others is made
    anew with `replace`, else ShardError, as if no clip is left to write. TooManyBad past the
    budget.
    """
    check(executor, workers)
    check_folder(out)
    found = read_lines(manifest)
    made_by = {
        "command": "data_prep.shard",
        "settings": {
            **vars(settings), "val_fraction": val_fraction, "max_clips": max_clips,
            "max_bytes": max_bytes,
            "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        },
    }  # fmt: skip
    with making(out, made_by, replace) as folder:
        if folder:
            splits = assign_splits({line.key: line.group for line in found}, val_fraction)
            with ShardWriter(
                folder, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by
            ) as writer:
                bad = BadClips(bad_clip_budget)
                plans, unreadable = decide(
                    found, settings, folder / MEASURED, executor=executor, workers=workers
                )
                bad.add(unreadable)
                writer.skipped |= (
                    refused_before(manifest, found)
                    | bad
                    | {plan.line.key: plan.refusal for plan in plans if plan.refusal}
                )
                fill(writer, plans, settings, splits, bad, executor, workers)
                if not writer.tars and not writer.pending:
                    raise ShardError(
                        f"none of the {len(found)} clips of {manifest} became a shard "
                        f"({first_reasons(writer.skipped) or 'it is empty'}). Ingest other media, "
                        "or change the settings that refuse these."
                    )
                write_lines(folder / DECISIONS, (plan.as_json(settings) for plan in plans))
    return read_manifest(out)


def refused_before(manifest: Path, found: Sequence[Found]) -> dict[str, str]:
    """Returns key -> reason of what ingest refused, as its report beside the manifest says; nothing
    if the report is of another run."""
    path = manifest.with_name(f"{manifest.stem}.report.json")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        bad, clips = report["bad"], report["clips"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if clips != len(found) or not isinstance(bad, dict):
        return {}
    keys = {line.key for line in found}
    return {key: printable(f"{reason}") for key, reason in bad.items() if key not in keys}


def fill(
    writer: ShardWriter,
    plans: Sequence[Plan],
    settings: Settings,
    splits: Mapping[str, Split],
    bad: BadClips,
    executor: str,
    workers: int,
) -> None:
    """Adds the pieces that the writer lacks."""
    todo = [
        plan for plan in plans if not plan.refusal and not all(key in writer for key in plan.pieces)
    ]
    run = {"executor": executor, "workers": workers, "name": attrgetter("line.key")}
    spill = writer.out / SPILL
    shutil.rmtree(spill, ignore_errors=True)
    with progress(partial(prepare, settings=settings, spill=spill), todo, **run) as results:
        for plan, result in results:
            line = plan.line
            if isinstance(result, str):
                writer.skipped[line.key] = result
                bad.add({line.key: result})
                continue
            for key, clip in zip(plan.pieces, result, strict=True):
                if key not in writer:
                    writer.add(
                        key,
                        clip,
                        split=splits[line.key],
                        prompt=line.prompt,
                        source=line.source,
                        licence=line.licence,
                        lossy=line.lossy,
                        premultiplied_source=plan.decisions.color == "black",
                        done=done_to(plan.decisions, settings),
                    )
                if isinstance(clip.media, Path):
                    clip.media.unlink()
    shutil.rmtree(spill, ignore_errors=True)


def prepare(plan: Plan, settings: Settings, spill: Path) -> list[EncodedClip] | str:
    """Returns the encoded pieces of a clip, or why there are none. spill: folder for those beyond
    IN_MEMORY."""
    alone_and_lean()
    line = plan.line
    fps = settings.fps or line.fps or settings.default_fps
    files = [spill / hashlib.sha256(key.encode()).hexdigest() for key in plan.pieces]
    done: list[EncodedClip] = []
    try:
        clip = open_line(line)
        held = 0
        pictures = pieces(clip, plan.frames, plan.decisions, settings)
        for taken, frames, file in zip(plan.frames, pictures, files, strict=True):
            beyond = held + len(taken) * line.width * line.height * 4 > IN_MEMORY
            if beyond:
                spill.mkdir(exist_ok=True)
            done.append(encode_frames(frames, len(taken), fps, file if beyond else None))
            held += 0 if beyond else done[-1].size
        deque(clip, maxlen=0)
        if clip.held != line.frames:
            raise ValueError(
                f"has {clip.held} frames, the manifest says {line.frames}; ingest the folder again"
            )
    except ValueError as error:  # MediaError is one
        for file in files:
            file.unlink(missing_ok=True)
        return printable(error)
    return done


def main(cfg: DictConfig) -> None:
    manifest, out = Path(cfg.manifest), Path(cfg.out)
    chosen = ("color", "alpha_range", "alpha_low", "alpha_high", "crop", "still", "cuts")
    choices = overrides(**{name: cfg[name] for name in chosen})
    done = [field.name for field in fields(Settings) if field.name != "choices"]
    settings = Settings(choices=choices, **{name: cfg[name] for name in done})
    if cfg.preview:
        preview(manifest, settings, executor=cfg.executor, workers=cfg.workers)
        return
    same = ("val_fraction", "max_clips", "bad_clip_budget", "executor", "workers", "replace")
    own = {name: cfg[name] for name in same} | {"max_bytes": int(cfg.max_mb * 2**20)}
    result = shard(manifest=manifest, out=out, settings=settings, **own)
    print_summary(out, result)
    if said := said_of_names([line.prompt for line in read_lines(manifest)]):
        Console(markup=False, highlight=False).print(said, soft_wrap=True)


def preview(manifest: Path, settings: Settings, *, executor: str, workers: int) -> None:
    """Decides and prints; writes nothing."""
    with TemporaryDirectory() as folder:
        plans, bad = decide(
            read_lines(manifest),
            settings,
            Path(folder) / MEASURED,
            executor=executor,
            workers=workers,
        )
    console = Console(markup=False, highlight=False)
    for plan in plans:
        decisions = plan.decisions
        size = f"{plan.line.frames} x {plan.line.width} x {plan.line.height}"
        console.print(
            f"{plan.line.key}  {size}, colour {decisions.reasons.get('color', 'as chosen')}",
            soft_wrap=True,
        )  # fmt: skip
        if plan.refusal:
            console.print(f"  refused: {plan.refusal}", soft_wrap=True)
            continue
        for step, text in done_to(decisions, settings).items():
            console.print(f"  {step}: {text}", soft_wrap=True)
        if len(plan.pieces) > 1:
            lengths = ", ".join(str(len(taken)) for taken in plan.frames)
            console.print(f"  pieces: {len(plan.pieces)}, of {lengths} frames", soft_wrap=True)
    print_decided(console, [plan.as_json(settings) for plan in plans])
    print_bad(console, bad, None)


def print_summary(out: Path, result: dict[str, Any]) -> None:
    clips = [clip for tar in result["shards"] for clip in tar["clips"]]
    console = Console(markup=False, highlight=False)
    counts = (
        f"{result['clips']} clips in {len(result['shards'])} tars, {len(result['skipped'])} skipped"
    )
    console.print(f"{out}: {counts}", soft_wrap=True)
    table = Table("split", "clips", "stills", "frames")
    for split, count in result["splits"].items():
        mine = [clip["frames"] for clip in clips if clip["split"] == split]
        table.add_row(split, str(count), str(mine.count(1)), str(sum(mine)))
    console.print(table)
    asked = result["made_by"]["settings"]["val_fraction"]
    if asked and not result["splits"]["val"]:
        console.print(
            f"none validates, although val_fraction={asked:g}: all clips are of one group, or "
            "those of the others were refused; a column group of a table divides them",
            soft_wrap=True,
        )
    print_decided(console, read_journal(out / DECISIONS))
    print_bad(console, result["skipped"], out / MANIFEST)


def print_decided(console: Console, lines: Sequence[dict[str, Any]]) -> None:
    """Prints how many clips each step was done to; and those whose colour is a guess."""
    counts = Counter(step for line in lines if "refused" not in line for step in line["done"])
    table = Table("what was done", "source clips")
    for step, text in STEPS.items():
        table.add_row(text, str(counts[step]))
    table.add_row("refused", str(sum("refused" in line for line in lines)))
    console.print(table)
    for line in lines:
        sure = line["decisions"]["confidence"]
        if 0 < sure < UNSURE:
            console.print(
                f"unsure {line['key']}: colour {line['decisions']['color']}",
                soft_wrap=True,
            )  # fmt: skip


if __name__ == "__main__":
    run("prep shard")
