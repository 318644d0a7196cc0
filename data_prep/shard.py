"""Turns an ingested manifest into clip shards: clean alpha, straight colour, lossless."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from acetate.commands.program import program
from acetate.data.keys import LONGEST_KEY, shortened
from acetate.data.shards import MANIFEST, ShardError, first_reasons, read_manifest
from acetate.data.splits import Split, assign_splits
from acetate.data.writer import EncodedClip, ShardWriter, encode_clip
from acetate.media.clip import LIMITS, Limits
from acetate.video_io import MediaError, RGBAClip, read_packed, read_pair, read_rgba
from data_prep.analysis import analyse
from data_prep.bad_clips import BadClips, print_bad
from data_prep.candidates import pictures, stamps
from data_prep.cleaning import Indices, Settings, clean, overrides, shots, too_many
from data_prep.cleaning import done as done_to
from data_prep.decisions import Decisions
from data_prep.examine import Found, said_of_names
from data_prep.executor import check, progress
from data_prep.folders import MEASURED, check_folder, making
from data_prep.journal import open_journal, read_journal, write_lines

DECISIONS = "decisions.jsonl"  # beside the manifest: what was made of every clip, and why
UNSURE = 0.5  # colour below this confidence is listed after the run
STEPS = {
    "crop": "black bars cut off", "still": "films of one picture made stills", "cuts": "divided into shots",
    "alpha": "alpha noise snapped", "colour": "made straight", "trim": "empty margins cut off",
    "matte": "kept with unusual alpha",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is to be made of one clip. frames: which of its frames each piece takes."""

    line: Found
    decisions: Decisions
    refusal: str | None
    frames: list[Indices]
    pieces: list[str]  # keys

    @classmethod
    def of(cls, line: Found, measured: Decisions, settings: Settings) -> "Plan":
        """ValueError, which names the clip, for a decision of the command line that is impossible for it."""
        try:
            decisions = settings.apply(measured)
        except ValueError as error:
            raise ValueError(f"{line.key}: {error}") from error
        fps = line.fps or settings.default_fps
        refusal = settings.refusal(decisions) or too_many(line.frames, fps, settings)
        if refusal:
            return cls(line, decisions, refusal, [], [])
        frames = shots(line.frames, fps, decisions, settings)
        return cls(line, decisions, None, frames, piece_keys(line.key, len(frames)))

    def as_json(self, settings: Settings) -> dict[str, Any]:
        """A line of DECISIONS."""
        outcome = {"refused": self.refusal} if self.refusal else {"pieces": self.pieces}
        steps = done_to(self.decisions, settings)
        return {"key": self.line.key, **outcome, "done": steps, "decisions": self.decisions.as_json()}


def piece_keys(key: str, count: int) -> list[str]:
    """KEY-p000, KEY-p001, ...; a key that is too long for that is cut and ends in 8 digits of its hash."""
    if count == 1:
        return [key]
    numbers = [f"-p{i:03d}" for i in range(count)]
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    key = shortened(key, LONGEST_KEY - len(numbers[-1]), digest)
    return [key + number for number in numbers]


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
    """Writes the shards and returns their manifest; a run that was interrupted goes on where its last tar ended.

    A folder that already holds these very clips is left as it is; one that holds others is made anew with `replace`,
    else ShardError, as if no clip is left to write. TooManyBad past the budget.
    """
    check(executor, workers)
    check_folder(out)
    found = read_lines(manifest)
    made_by = {
        "command": "data_prep.shard",
        "settings": {
            **vars(settings), "val_fraction": val_fraction, "max_clips": max_clips, "max_bytes": max_bytes,
            "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        },
    }  # fmt: skip
    with making(out, made_by, replace) as folder:
        if folder:
            splits = assign_splits({line.key: line.group for line in found}, val_fraction)
            with ShardWriter(folder, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by) as writer:
                bad = BadClips(bad_clip_budget)
                plans, unreadable = decide(found, settings, folder / MEASURED, executor=executor, workers=workers)
                bad.add(unreadable)
                writer.skipped |= bad | {plan.line.key: plan.refusal for plan in plans if plan.refusal}
                fill(writer, plans, settings, splits, bad, executor, workers)
                if not writer.tars and not writer.pending:
                    raise ShardError(
                        f"none of the {len(found)} clips of {manifest} became a shard "
                        f"({first_reasons(writer.skipped) or 'it is empty'}). Ingest other media, or change the "
                        "settings that refuse these."
                    )
                write_lines(folder / DECISIONS, (plan.as_json(settings) for plan in plans))
    return read_manifest(out)


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
    todo = [plan for plan in plans if not plan.refusal and not all(key in writer for key in plan.pieces)]
    run = {"executor": executor, "workers": workers, "name": attrgetter("line.key")}
    with progress(partial(prepare, settings=settings), todo, **run) as results:
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
                        premultiplied_source=plan.decisions.colour == "black",
                        done=done_to(plan.decisions, settings),
                    )


def decide(
    found: Sequence[Found], settings: Settings, journal: Path, *, executor: str, workers: int
) -> tuple[list[Plan], dict[str, str]]:
    """What is to be made of each clip, and key -> reason of those that cannot be read.

    Lines that carry no decisions are measured here, and the journal keeps what was measured for a restart.
    ValueError if two clips would be written under one key.
    """
    seen = {line.key: fingerprint(line) for line in found if line.decisions is None}
    known = {entry["key"]: entry for entry in read_journal(journal) if entry.get("of", "") == seen.get(entry["key"])}
    todo = [line for line in found if line.decisions is None and line.key not in known]
    if todo:
        run = {"executor": executor, "workers": workers, "name": attrgetter("key")}
        with progress(measure, todo, desc="decide", **run) as results, open_journal(journal) as append:
            for line, result in results:
                known[line.key] = {"key": line.key, "of": seen[line.key], **result}
                append(known[line.key])
    plans, bad = [], {}
    for line in found:
        entry = {"decisions": line.decisions} if line.decisions is not None else known[line.key]
        if "bad" in entry:
            bad[line.key] = entry["bad"]
        else:
            plans.append(Plan.of(line, Decisions.of_json(entry["decisions"]), settings))
    owners: dict[str, str] = {}
    for plan in plans:
        for key in [] if plan.refusal else plan.pieces:
            if key in owners:
                raise ValueError(
                    f"clips {owners[key]!r} and {plan.line.key!r} would both write {key!r}; keys are unique. Change "
                    "the key of one of them in the manifest, or rename its file and ingest again."
                )
            owners[key] = plan.line.key
    return plans, bad


def fingerprint(line: Found) -> str:
    """Of all that measuring a clip depends on."""
    files = [file for name in line.files for file in pictures(Path(name))]
    return hashlib.sha256(repr((line, stamps(files))).encode()).hexdigest()


def measure(line: Found) -> dict[str, Any]:
    """{"decisions": ...} of a clip, or {"bad": why it cannot be read}."""
    torch.set_num_threads(1)
    try:
        clip = read(line)
    except MediaError as error:
        return {"bad": str(error)}
    # A line that only repeats the format's definition is nobody's word.
    declared = None if line.premultiplied == clip.premultiplied else line.premultiplied
    return {"decisions": analyse(clip, premultiplied=declared, matte=line.kind == "matte").as_json()}


def read_lines(manifest: Path) -> list[Found]:
    """Lines of data_prep.ingest; ValueError names the line that is none."""
    if not manifest.is_file():
        raise FileNotFoundError(f"manifest={manifest} does not exist; `python -m data_prep.ingest` writes one.")
    lines = []
    with open(manifest, "rb") as file:  # bytes end at \n only; prompts may hold Unicode's other line ends
        for number, text in enumerate(file, start=1):
            try:
                line = Found(**json.loads(text))
                if line.decisions is not None:
                    Decisions.of_json(line.decisions)
                lines.append(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{manifest}:{number}: not a line of data_prep.ingest ({error})") from error
    return lines


def prepare(plan: Plan, settings: Settings) -> list[EncodedClip] | str:
    """The encoded pieces of a clip, or why there are none."""
    torch.set_num_threads(1)
    line = plan.line
    try:
        clip = read(line)
    except MediaError as error:
        return str(error)
    if len(clip.frames) != line.frames:
        return f"has {len(clip.frames)} frames, the manifest says {line.frames}; ingest the folder again"
    fps = settings.fps or line.fps or settings.default_fps
    try:
        return [encode_clip(clean(clip.frames[taken], plan.decisions, settings), fps) for taken in plan.frames]
    except ValueError as error:
        return str(error)


def read(line: Found) -> RGBAClip:
    """Whatever data_prep.ingest took: its limits may have been raised."""
    pixels = line.width * line.height
    limits = Limits(
        # A packed video's pictures hold more than the clip.
        max_pixels=max(LIMITS.max_pixels, pixels * (4 if line.kind == "packed" else 1)),
        max_frames=max(LIMITS.max_frames, line.frames),
        max_bytes=max(LIMITS.max_bytes, 4 * pixels * line.frames),
    )
    files = [Path(file) for file in line.files]
    if line.kind in ("pair", "matte"):
        return read_pair(files[0], files[1], limits)
    if line.kind == "packed":
        assert line.colour_rect and line.alpha_rect
        return read_packed(files[0], line.colour_rect, line.alpha_rect, limits)
    return read_rgba(files[0], limits)


@program("prep/shard")
def main(cfg: DictConfig) -> None:
    manifest, out = Path(cfg.manifest), Path(cfg.out)
    settings = Settings(
        choices=overrides(
            colour=cfg.colour, alpha_low=cfg.alpha_low, alpha_high=cfg.alpha_high, crop=cfg.crop,
            still=cfg.still, cuts=cfg.cuts,
        ),
        min_alpha=cfg.min_alpha, trim=cfg.trim, max_side=cfg.max_side, bleed=cfg.bleed, fps=cfg.fps,
        default_fps=cfg.default_fps, max_frames=cfg.max_frames, empty=cfg.empty, full=cfg.full,
        flickers=cfg.flickers,
    )  # fmt: skip
    if cfg.preview:
        preview(manifest, settings, executor=cfg.executor, workers=cfg.workers)
        return
    result = shard(
        manifest=manifest,
        out=out,
        settings=settings,
        val_fraction=cfg.val_fraction,
        max_clips=cfg.max_clips,
        max_bytes=int(cfg.max_mb * 2**20),
        bad_clip_budget=cfg.bad_clip_budget,
        executor=cfg.executor,
        workers=cfg.workers,
        replace=cfg.replace,
    )
    print_summary(out, result)
    if said := said_of_names([line.prompt for line in read_lines(manifest)]):
        Console(markup=False, highlight=False).print(said, soft_wrap=True)


def preview(manifest: Path, settings: Settings, *, executor: str, workers: int) -> None:
    """Decides and prints; writes nothing."""
    with TemporaryDirectory() as folder:
        plans, bad = decide(read_lines(manifest), settings, Path(folder) / MEASURED, executor=executor, workers=workers)
    console = Console(markup=False, highlight=False)
    for plan in plans:
        decisions = plan.decisions
        size = f"{plan.line.frames} x {plan.line.width} x {plan.line.height}"
        console.print(
            f"{plan.line.key}  {size}, colour {decisions.reasons.get('colour', 'as chosen')}",
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
    counts = f"{result['clips']} clips in {len(result['shards'])} tars, {len(result['skipped'])} skipped"
    console.print(f"{out}: {counts}", soft_wrap=True)
    table = Table("split", "clips", "stills", "frames")
    for split, count in result["splits"].items():
        mine = [clip["frames"] for clip in clips if clip["split"] == split]
        table.add_row(split, str(count), str(mine.count(1)), str(sum(mine)))
    console.print(table)
    print_decided(console, read_journal(out / DECISIONS))
    print_bad(console, result["skipped"], out / MANIFEST)


def print_decided(console: Console, lines: Sequence[dict[str, Any]]) -> None:
    """How many clips each step was done to; and those whose colour is a guess."""
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
                f"unsure {line['key']}: colour {line['decisions']['colour']}",
                soft_wrap=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
