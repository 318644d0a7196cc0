"""Copies the clips that pass the rules, byte for byte, into shards of their own and says why the
others fall."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from acetate.cli import run
from acetate.data.shards import (
    MANIFEST,
    BadClip,
    ClipRef,
    ShardError,
    index_shards,
    read_clip,
    read_head,
)
from acetate.data.store import listed
from acetate.data.writer import ShardWriter
from acetate.draws import stable_hash
from data_prep import scores as scoring
from data_prep.bad_clips import BadClips, print_bad
from data_prep.copies import copy_clips, gather
from data_prep.executor import check, progress
from data_prep.folders import check_folder, making, manifests_sha256
from data_prep.journal import Line, read_journal, write_lines
from data_prep.scores import SCORES, repeats

SCORES_FILE, REJECTED_FILE = "scores.jsonl", "rejected.jsonl"
FIELDS = {"key", "look", "colors", "crc32", "code"}  # and, of lines of this code, all scores
PREVIEW_CLIPS = 32
CODE = hashlib.sha256(Path(scoring.__file__).read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Rule:
    """Both ends belong to what is kept."""

    min: float = -math.inf
    max: float = math.inf

    def __str__(self) -> str:
        if math.isfinite(self.min) and math.isfinite(self.max):
            return f"{self.min:g} to {self.max:g}"
        return f">= {self.min:g}" if math.isfinite(self.min) else f"<= {self.max:g}"


@dataclass(frozen=True)
class Duplicates:
    """distance: bits of 128 that two looks may differ in; colour: steps of 255 that their mean
    colours may. keep: the best (most pixels, then sharpest) or the first."""

    distance: int
    color: int
    keep: Literal["best", "first"]


def parse_rules(rules: Mapping[str, Any]) -> dict[str, Rule]:
    """Reads {score: {min, max}}; a rule that is null is none. Raises ValueError for a score or an
    end that does not exist."""
    parsed = {}
    for name, ends in rules.items():
        if name not in SCORES:
            raise ValueError(f"rules.{name}: no such score; known: {', '.join(SCORES)}")
        if ends is None:
            continue
        numbers = isinstance(ends, Mapping) and all(
            isinstance(value, int | float) for value in ends.values()
        )
        if not numbers or not ends or ends.keys() - {"min", "max"}:
            raise ValueError(f"rules.{name}={ends}; give {{min: NUMBER}}, {{max: NUMBER}} or both")
        rule = Rule(**ends)
        if not rule.min <= rule.max:
            raise ValueError(
                f"rules.{name}: min={rule.min:g} is above max={rule.max:g}; nothing would be kept"
            )
        parsed[name] = rule
    return parsed


def load_rules(rules: DictConfig | str | None) -> dict[str, Rule]:
    """Reads the rules of the setting, or of the YAML file that it names."""
    if isinstance(rules, str):
        if not Path(rules).is_file():
            raise FileNotFoundError(
                f"rules={rules} does not exist; name a YAML file of {{score: {{min, max}}}}"
            )
        try:
            loaded = OmegaConf.load(rules)
        except YAMLError as error:
            raise ValueError(
                f"rules={rules} is not YAML: {' '.join(str(error).split())}"
            ) from error
    else:
        loaded = rules
    found = OmegaConf.to_container(loaded, resolve=True) if loaded is not None else {}
    if not isinstance(found, dict):
        raise ValueError(
            f"rules={found}; give {{score: {{min: NUMBER, max: NUMBER}}}} or a YAML file of that"
        )
    return parse_rules({str(name): ends for name, ends in found.items()})


def duplicates_of(setting: DictConfig | None) -> Duplicates | None:
    """Reads what counts as a duplicate; null keeps them all."""
    if setting is None:
        return None
    if not isinstance(setting, Mapping) or setting.keys() != {"distance", "color", "keep"}:
        raise ValueError(
            f"duplicates={setting}; null, or {{distance: BITS, color: STEPS, keep: best or first}}"
        )
    return Duplicates(**setting)


def score_clips(
    refs: Sequence[ClipRef], known: Mapping[str, Line], executor: str, workers: int
) -> Iterator[Line | BadClip]:
    """Yields the line of every clip that `known` lacks, in the order of the clips."""
    todo = [ref for ref in refs if not current(known.get(ref.key), ref)]
    settings = {"executor": executor, "workers": workers, "name": attrgetter("name")}
    with progress(score_clip, todo, desc="scores", **settings) as results:
        yield from (line for _, line in results)


def score_clip(ref: ClipRef) -> Line | BadClip:
    try:
        values, look, colors = scoring.score(read_clip(ref))
    except BadClip as bad:
        return bad
    return {
        "key": ref.key,
        **values,
        "look": look,
        "colors": colors,
        "crc32": ref.crc32,
        "code": CODE,
    }


def current(line: Line | None, ref: ClipRef) -> bool:
    """Returns whether a line is of this very clip and of this way to score."""
    return line is not None and (line["crc32"], line["code"]) == (ref.crc32, CODE)


def judge(
    lines: Sequence[Line], rules: Mapping[str, Rule], duplicates: Duplicates | None
) -> list[Line]:
    """Returns one line per broken rule: key, score, value, rule; for a duplicate also `of`, the
    clip that is kept."""
    rejected = [
        {"key": line["key"], "score": name, "value": line[name], "rule": str(rule)}
        for line in lines
        for name, rule in rules.items()
        if not rule.min <= line[name] <= rule.max
    ]
    if duplicates is not None:
        # Only among clips that are good otherwise: a rejected one must not take a good one with it.
        fallen = {line["key"] for line in rejected}
        rest = [line for line in lines if line["key"] not in fallen]
        if duplicates.keep == "best":
            rest.sort(key=lambda line: (-pixels(line), -line["sharpness"], line["key"]))
        looks, shades = ([line[name] for line in rest] for name in ("look", "colors"))
        found = repeats(looks, shades, duplicates.distance, duplicates.color)
        for line, match in zip(rest, found, strict=True):
            if match is not None:
                other, bits = match
                rule = f"> {duplicates.distance} bits of 128"
                twin = rest[other]["key"]
                rejected.append(
                    {
                        "key": line["key"],
                        "score": "duplicate",
                        "value": bits,
                        "rule": rule,
                        "of": twin,
                    }
                )
    return sorted(rejected, key=lambda line: (line["key"], line["score"]))


def pixels(line: Line) -> int:
    return line["frames"] * line["short_side"] * line["long_side"]


def filter_clips(
    *,
    shards: Sequence[Path],
    out: Path,
    rules: Mapping[str, Rule],
    duplicates: Duplicates | None,
    scores: Path | None,
    max_clips: int,
    max_bytes: int,
    bad_clip_budget: int,
    executor: str,
    workers: int,
    replace: bool = False,
) -> tuple[list[Line], list[Line], dict[str, str]]:
    """Writes shards, scores.jsonl and rejected.jsonl; returns the lines of both, and key -> reason
    of clips that cannot be read.

    Scores in `out`, from a run that was interrupted, and in the file `scores` are not measured
    again. A folder that holds this very choice is left as it is; one that holds another is made
    anew with `replace`, else ShardError, also where no clip is kept. TooManyBad past the budget.
    """
    check(executor, workers)
    check_folder(out, shards)
    refs = index_shards(shards)
    made_by = {
        "command": "data_prep.filter",
        "settings": {
            "rules": {name: str(rule) for name, rule in rules.items()},
            "duplicates": asdict(duplicates) if duplicates else None,
            "code": CODE, "max_clips": max_clips, "max_bytes": max_bytes,
            "shards_sha256": manifests_sha256(shards),
        },
    }  # fmt: skip
    with making(out, made_by, replace) as folder:
        if folder:
            bad, journal = BadClips(bad_clip_budget), folder / SCORES_FILE
            known = read_scores(scores, out / SCORES_FILE, journal)
            gather(score_clips(refs, known, executor, workers), journal, known, bad)
            if len(bad) == len(refs):
                raise ShardError(
                    f"none of the {len(refs)} clips can be read: {next(iter(bad.values()))}"
                )
            lines = [known[ref.key] for ref in refs if ref.key not in bad]
            rejected = judge(lines, rules, duplicates)
            kept = {line["key"] for line in lines} - {line["key"] for line in rejected}
            if not kept:
                raise ShardError(
                    f"the rules reject all {len(lines)} clips ({tally(rejected)}); loosen them."
                )
            write_lines(journal, lines)
            write_lines(folder / REJECTED_FILE, rejected)
            with ShardWriter(
                folder, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by
            ) as writer:
                copy_clips([ref for ref in refs if ref.key in kept], writer, bad)
    return (
        read_journal(out / SCORES_FILE),
        read_journal(out / REJECTED_FILE),
        read_head(out)["skipped"],
    )


def read_scores(*files: Path | None) -> dict[str, Line]:
    """Reads key -> line; later files win. Raises ValueError for a line that holds no scores."""
    for file in files[:1]:
        if file is not None and not file.is_file():
            raise FileNotFoundError(
                f"scores={file} does not exist; acetate prep filter writes {SCORES_FILE} into "
                "`out`."
            )
    known = {}
    for file in files:
        for number, line in enumerate(read_journal(file) if file is not None else [], start=1):
            if not isinstance(line, dict) or FIELDS - line.keys():
                raise ValueError(
                    f"{file}:{number}: not a line of {SCORES_FILE}, which has "
                    f"{', '.join(sorted(FIELDS))}; name a file that acetate prep filter wrote, "
                    "or leave scores out to measure again"
                )
            known[line["key"]] = line
    return known


def tally(rejected: Sequence[Line]) -> str:
    return ", ".join(
        f"{name}: {count}"
        for name, count in Counter(line["score"] for line in rejected).most_common()
    )


def preview(
    shards: Sequence[Path], files: Sequence[Path | None], executor: str, workers: int
) -> tuple[int, list[Line], dict[str, str]]:
    """Returns the number of clips in all; lines of those with scores and of a few others, or why
    there are none. Writes nothing."""
    refs, known = index_shards(shards), read_scores(*files)
    done = [known[ref.key] for ref in refs if current(known.get(ref.key), ref)]
    new = sorted(
        (ref for ref in refs if not current(known.get(ref.key), ref)),
        key=lambda ref: stable_hash(ref.key),
    )
    found = list(score_clips(new[:PREVIEW_CLIPS], {}, executor, workers))
    bad = {line.key: line.reason for line in found if isinstance(line, BadClip)}
    lines = done + [line for line in found if not isinstance(line, BadClip)]
    return len(refs), sorted(lines, key=lambda line: line["key"]), bad


def print_summary(
    console: Console, lines: Sequence[Line], rejected: Sequence[Line], rules: Mapping[str, Rule]
) -> None:
    """Prints how the scores spread, and what each rule takes away."""
    table = Table("score", "min", "5 %", "median", "95 %", "max", "kept", "rejected")
    broken = Counter(line["score"] for line in rejected)
    for name in SCORES:
        spread = (
            np.percentile([line[name] for line in lines], (0, 5, 50, 95, 100))
            if lines
            else [math.nan] * 5
        )
        rule = str(rules[name]) if name in rules else ""
        table.add_row(
            name,
            *(f"{value:.3g}" if value >= 1 else f"{value:.2g}" for value in spread),
            rule,
            str(broken[name]) if rule else "",
        )
    table.add_row("duplicate", *[""] * 6, str(broken["duplicate"]))
    console.print(table)


def main(cfg: DictConfig) -> None:
    console = Console(markup=False, highlight=False)
    out = Path(cfg.out)
    shards = [Path(folder) for folder in listed(cfg.shards)]
    rules, duplicates = load_rules(cfg.rules), duplicates_of(cfg.duplicates)
    scores = Path(cfg.scores) if cfg.scores else None
    if cfg.preview:
        total, lines, bad = preview(shards, [scores, out / SCORES_FILE], cfg.executor, cfg.workers)
        rejected = judge(lines, rules, duplicates)
        for line in rejected:
            twin = f", repeats {line['of']}" if "of" in line else ""
            console.print(
                f"{line['key']}: {line['score']} {line['value']:g}, kept {line['rule']}{twin}",
                soft_wrap=True,
            )
        text = f"{len(lines)} of {total} clips were measured. Nothing was written."
    else:
        same = ("max_clips", "bad_clip_budget", "executor", "workers", "replace")
        own = {name: cfg[name] for name in same} | {"max_bytes": int(cfg.max_mb * 2**20)}
        lines, rejected, bad = filter_clips(
            shards=shards, out=out, rules=rules, duplicates=duplicates, scores=scores, **own
        )
        text = f"{out}: reasons in {REJECTED_FILE}, all scores in {SCORES_FILE}"
    fallen = len({line["key"] for line in rejected})
    console.print(f"{len(lines) - fallen} clips kept, {fallen} rejected. {text}", soft_wrap=True)
    print_summary(console, lines, rejected, rules)
    print_bad(console, bad, None if cfg.preview else out / MANIFEST)


if __name__ == "__main__":
    run("prep filter")
