"""Builds the named set open-rgba: drawn clips, clips of free packages and rendered ones, mixed into
shards that train and validate and a held-out test set, with checksums."""

import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from acetate.cli import run
from acetate.data.keys import LONGEST_KEY, shortened
from acetate.data.shards import (
    MANIFEST,
    BadClip,
    ClipRef,
    index_shards,
    read_clip,
    read_manifest,
    read_media,
    read_meta,
    read_meta_text,
)
from acetate.data.writer import ShardWriter
from acetate.documents import parse
from acetate.draws import stable_hash
from acetate.replacing import check_out, write_json, written
from data_prep.executor import progress
from data_prep.folders import DECISIONS, check_folder, making
from data_prep.journal import Line, open_journal, read_journal, write_lines
from data_prep.packages import packages_of
from data_prep.plans import read_lines
from data_prep.scores import over_time

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
STRATA = ("opaque", "hair", "glass", "smoke", "glow", "effects")
SHARE_ALIKE = re.compile(r"\bSA\b|\b[AL]?GPL\b")  # licences that pass themselves on
SOFT = (26, 229)  # alpha in between is semi-transparent: a tenth to nine tenths
MAX_CLIPS, MAX_BYTES = 1000, 2**30  # in a tar
PART_CLIPS = 100  # in a tar of a part: as many are made again after an interruption
LISTED, SUMS, RECIPE = "clips.jsonl", "SHA256SUMS", "recipe.json"


@dataclass(frozen=True)
class Member:
    """A clip of the set. line: what LISTED says of it."""

    ref: ClipRef
    line: Line

    @property
    def key(self) -> str:
        return self.line["key"]


def prep(name: str, **settings: Any) -> None:
    """Runs a program of this package; RuntimeError if it fails, which has said why."""
    words = [f"{key}={quoted(value)}" for key, value in settings.items()]
    # it ends with this process, however that ends
    bound = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)
    command = [sys.executable, "-m", "acetate", "prep", name, *words]
    done = subprocess.run(command, preexec_fn=bound)
    if done.returncode:
        raise RuntimeError(
            f"acetate prep {name} {' '.join(words)} ended with {done.returncode}, for the reason "
            "above. Run the same command again after that is mended: what is finished is kept"
        )


def quoted(value: Any) -> str:
    """Writes a value as a command line of ours takes it."""
    if isinstance(value, Path | str):
        text = str(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{text}"'
    return json.dumps(value)


def make_parts(cfg: Mapping[str, Any], parts: Path, workers: int) -> dict[str, Path]:
    """Returns name -> folder of clip shards, of drawn clips and each package; what is there already
    stays."""
    shared = {"max_clips": PART_CLIPS, **{name: cfg[name] for name in ("val_fraction", "replace")}}
    drawn = {**cfg["drawn"], **shared}
    prep("synthesize", out=parts / "drawn", workers=workers, **drawn)
    for kind in cfg["packages"]:
        folder, manifest = parts / f"{kind}_package", parts / f"{kind}.jsonl"
        prep(
            "collect", kind=kind, source=cfg["source"], out=folder, per_group=cfg["per_group"],
            replace=cfg["replace"], workers=workers,
        )  # fmt: skip
        note = manifest.with_suffix(".of")
        table = hashlib.sha256((folder / "table.jsonl").read_bytes()).hexdigest()
        if not (manifest.exists() and note.exists() and note.read_text().strip() == table):
            prep("ingest", source=folder, out=manifest, workers=workers)
            with written(note) as file:
                file.write(table)
        prep(
            "shard", manifest=manifest, out=parts / kind, workers=workers,
            max_side=cfg["max_side"], max_frames=cfg["max_frames"], **shared,
        )  # fmt: skip
    return {name: parts / name for name in ("drawn", *cfg["packages"])}


def groups_of(folder: Path, manifest: Path) -> dict[str, str]:
    """Returns key of a piece in the shards -> group of its clip, as ingest knows it."""
    if not manifest.exists():
        return {}
    groups = {line.key: line.group for line in read_lines(manifest)}
    return {
        piece: groups[line["key"]]
        for line in read_journal(folder / DECISIONS)
        for piece in line.get("pieces", ())
    }


def measured(ref: ClipRef) -> dict[str, float] | BadClip:
    """Returns coverage: mean alpha; semi: share of what is seen that is semi-transparent; motion:
    as prep filter has it."""
    try:
        frames = read_clip(ref).frames
    except BadClip as bad:
        return bad
    alpha = frames[..., 3]
    soft = np.count_nonzero((alpha > SOFT[0]) & (alpha < SOFT[1]))
    values = {
        "coverage": float(alpha.mean()) / 255,
        "semi": soft / max(1, np.count_nonzero(alpha)),
        "motion": over_time(frames)[0],
    }
    return {name: round(value, 6) for name, value in values.items()}


def measure(refs: Sequence[ClipRef], journal: Path, workers: int) -> list[dict[str, float]]:
    """Measures each clip; the journal keeps the figures for a run that goes on. Raises ValueError
    for a damaged one."""
    known = {line["crc32"]: line["values"] for line in read_journal(journal)}
    todo = [ref for ref in refs if ref.crc32 not in known]
    settings = {"executor": "local", "workers": workers, "name": attrgetter("name")}
    with (
        progress(measured, todo, desc="measure", **settings) as results,
        open_journal(journal) as append,
    ):
        for ref, values in results:
            if isinstance(values, BadClip):
                raise ValueError(f"{values}; remove {ref.tar.parent} and build again")
            known[ref.crc32] = values
            append({"crc32": ref.crc32, "values": values})
    return [known[ref.crc32] for ref in refs]


def stratum_of(key: str, prompt: str, semi: float, cfg: Mapping[str, Any]) -> str:
    """Returns a clip's stratum: by the kind of a drawn clip, else by its alpha and its prompt."""
    kind = re.match("[a-z]*", key)[0]
    if kind in cfg["kinds"]:
        return cfg["kinds"][kind]
    if semi < cfg["soft"]:
        return "opaque"
    return next((s for s, words in cfg["words"].items() if re.search(words, prompt)), "effects")


def members(
    folders: Mapping[str, Path], parts: Path, cfg: Mapping[str, Any], workers: int
) -> list[Member]:
    """Returns all clips that the recipe takes, by their keys: STRATUM-ORIGIN-KEY."""
    found = []
    for name, folder in folders.items():
        refs, groups = index_shards([folder]), groups_of(folder, parts / f"{name}.jsonl")
        facts = measure(refs, parts / "facts.jsonl", workers)
        for ref, values in zip(refs, facts, strict=True):
            meta = read_meta(ref)
            licence = meta.get("licence", "unknown")
            if SHARE_ALIKE.search(licence) and not cfg["share_alike"]:
                continue
            stratum = meta.get("done", {}).get("stratum") or stratum_of(
                ref.key, meta["prompt"], values["semi"], cfg
            )
            digest = hashlib.sha256(ref.key.encode()).hexdigest()[:8]
            key = shortened(f"{stratum}-{name}-{ref.key}", LONGEST_KEY, digest)
            line = {
                "key": key, "stratum": stratum, "origin": name, "licence": licence,
                "group": f"{name} {groups.get(ref.key, ref.key)}", "split": ref.split,
                "frames": ref.frames, "width": ref.width, "height": ref.height, **values,
            }  # fmt: skip
            found.append(Member(ref, line))
    return sorted(found, key=attrgetter("key"))


def held_out(found: Sequence[Member], per_stratum: int) -> set[str]:
    """Groups of the test set: of those that do not train, a fixed draw of so many clips of each
    stratum, whole groups at a time."""
    taken, counts = set[str](), Counter[str]()
    spare = [member.line for member in found if member.line["split"] == "val"]
    for stratum in STRATA:
        groups = {line["group"] for line in spare if line["stratum"] == stratum}
        for group in sorted(groups, key=lambda group: stable_hash("test", group)):
            if counts[stratum] >= per_stratum:
                break
            if group not in taken:
                taken.add(group)
                counts.update(line["stratum"] for line in spare if line["group"] == group)
    return taken


def write_shards(
    chosen: Sequence[Member], out: Path, made_by: Mapping[str, Any], replace_old: bool
) -> None:
    with making(out, made_by, replace_old) as folder:
        if folder:
            with ShardWriter(
                folder, max_clips=MAX_CLIPS, max_bytes=MAX_BYTES, made_by=made_by
            ) as writer:
                for member in chosen:
                    if member.key not in writer:
                        media, meta = read_media(member.ref), read_meta_text(member.ref)
                        writer.copy(replace(member.ref, key=member.key), media, meta)


def recipe_of(cfg: Mapping[str, Any], folders: Mapping[str, Path], parts: Path) -> dict[str, Any]:
    """Returns what the set is made of, without a place on this machine."""
    elsewhere = ("source", "out", "replace", "rendered", "workers")
    notes = [parts / f"{kind}_package/.made_of.json" for kind in cfg["packages"]]
    return {
        "recipe": {name: cfg[name] for name in sorted(cfg) if name not in elsewhere},
        "packages": [one for note in notes for one in parse(note.read_bytes())["packages"]],
        "parts": {
            name: [shard["sha256"] for shard in read_manifest(folder)["shards"]]
            for name, folder in folders.items()
        },
    }


def build(cfg: Mapping[str, Any], out: Path, workers: int) -> list[Line]:
    """Makes the set and returns the lines of LISTED; a build that was interrupted goes on.

    FileNotFoundError for a package that is not in `source`, ShardError for what `rendered` is not.
    """
    check_out(out, folder=True)
    parts = out / "parts"
    for kind in cfg["packages"]:
        packages_of(kind, Path(cfg["source"]))
    if cfg["rendered"]:
        read_manifest(Path(cfg["rendered"]))
    for folder in (out / "clips", out / "test"):
        check_folder(folder)
    folders = make_parts(cfg, parts, workers)
    if cfg["rendered"]:
        folders["rendered"] = Path(cfg["rendered"])
    found = members(folders, parts, cfg, workers)
    recipe = recipe_of(cfg, folders, parts)
    test = held_out(found, cfg["per_stratum"])
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    for name in ("clips", "test"):
        made_by = {
            "command": "data_prep.open_rgba",
            "settings": {"part": name, "recipe_sha256": digest},
        }
        chosen = [one for one in found if (one.line["group"] in test) == (name == "test")]
        write_shards(chosen, out / name, made_by, cfg["replace"])
    lines = [
        {**one.line, "split": "test" if one.line["group"] in test else one.line["split"]}
        for one in found
    ]
    write_lines(out / LISTED, lines)
    write_json(out / RECIPE, recipe)
    with written(out / SUMS) as file:
        file.writelines(sums(out))
    return lines


def sums(out: Path) -> Iterator[str]:
    """Yields lines of `sha256sum` for all that the set is."""
    shards = [path for name in ("clips", "test") for path in sorted((out / name).glob("*.tar"))]
    manifests = [out / name / MANIFEST for name in ("clips", "test")]
    for path in [*shards, *manifests, out / LISTED, out / RECIPE]:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield f"{digest}  {path.relative_to(out)}\n"


def print_summary(console: Console, lines: Sequence[Line], per_stratum: int) -> None:
    """Prints the clips by stratum; and which strata have too few of them for the test."""
    splits = ("train", "val", "test")
    table = Table("stratum", *splits, "frames", "coverage", "semi-transparent", "motion")
    for stratum in STRATA:
        mine = [line for line in lines if line["stratum"] == stratum]
        counts = Counter(line["split"] for line in mine)
        means = [
            f"{np.mean([line[name] for line in mine]):.3f}" if mine else "-"
            for name in ("coverage", "semi", "motion")
        ]
        frames = sum(line["frames"] for line in mine)
        table.add_row(stratum, *(str(counts[split]) for split in splits), str(frames), *means)
        if counts["test"] < per_stratum:
            console.print(f"{stratum}: {counts['test']} clips to test on, {per_stratum} wanted")
    console.print(table)


def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    wanted = {
        str(name): value for name, value in settings.items() if name not in ("paths", "hydra")
    }
    out = Path(cfg.out)
    workers = len(os.sched_getaffinity(0)) if cfg.workers is None else cfg.workers
    lines = build(wanted, out, workers)
    console = Console(markup=False, highlight=False)
    print_summary(console, lines, cfg.per_stratum)
    recipe = next(iter((out / SUMS).read_text().splitlines()[-1:]), "").split(" ")[0]
    console.print(f"{out}: {len(lines)} clips; recipe {recipe}; check: sha256sum -c {SUMS}")


if __name__ == "__main__":
    run("prep open_rgba")
