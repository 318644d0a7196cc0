"""Which files of a folder belong together: stills, sequences, pairs, pictures with mattes; and what
the tables say."""

import csv
import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acetate.data.keys import LONGEST_KEY, beginning, plain_key
from acetate.media.images import image_size
from acetate.video_io import IMAGES, OPAQUE_IMAGES, VIDEOS, MediaError, sequence_files

MEDIA = IMAGES + OPAQUE_IMAGES + VIDEOS
PAIR_COLOUR = ("fgr",)  # straight colour without its background
# a photographed picture, whose foreground is to be estimated
WHOLE_COLOUR = ("rgb", "image", "images")
MATTES = ("pha", "alpha", "alphas", "matte", "mattes", "mask", "masks")
# What tells one form of a clip from another; the rest is the clip's name.
FORM = re.compile(
    rf"^variant_|[_\-.]({'|'.join(PAIR_COLOUR + WHOLE_COLOUR + MATTES)}"
    r"|seq|rgba|prores\w*|vp[89]\w*|ffv1)$",
    re.IGNORECASE,
)
LICENCE = re.compile(r"licen[cs]e|copying|notice|readme|credits", re.IGNORECASE)
Row = dict[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """Files that may be one clip. files: one, or colour and alpha. row: of a table; origin: of a
    .json."""

    files: tuple[Path, ...]
    matte: bool = False  # colour is a whole picture, alpha its matte
    row: Row = field(default_factory=dict)
    origin: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        return FORM.sub("", self.files[0].stem)


@dataclass(frozen=True)
class Folder:
    """candidates: in the order of their names. ignored: file, relative to the folder -> why it is
    none."""

    candidates: list[Candidate]
    ignored: dict[str, str]


def survey(source: Path, leave_out: Collection[Path] = ()) -> Folder:
    """All of a folder but `leave_out`, which an earlier run wrote into it.

    FileNotFoundError if it is none, ValueError for a table that cannot be read or used.
    """
    if not source.is_dir():
        raise FileNotFoundError(
            f"source={source} is not a folder; name the folder that holds the media."
        )
    tables = sorted({*source.glob("*.csv"), *source.glob("*.jsonl")}.difference(leave_out))
    rows, listed = _read_tables(source, tables)
    origins, jsons = _read_origins(source, leave_out)
    found = [
        *listed,
        *_in_folders(source, rows, {file for candidate in listed for file in candidate.files}),
    ]
    candidates = [
        Candidate(c.files, c.matte, c.row or _row(source, c.files, rows), origins.get(c.name, {}))
        for c in found
    ]
    ignored = {str(path.relative_to(source)): "a table of clips" for path in tables}
    ignored |= {str(path.relative_to(source)): "describes clips" for path in jsons}
    used = {file for candidate in candidates for file in candidate.files}
    for path in sorted(set(source.rglob("*")).difference(leave_out)):
        inside = path.relative_to(source)
        if path.is_file() and str(inside) not in ignored:
            reason = _not_media(source, path)
            if (
                reason is None
                and path.suffix.lower() in OPAQUE_IMAGES
                and not used & {path, path.parent}
            ):
                reason = "an opaque picture without a matte"
            if reason:
                ignored[str(inside)] = reason
    if unknown := [name for name in rows if not (source / name).exists()]:
        log.warning(
            "%d rows of tables name no file of %s, the first is %s",
            len(unknown),
            source,
            unknown[0],
        )
    return Folder(candidates, ignored)


def column(row: Row, *names: str) -> str:
    return next((str(row[name]).strip() for name in names if row.get(name) not in (None, "")), "")


def clip_key(source: Path, path: Path, taken: set[str]) -> str:
    """The path with dashes; with a hash where that is too long, no key as it stands, or taken."""
    inside = path.relative_to(source) if source in path.parents else Path(path.name)
    folders = [
        part for part in inside.parent.parts if part.lower() not in PAIR_COLOUR + WHOLE_COLOUR
    ]
    name = unicodedata.normalize("NFC", "-".join((*folders, inside.stem.removesuffix("_fgr"))))
    plain = plain_key(name)
    if plain == name and len(name.encode()) <= LONGEST_KEY and name not in taken:
        return name
    digest = hashlib.sha256(os.fsencode(inside)).hexdigest()[:8]
    return f"{beginning(plain, LONGEST_KEY - 10)}-{digest}"


def sidecar(path: Path) -> Path | None:
    """NAME.txt beside the clip, for a pair also without _fgr."""
    for stem in (path.stem, FORM.sub("", path.stem)):
        text = path.with_name(stem + ".txt")
        if text.is_file():
            return text
    return None


def pictures(path: Path) -> list[Path]:
    """The frames of a sequence, which is a folder; else the file alone."""
    if not path.is_dir():
        return [path]
    return [
        file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGES + OPAQUE_IMAGES
    ]


def stamps(files: Iterable[Path]) -> list[tuple[int, int] | None]:
    """Size and time of each file, which tell one that was changed; None where there is none."""
    stats = [path.stat() if path.exists() else None for path in files]
    return [(stat.st_size, stat.st_mtime_ns) if stat else None for stat in stats]


def _read_tables(source: Path, tables: list[Path]) -> tuple[dict[str, Row], list[Candidate]]:
    """Rows by the file that they describe, and the pairs of tables with columns video_fgr and
    video_pha."""
    rows: dict[str, Row] = {}
    pairs = []
    for table in tables:
        with open(table, newline="", encoding="utf-8-sig") as file:
            try:
                found = (
                    list(csv.DictReader(file))
                    if table.suffix == ".csv"
                    else list(map(json.loads, file))
                )
            except (ValueError, csv.Error) as error:
                raise ValueError(
                    f"{table} is not a table ({error}). Repair it or move it away."
                ) from error
        for number, row in enumerate(found, start=1):
            if column(row, "video_fgr"):
                pairs.append(_listed_pair(source, table, number, row))
            elif column(row, "file", "path", "name"):
                rows[column(row, "file", "path", "name").rstrip("/")] = row
    return rows, pairs


def _listed_pair(source: Path, table: Path, number: int, row: Row) -> Candidate:
    """Wan-Alpha's layout: video_fgr, video_pha, prompt, and status, where `static` means a
    still."""
    status = column(row, "status").lower()
    if status not in ("", "static", "dynamic"):
        raise ValueError(f"{table}, row {number}: status={status}; it is static or dynamic.")
    files = tuple(
        source / column(row, name) for name in ("video_fgr", "video_pha") if column(row, name)
    )
    if len(files) < 2:
        raise ValueError(f"{table}, row {number}: no video_pha; a pair has colour and alpha.")
    return Candidate(files, False, {**row, "still": "true"} if status == "static" else row)


def _read_origins(source: Path, leave_out: Collection[Path]) -> tuple[dict[str, Row], list[Path]]:
    """Entries of the .json files at the top of the folder, by the name of the clip that they
    describe; and the files.

    An entry may give rgb_rect, alpha_rect (x, y, width, height) and packed_size of a packed video,
    and source and path of the file that the clip was cut from.
    """
    entries: dict[str, Row] = {}
    files = []
    for path in sorted(set(source.glob("*.json")).difference(leave_out)):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}). Repair it or move it away.") from error
        if isinstance(content, dict):
            entries |= {name: entry for name, entry in content.items() if isinstance(entry, dict)}
            files.append(path)
    return entries, files


def _row(source: Path, files: tuple[Path, ...], rows: dict[str, Row]) -> Row:
    inside = [str(file.relative_to(source)) for file in files]
    return next((rows[name] for name in inside if name in rows), {})


class _Neighbours:
    """Media files and folders by folder and stem; each folder is listed once."""

    def __init__(self) -> None:
        self.folders: dict[Path, dict[str, Path]] = {}

    def find(self, folder: Path, stem: str) -> Path | None:
        if folder not in self.folders:
            paths = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
            self.folders[folder] = {
                p.stem: p for p in paths if p.suffix.lower() in MEDIA or p.is_dir()
            }
        return self.folders[folder].get(stem)

    def matte_of(self, path: Path) -> Path | None:
        """NAME_fgr + NAME_pha, NAME + NAME_matte, fgr/NAME + pha/NAME and their like; a folder may
        be a sequence."""
        stem, ending = _split(path, PAIR_COLOUR + WHOLE_COLOUR)
        for end in MATTES:
            found = self.find(path.parent, f"{stem}_{end}")
            if found is None and ending and ending == path.parent.name.lower():
                found = self.find(path.parent.with_name(end), path.stem)
            if found is None and path.name.lower() == ending:
                found = self.find(path.parent, end)
            if found is not None and not _still_and_folder(path, found):
                return found
        return None

    def has_colour(self, path: Path) -> bool:
        """Whether it is a matte that comes with its colour; one without stands alone, and is
        refused."""
        stem, ending = _split(path, MATTES)
        if not ending:
            return False
        colours = PAIR_COLOUR + WHOLE_COLOUR
        if stem != path.stem:
            found = [
                self.find(path.parent, name)
                for name in (stem, *(f"{stem}_{end}" for end in colours))
            ]
        elif path.name.lower() == ending:
            found = [self.find(path.parent, end) for end in colours]
        else:
            found = [self.find(path.parent.with_name(end), path.stem) for end in colours]
        return any(other is not None and not _still_and_folder(other, path) for other in found)


def _still_and_folder(one: Path, other: Path) -> bool:
    """Which make no pair: a folder is a sequence."""
    stills = IMAGES + OPAQUE_IMAGES
    return (one.is_dir() and other.suffix.lower() in stills) or (
        other.is_dir() and one.suffix.lower() in stills
    )


def _split(path: Path, endings: tuple[str, ...]) -> tuple[str, str]:
    """NAME and fgr of NAME_fgr.mp4; NAME and fgr of fgr/NAME.mp4; fgr and fgr of the folder fgr
    itself."""
    name, _, last = path.stem.rpartition("_")
    if name and last.lower() in endings:
        return name, last.lower()
    return path.stem, next(
        (n for n in (path.name.lower(), path.parent.name.lower()) if n in endings), ""
    )


def _in_folders(source: Path, rows: dict[str, Row], taken: set[Path]) -> Iterator[Candidate]:
    neighbours = _Neighbours()
    for folder in [source, *sorted(path for path in source.rglob("*") if path.is_dir())]:
        inside = folder.relative_to(source)
        if any(part.startswith(".") for part in inside.parts):
            continue
        paths = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in MEDIA]
        sequence = _is_sequence(source, folder, rows)
        if sequence and folder == source and "." not in rows:
            log.warning(
                "%s: its numbered images are read as stills; give the folder above to make them a "
                "sequence",
                source,
            )
        elif sequence:
            paths = [folder, *(path for path in paths if path.suffix.lower() in VIDEOS)]
        for path in paths:
            if path in taken or path.name.startswith(".") or neighbours.has_colour(path):
                continue
            alpha = neighbours.matte_of(path)
            if alpha is None:
                if (
                    path.suffix.lower() not in OPAQUE_IMAGES
                    or str(path.relative_to(source)) in rows
                ):
                    yield Candidate((path,))
            else:
                yield Candidate((path, alpha), matte=_split(path, PAIR_COLOUR)[1] == "")


def _is_sequence(source: Path, folder: Path, rows: dict[str, Row]) -> bool:
    """Whether a folder's images are frames: a table lists the folder, or they count up and have one
    size."""
    if str(folder.relative_to(source)) in rows:
        return True
    images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES + OPAQUE_IMAGES]
    if len(images) < 2 or any(str(path.relative_to(source)) in rows for path in images):
        return False
    files = sequence_files(folder)
    names = [name for path in files if (name := re.fullmatch(r"(.*?)(\d+)", path.stem))]
    if len(names) < len(files) or len({name[1] for name in names}) > 1:
        return False
    numbers = [int(name[2]) for name in names]
    span = numbers[-1] - numbers[0] + 1
    if len(set(numbers)) < len(numbers) or span > 2 * len(numbers):
        return False
    try:
        if len({image_size(path) for path in images}) > 1:
            return False
    except MediaError:
        return False
    if span > len(numbers):
        missing = next(number for number in range(numbers[0], numbers[-1]) if number not in numbers)
        log.warning("%s: number %d is missing, so its %d images are stills; list the folder in a "
                    "table to make them a "
                    "sequence", folder, missing, len(numbers))  # fmt: skip
    return span == len(numbers)


def _not_media(source: Path, path: Path) -> str | None:
    inside = path.relative_to(source)
    if any(part.startswith(".") for part in inside.parts):
        return "hidden"
    if LICENCE.search(path.name):
        return "a licence or a note"
    if path.suffix.lower() in MEDIA:
        return None
    if path.suffix.lower() in (".txt", ".md", ".csv", ".json", ".jsonl"):
        return "text"
    return f"no suffix that is read: {', '.join(MEDIA)}"
