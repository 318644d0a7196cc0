"""Clips that are done: those of one system in a folder, by name, as streams with what is said of
them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acetate.console import printable
from acetate.data.keys import plain_key
from acetate.documents import parse, read_plain
from acetate.media.clip import Limits, MediaError, Stream
from acetate.media.packed import stated_packing
from acetate.media.sequences import is_sequence
from acetate.video_io import VIDEOS, describe, open_packed, open_pair, open_rgba
from acetate.video_out import SUFFIXES
from data_prep.candidates import PAIR_COLOR, WHOLE_COLOR, Candidate, sidecar, survey
from data_prep.rectangles import detected_rectangles
from data_prep.tables import read_text

# Of one clip in several formats: what loses least.
PREFERRED = ("", ".exr", ".tif", ".tiff", ".png", ".mov", ".mkv", ".apng", ".webp", ".webm")
WRITTEN = re.compile(
    "|".join(f"{re.escape(end.partition('.')[0])}$" for ends in SUFFIXES.values() for end in ends
             if end.startswith("_"))
)  # fmt: skip
MOST_JSON = 2**20  # bytes of a file that describes a sample


def clip_name(candidate: Candidate) -> str:
    """Returns the name by which clips of several systems are the same one."""
    return plain_key(WRITTEN.sub("", candidate.name)) or candidate.name


def clips_of(folder: Path) -> dict[str, Candidate]:
    """Finds the clips of a folder, each once. Names that several folders below it have begin with
    the folder. Raises FileNotFoundError and ValueError."""
    found: dict[str, dict[str, Candidate]] = {}
    for candidate in survey(folder).candidates:
        if candidate.path.name.endswith("_preview.mp4"):
            continue
        places, place = found.setdefault(clip_name(candidate), {}), place_of(candidate, folder)
        if place not in places or _rank(candidate) < _rank(places[place]):
            places[place] = candidate
    return {
        f"{place}/{name}" if place and len(places) > 1 else name: candidate
        for name, places in found.items()
        for place, candidate in places.items()
    }


def place_of(candidate: Candidate, folder: Path) -> str:
    """Returns the folder below `folder` that the clip lies in, "" for none; those that halves of
    pairs lie in do not count."""
    path = candidate.path
    inside = path.relative_to(folder).parent if path.is_relative_to(folder) else Path()
    own = (*PAIR_COLOR, *WHOLE_COLOR)
    return printable("/".join(part for part in inside.parts if part.lower() not in own))


def _rank(candidate: Candidate) -> int:
    suffix = "" if is_sequence(candidate.files[0]) else candidate.files[0].suffix.lower()
    return PREFERRED.index(suffix) if suffix in PREFERRED else len(PREFERRED)


def opened(candidate: Candidate, limits: Limits) -> Stream:
    """Opens a clip with alpha, also colour and alpha packed in one picture. Raises MediaError for a
    file without."""
    path = candidate.files[0]
    if len(candidate.files) == 2:
        return open_pair(*candidate.files, limits)
    header = describe(path, limits)
    if header.alpha:
        return open_rgba(path, limits)
    rects = None
    if not header.lost and path.suffix.lower() in VIDEOS:
        size = (header.width, header.height)
        rects = stated_packing(path, size) or detected_rectangles(path, limits)
    if rects is None:
        raise MediaError(f"{path}: {header.lost or 'no alpha'}")
    return open_packed(path, *rects, limits)


def said_of(candidate: Candidate) -> dict[str, Any]:
    """Returns what the JSON beside a sample says; nothing without one."""
    described = candidate.path.with_name(WRITTEN.sub("", candidate.path.stem) + ".json")
    if not described.is_file():
        return {}
    try:
        said = parse(read_plain(described, MOST_JSON))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def prompt_of(candidate: Candidate) -> str:
    """Returns the text beside the clip, or the prompt of the JSON beside it; empty without."""
    if text := sidecar(candidate.path):
        return printable(read_text(text).strip())
    return printable(str(said_of(candidate).get("prompt", "")))


def named(folders: Sequence[Path]) -> list[str]:
    """Returns as short a name of each folder as tells them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return list(map(printable, names))
    raise ValueError(f"folders={', '.join(map(str, folders))}; a folder is named twice.")
