"""Decides what is to be made of each line of an ingested manifest, before any clip is written."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from acetate.console import printable
from acetate.data.keys import LONGEST_KEY, shortened
from acetate.documents import open_plain, parse
from acetate.media.clip import LIMITS, Asked, Limits, MediaError, Stream
from data_prep.analysis import analyse
from data_prep.candidates import pictures, stamps
from data_prep.cleaning import Indices, Settings, shots, too_many
from data_prep.cleaning import done as done_to
from data_prep.decisions import Decisions, respelled
from data_prep.examine import opened
from data_prep.executor import alone_and_lean, progress
from data_prep.found import FOUND, Found
from data_prep.journal import open_journal, read_journal

LONGEST_LINE = 2**24  # bytes; more of them are no line of ours


@dataclass(frozen=True)
class Plan:
    """A plan of what is to be made of one clip. frames: which of its frames each piece takes."""

    line: Found
    decisions: Decisions
    refusal: str | None
    frames: list[Indices]
    pieces: list[str]  # keys

    @classmethod
    def of(cls, line: Found, measured: Decisions, settings: Settings) -> "Plan":
        """Makes the plan of a clip. Raises ValueError, which names the clip, for a decision of the
        command line that is impossible for it."""
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
        """Returns a line of DECISIONS."""
        outcome = {"refused": self.refusal} if self.refusal else {"pieces": self.pieces}
        steps = done_to(self.decisions, settings)
        notes = {"notes": self.line.notes} if self.line.notes else {}
        return {
            "key": self.line.key,
            **notes,
            **outcome,
            "done": steps,
            "decisions": self.decisions.as_json(),
        }


def piece_keys(key: str, count: int) -> list[str]:
    """Returns KEY-p000, KEY-p001, ...; a key that is too long for that is cut and ends in 8 digits
    of its hash."""
    if count == 1:
        return [key]
    numbers = [f"-p{i:03d}" for i in range(count)]
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    key = shortened(key, LONGEST_KEY - len(numbers[-1]), digest)
    return [key + number for number in numbers]


def read_lines(manifest: Path) -> list[Found]:
    """Reads lines of data_prep.ingest. Raises ValueError that names the line that is none."""
    if not manifest.is_file():
        raise FileNotFoundError(
            f"manifest={manifest} does not exist; `acetate prep ingest` writes one."
        )
    lines = []
    # bytes end at \n only; prompts may hold Unicode's other line ends
    with open_plain(manifest) as file:
        for number, text in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            try:
                value = respelled(parse(text))
                FOUND.check(value)
                line = Found(**value)
                if line.decisions is not None:
                    Decisions.of_json(line.decisions)
                lines.append(line)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{manifest}:{number}: not a line of acetate prep ingest ({error})"
                ) from error
    return lines


def decide(
    found: Sequence[Found], settings: Settings, journal: Path, *, executor: str, workers: int
) -> tuple[list[Plan], dict[str, str]]:
    """Returns what is to be made of each clip, and key -> reason of those that cannot be read.

    Lines that carry no decisions are measured here, and the journal keeps what was measured for a
    restart. Raises ValueError if two clips would be written under one key.
    """
    seen = {line.key: fingerprint(line) for line in found if line.decisions is None}
    known = {
        entry["key"]: entry
        for entry in read_journal(journal)
        if entry.get("of", "") == seen.get(entry["key"])
    }
    todo = [line for line in found if line.decisions is None and line.key not in known]
    if todo:
        run = {"executor": executor, "workers": workers, "name": attrgetter("key")}
        with (
            progress(measure, todo, desc="decide", **run) as results,
            open_journal(journal) as append,
        ):
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
                    f"clips {owners[key]!r} and {plan.line.key!r} would both write {key!r}; keys "
                    "are unique. Change the key of one of them in the manifest, or rename its "
                    "file and ingest again."
                )
            owners[key] = plan.line.key
    return plans, bad


def fingerprint(line: Found) -> str:
    """Returns a hash of all that measuring a clip depends on."""
    files = [file for name in line.files for file in pictures(Path(name))]
    return hashlib.sha256(repr((line, stamps(files))).encode()).hexdigest()


def measure(line: Found) -> dict[str, Any]:
    """Returns {"decisions": ...} of a clip, or {"bad": why it cannot be read}."""
    alone_and_lean()
    try:
        clip = open_line(line)
        # A line that only repeats the format's definition is nobody's word.
        declared = None if line.premultiplied == clip.premultiplied else line.premultiplied
        found = analyse(clip, premultiplied=declared, matte=line.kind == "matte")
    except MediaError as error:
        return {"bad": printable(error)}
    return {"decisions": found.as_json()}


def open_line(line: Found) -> Stream:
    """Opens whatever data_prep.ingest took: its limits may have been raised. Raises MediaError also
    for a pipe or a device, which would be waited for."""
    for file in (file for name in line.files for file in pictures(Path(name))):
        if file.exists() and not file.is_file():
            raise MediaError(f"{file}: no plain file; ingest the folder again")
    pixels = line.width * line.height
    limits = Limits(
        # A packed video's pictures hold more than the clip.
        max_pixels=max(LIMITS.max_pixels, pixels * (4 if line.kind == "packed" else 1)),
        max_frames=max(LIMITS.max_frames, line.frames),
        max_bytes=max(LIMITS.max_bytes, 4 * pixels * line.frames),
    )
    rects = (line.color_rect, line.alpha_rect) if line.color_rect and line.alpha_rect else None
    asked = Asked(line.divide, line.layer)
    return opened(line.kind, [Path(file) for file in line.files], rects, limits, asked)
