"""Makes of an unpacked package the table of clips, with prompts, licences and groups, that ingest
reads."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from PIL import Image
from rich.console import Console

from acetate.cli import run
from acetate.documents import parse
from acetate.draws import stable_hash
from acetate.replacing import check_out, remove, write_json, writing
from data_prep.bad_clips import print_bad
from data_prep.emoji import codes_of, described, group_of
from data_prep.executor import progress
from data_prep.journal import only_writer, write_lines
from data_prep.packages import Package, digest_of, packages_of, strangers
from data_prep.sprites import READERS, Sprite, write_animation

TABLE, MADE_OF = "table.jsonl", ".made_of.json"  # in `out`; ingest passes over hidden files


@dataclass(frozen=True)
class Listed:
    """A clip of the table. what: a file of the package that is one as it stands, or a sprite."""

    name: str
    what: Path | Sprite
    row: dict[str, str]

    @property
    def file(self) -> str:
        suffix = ".png" if isinstance(self.what, Sprite) else self.what.suffix
        return f"{self.name}{suffix}"


def collect(
    *,
    kind: str,
    source: Path,
    out: Path,
    moving: Literal["only", "all"] = "only",
    per_group: int | None = None,
    known: Sequence[str] = (),
    workers: int = 0,
    replace: bool = False,
) -> tuple[list[Listed], dict[str, str], list[str]]:
    """Writes the folder `out`: clips, or links to them, and TABLE, last. Returns what it lists,
    name -> reason of sprites that cannot be cut, and what a person should know of the packages.

    A run that was interrupted goes on. FileNotFoundError for a source that is not the package;
    ValueError where `out` was made of another one, unless `replace`.
    """
    check_out(out, folder=True)
    packages = packages_of(kind, source)
    with only_writer(out):
        each = [(package, listed(kind, package, moving)) for package in packages]
        digests = [(one, digest_of(one.root, files_of(kind, one, all_of))) for one, all_of in each]
        found = few_of_each([clip for _, all_of in each for clip in all_of], per_group)
        if not found:
            raise ValueError(f"source={source}: {packages[0].name} holds no clip that moves")
        said = [[package.name, package.version, digest] for package, digest in digests]
        begin(
            out, {"kind": kind, "packages": said, "moving": moving, "per_group": per_group}, replace
        )
        bad = write_clips(found, out, workers)
        kept = [one for one in found if one.name not in bad]
        write_lines(out / TABLE, ({"file": one.file, **one.row} for one in kept))
    return kept, bad, list(strangers(digests, known))


def listed(kind: str, package: Package, moving: str) -> list[Listed]:
    """Returns the package's clips in the order of their names, each name once."""
    if kind == "emoji":
        files = sorted((package.root / "assets").glob("*.webp"))
        return [
            emoji(package, file, moves)
            for file in files
            if (moves := animated(file)) or moving == "all"
        ]
    found = {
        sprite.name: Listed(
            sprite.name,
            sprite,
            {
                "prompt": f"Transparent background, animated game sprite: {sprite.shows}.",
                "group": sprite.group,
                **package.said(sprite.files[0]),
                "premultiplied": "false",
            },
        )
        for sprite in READERS[kind](package.root)
    }
    return [found[name] for name in sorted(found)]


def emoji(package: Package, file: Path, moves: bool) -> Listed:
    try:
        codes = codes_of(file.stem)
        shows, group = described(codes), group_of(codes)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{file}: its name is no row of code points, such as 1f469-1f3fb-200d-1f33e ({error}). "
            f"Unpack {package.name} anew."
        ) from error
    style = "animated 3D emoji" if moves else "3D emoji"
    words = re.sub(r"\W+", "-", shows.replace(" and ", " ")).strip("-").lower()
    return Listed(
        f"emoji-{words[:40].strip('-')}-{re.sub('-(200d|fe0f)', '', file.stem)}",
        file,
        {
            "prompt": f"Transparent background, {style}: {shows}.",
            "group": f"emoji {group}",
            **package.said(file),
        },
    )


def animated(file: Path) -> bool:
    """Returns whether a file moves; so does what cannot be read, for ingest to refuse with the
    reason."""
    try:
        with Image.open(file) as picture:
            return getattr(picture, "is_animated", False)
    except (OSError, ValueError):
        return True


def few_of_each(found: Sequence[Listed], most: int | None) -> list[Listed]:
    """Keeps at most so many of a group, a fixed draw by their names; null: all."""
    drawn = sorted(found, key=lambda one: stable_hash("collect", one.name))
    counts, kept = Counter[str](), set()
    for one in drawn:
        counts[one.row["group"]] += 1
        if most is None or counts[one.row["group"]] <= most:
            kept.add(one.name)
    return [one for one in found if one.name in kept]


def files_of(kind: str, package: Package, found: Sequence[Listed]) -> set[Path]:
    """Returns all that the package's clips are made of, whichever of them are chosen."""
    if kind == "emoji":
        return set((package.root / "assets").glob("*.webp"))
    return {file for one in found if isinstance(one.what, Sprite) for file in one.what.files}


def begin(out: Path, made_of: Mapping[str, Any], replace: bool) -> None:
    """Notes what the folder is made of, for the run that goes on."""
    note = out / MADE_OF
    if note.exists() and parse(note.read_bytes()) != made_of:
        if not replace:
            raise ValueError(
                f"out={out} was made of other clips: {note} has the packages. Name another folder, "
                "or give replace=true"
            )
        remove(out)
    elif out.exists() and not note.exists() and any(out.iterdir()):
        raise ValueError(f"out={out} holds something else; name a folder that is new or empty")
    write_json(note, made_of)


def write_clips(found: Sequence[Listed], out: Path, workers: int) -> dict[str, str]:
    """Links to what is a clip, and files of the sprites that are not there yet. Name -> reason of
    those that cannot be read."""
    bad = {}
    sprites = [
        one for one in found if isinstance(one.what, Sprite) and not (out / one.file).exists()
    ]
    for one in found:
        if isinstance(one.what, Path):
            link(out / one.file, one.what.resolve())
    run = {"executor": "local", "workers": workers, "name": attrgetter("name")}
    with progress(partial(cut, out), sprites, **run) as results:
        for one, reason in results:
            if reason:
                bad[one.name] = reason
    return bad


def link(path: Path, there: Path) -> None:
    with writing(path):
        if not (path.is_symlink() and path.readlink() == there):
            path.unlink(missing_ok=True)
            path.symlink_to(there)


def cut(out: Path, one: Listed) -> str | None:
    """Writes a clip; returns why it could not be written, if it could not be read."""
    assert isinstance(one.what, Sprite)
    try:
        frames = one.what.frames()
    except (OSError, ValueError) as error:
        return f"{one.what.files[0]}: {error}"
    write_animation(frames, one.what.ms, out / one.file)
    return None


def main(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    same = ("kind", "moving", "per_group", "workers", "replace")
    found, bad, notes = collect(
        source=Path(cfg.source),
        out=out,
        known=list(cfg.known),
        **{name: cfg[name] for name in same},
    )
    console = Console(markup=False, highlight=False)
    groups = len({one.row["group"] for one in found})
    console.print(f"{out / TABLE}: {len(found)} clips in {groups} groups", soft_wrap=True)
    for licence, count in Counter(one.row["licence"] for one in found).most_common():
        console.print(f"{count} under {licence}", soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    print_bad(console, bad, None)
    console.print(f"next: acetate prep ingest source={out} out={out}.jsonl", soft_wrap=True)


if __name__ == "__main__":
    run("prep collect")
