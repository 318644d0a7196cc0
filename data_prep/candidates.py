"""Finds which files of a folder belong together: stills, sequences, pairs, pictures with mattes;
and what is said of them."""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acetate.console import printable
from acetate.data.keys import LONGEST_KEY, beginning, plain_key
from acetate.media.packed import VAPC
from acetate.media.sequences import is_sequence, sequence_files
from acetate.video_io import IMAGES, OPAQUE_IMAGES, VIDEOS, MediaError
from data_prep.sequences import Run, find_runs, sequences_of
from data_prep.tables import Row, read_tables, read_text
from data_prep.tree import NOWHERE, Tree, walk

MEDIA = IMAGES + OPAQUE_IMAGES + VIDEOS
PAIR_COLOR = ("fgr",)  # straight colour without its background
# a photographed picture, whose foreground is to be estimated
WHOLE_COLOR = ("rgb", "image", "images")
MATTES = ("pha", "alpha", "alphas", "matte", "mattes", "mask", "masks")
# What tells one form of a clip from another; the rest is the clip's name.
FORM = re.compile(
    rf"^variant_|[_\-.]({'|'.join(PAIR_COLOR + WHOLE_COLOR + MATTES)}"
    r"|seq|rgba|prores\w*|vp[89]\w*|ffv1)$",
    re.IGNORECASE,
)
LICENCE = re.compile(r"licen[cs]e|copying|notice|readme|credits", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """Files that may be one clip. files: one, or colour and alpha. row: of a table; origin: of a
    .json; called: what a sequence that is a pattern is called after."""

    files: tuple[Path, ...]
    matte: bool = False  # colour is a whole picture, alpha its matte
    row: Row = field(default_factory=dict)
    origin: Row = field(default_factory=dict)
    called: Path | None = None

    @property
    def path(self) -> Path:
        return self.called or self.files[0]

    @property
    def name(self) -> str:
        return FORM.sub("", self.path.stem)


@dataclass(frozen=True)
class Folder:
    """candidates: in the order of their names. ignored: file, relative to the folder -> why it is
    none. files: all that are not hidden. notes: what a person should know of tables, sequences and
    links."""

    candidates: list[Candidate]
    ignored: dict[str, str]
    files: list[Path]
    notes: list[str]


def survey(source: Path, leave_out: Collection[Path] = ()) -> Folder:
    """Lists the candidates of a folder without `leave_out`, which an earlier run wrote into it.

    Raises FileNotFoundError where there is no folder, ValueError for a table that cannot be read or
    used.
    """
    tree = walk(source, leave_out)
    tables = read_tables(tree)
    origins, jsons = _read_origins(tree)
    listed = [Candidate(files, False, row) for files, row in tables.pairs]
    ignored = dict(tree.ignored)
    ignored |= {tree.name(path): "a table of clips" for path in tables.files}
    ignored |= {tree.name(path): "describes clips" for path in jsons}
    found = _Finder(tree, tables.rows, {file for candidate in listed for file in candidate.files})
    candidates = []
    for c in [*listed, *found.candidates()]:
        row = c.row or next(
            (tables.rows[path] for path in (*c.files, c.path) if path in tables.rows), {}
        )
        candidates.append(Candidate(c.files, c.matte, row, origins.get(c.name, {}), c.called))
    candidates, twice = _once(tree, candidates)
    ignored |= twice | {tree.name(path): why for path, why in found.beside.items()}
    used = {file for candidate in candidates for path in candidate.files for file in pictures(path)}
    files = list(tree.files())
    for path in files:
        if path not in used and tree.name(path) not in ignored and (why := _not_media(path)):
            ignored[tree.name(path)] = why
    lost = [f"{name}: {why}" for name, why in tree.ignored.items() if why.startswith(NOWHERE)]
    notes = [*tables.notes, *found.notes, *lost]
    return Folder(candidates, ignored, files, list(map(printable, notes)))


def _once(tree: Tree, candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """Drops links to files that are candidates as well; returns the rest, and what each of those
    leads to."""
    real = {c.files for c in candidates if not any(file.is_symlink() for file in c.files)}
    kept, dropped = list[Candidate](), dict[str, str]()
    for candidate in candidates:
        files = tuple(file.resolve() for file in candidate.files)
        if candidate.files != files and files in real:
            for file, there in zip(candidate.files, files, strict=True):
                dropped[tree.name(file)] = f"leads to what is found already: {tree.name(there)}"
        else:
            kept.append(candidate)
            real.add(files)
    return kept, dropped


def clip_key(source: Path, path: Path, taken: set[str]) -> str:
    """Makes a clip's key: the path with dashes; with a hash where that is too long, no key as it
    stands, or taken."""
    inside = path.relative_to(source) if source in path.parents else Path(path.name)
    folders = [part for part in inside.parent.parts if part.lower() not in PAIR_COLOR + WHOLE_COLOR]
    name = unicodedata.normalize("NFC", "-".join((*folders, inside.stem.removesuffix("_fgr"))))
    plain = plain_key(name)
    if plain == name and len(name.encode()) <= LONGEST_KEY and name not in taken:
        return name
    digest = hashlib.sha256(os.fsencode(inside)).hexdigest()[:8]
    return f"{beginning(plain, LONGEST_KEY - 10)}-{digest}"


def sidecar(path: Path) -> Path | None:
    """Returns NAME.txt beside the clip, for a pair also without _fgr."""
    for stem in (path.stem, FORM.sub("", path.stem)):
        text = path.with_name(stem + ".txt")
        if text.is_file():
            return text
    return None


def pictures(path: Path) -> list[Path]:
    """Returns the frames of a sequence; else the file alone."""
    if not is_sequence(path):
        return [path]
    try:
        return sequence_files(path)
    except MediaError:
        return []


def stamps(files: Iterable[Path]) -> list[tuple[int, int] | None]:
    """Returns size and time of each file, which tell one that was changed; None where there is
    none."""
    stats = [path.stat() if path.exists() else None for path in files]
    return [(stat.st_size, stat.st_mtime_ns) if stat else None for stat in stats]


def _read_origins(tree: Tree) -> tuple[dict[str, Row], list[Path]]:
    """Entries of the .json files at the top of the folder, by the name of the clip that they
    describe; and the files, with those of VAP at any depth.

    An entry may give rgb_rect, alpha_rect (x, y, width, height) and packed_size of a packed video,
    and source and path of the file that the clip was cut from.
    """
    entries: dict[str, Row] = {}
    files = [path for path in tree.files() if path.name.lower() == VAPC]
    for path in tree.folders[tree.source]:
        if path.suffix != ".json" or path in files:
            continue
        try:
            content = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{printable(path)} is not JSON ({error}). Repair it or move it away."
            ) from error
        if isinstance(content, dict):
            entries |= {name: entry for name, entry in content.items() if isinstance(entry, dict)}
            files.append(path)
    return entries, files


class _Neighbours:
    """Media files, folders and sequences by folder and stem."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.folders: dict[Path, dict[str, Path]] = {}

    def find(self, folder: Path, stem: str) -> Path | None:
        if folder not in self.folders:
            paths = sorted(self.tree.folders.get(folder, ()), reverse=True)
            self.folders[folder] = {
                p.stem: p for p in paths if p.suffix.lower() in MEDIA or p in self.tree.folders
            }
        return self.folders[folder].get(stem)

    def add(self, folder: Path, sequences: Iterable[Path]) -> None:
        """Sequences of one folder that share it, by what they are called after."""
        for path in sequences:
            if self.find(folder, path.stem) is None:
                self.folders[folder][path.stem] = path

    def matte_of(self, path: Path) -> Path | None:
        """Finds a matte: NAME_fgr + NAME_pha, NAME + NAME_matte, fgr/NAME + pha/NAME and their
        like; a folder may be a sequence."""
        stem, ending = _split(path, PAIR_COLOR + WHOLE_COLOR)
        for end in MATTES:
            found = self.find(path.parent, f"{stem}_{end}")
            if found is None and ending and ending == path.parent.name.lower():
                found = self.find(path.parent.with_name(end), path.stem)
            if found is None and path.name.lower() == ending:
                found = self.find(path.parent, end)
            if found is not None and not _still_and_folder(path, found):
                return found
        return None

    def has_color(self, path: Path) -> bool:
        """Returns whether it is a matte that comes with its colour; one without stands alone, and
        is refused."""
        stem, ending = _split(path, MATTES)
        if not ending:
            return False
        colors = PAIR_COLOR + WHOLE_COLOR
        if stem != path.stem:
            found = [
                self.find(path.parent, name)
                for name in (stem, *(f"{stem}_{end}" for end in colors))
            ]
        elif path.name.lower() == ending:
            found = [self.find(path.parent, end) for end in colors]
        else:
            found = [self.find(path.parent.with_name(end), path.stem) for end in colors]
        return any(other is not None and not _still_and_folder(other, path) for other in found)


def _still_and_folder(one: Path, other: Path) -> bool:
    """Returns whether the two make no pair: a folder is a sequence, and so is what has no file's
    suffix."""
    stills = IMAGES + OPAQUE_IMAGES
    return any(
        (a.is_dir() or a.suffix.lower() not in MEDIA) and b.suffix.lower() in stills
        for a, b in ((one, other), (other, one))
    )


def _split(path: Path, endings: tuple[str, ...]) -> tuple[str, str]:
    """Splits a name from its ending: NAME and fgr of NAME_fgr.mp4; NAME and fgr of fgr/NAME.mp4;
    fgr and fgr of the folder fgr itself."""
    name, _, last = path.stem.rpartition("_")
    if name and last.lower() in endings:
        return name, last.lower()
    return path.stem, next(
        (n for n in (path.name.lower(), path.parent.name.lower()) if n in endings), ""
    )


class _Finder:
    """Goes through the folders. beside: file -> why it is none of a sequence that it stands beside;
    notes: of sequences; both are full once the candidates are."""

    def __init__(self, tree: Tree, rows: dict[Path, Row], taken: set[Path]) -> None:
        self.tree, self.rows, self.taken = tree, rows, taken
        self.neighbours = _Neighbours(tree)
        self.frames: dict[Path, Path] = {}  # of sequences
        self.beside: dict[Path, str] = {}
        self.notes: list[str] = []

    def candidates(self) -> Iterator[Candidate]:
        sequences = {folder: self._sequences(folder) for folder in self.tree.folders}
        for folder, found in sequences.items():
            self.frames |= found
            if folder not in found:
                self.neighbours.add(folder, found)
        for folder, inside in self.tree.folders.items():
            frames = {file for files in sequences[folder].values() for file in pictures(files)}
            stills = [
                path
                for path in inside
                if path.suffix.lower() in MEDIA and path not in self.tree.folders
            ]
            for path in (*sequences[folder], *stills):
                if path not in frames and path not in self.beside:
                    yield from self._one(path)

    def _one(self, path: Path) -> Iterator[Candidate]:
        """Makes a candidate. path: of a file, or what a sequence is called after."""
        neighbours, files = self.neighbours, self.frames.get(path, path)
        if path in self.taken or neighbours.has_color(path):
            return
        alpha, called = neighbours.matte_of(path), None if path == files else path
        if alpha is not None:
            whole = _split(path, PAIR_COLOR)[1] == ""
            yield Candidate((files, self.frames.get(alpha, alpha)), matte=whole, called=called)
        elif path.suffix.lower() not in OPAQUE_IMAGES or path in self.rows:
            yield Candidate((files,), called=called)
        else:
            self.beside[path] = "an opaque picture without a matte"

    def _sequences(self, folder: Path) -> dict[Path, Path]:
        """Returns what each sequence of the folder is called after -> the folder, or the pattern of
        its frames."""
        runs, images = self._runs(folder), self._images(folder)
        if folder in self.rows and not runs and images:
            return {folder: folder}
        if len(runs) == 1:
            whole = len(runs[0].files) == len(images)
            return {folder: folder if whole else runs[0].pattern}
        return {run.called: run.pattern for run in runs}

    def _images(self, folder: Path) -> list[Path]:
        return [
            path
            for path in self.tree.folders[folder]
            if path.suffix.lower() in IMAGES + OPAQUE_IMAGES and path not in self.tree.folders
        ]

    def _runs(self, folder: Path) -> list[Run]:
        """Finds the sequences of a folder; none where a table lists its images, nor in the source
        itself, which is rather a collection of stills."""
        images = self._images(folder)
        if len(images) < 2 or any(path in self.rows or path in self.taken for path in images):
            return []
        paired = {
            path
            for path in images
            if getattr(self.neighbours.matte_of(path), "parent", None) == folder
            or (_split(path, MATTES)[0] != path.stem and self.neighbours.has_color(path))
        }
        if folder in self.rows:
            runs = [run for run in find_runs(images) if 2 * len(run.files) > len(images)]
            return runs if len(runs) == 1 and len(runs[0].files) < len(images) else []
        found = sequences_of(images, paired)
        name = self.tree.name(folder)
        if found.runs and folder == self.tree.source:
            self.notes.append(
                f"{folder.name}: its numbered images are read as stills; give the folder above to "
                "make them a sequence"
            )
            return []
        self.beside |= found.beside
        self.notes += [f"{name}: {note}" for note in found.notes]
        return found.runs


def _not_media(path: Path) -> str | None:
    if LICENCE.search(path.name):
        return "a licence or a note"
    if path.suffix.lower() in MEDIA:
        return None
    if path.suffix.lower() in (".txt", ".md", ".csv", ".json", ".jsonl"):
        return "text"
    return f"no suffix that is read: {', '.join(MEDIA)}"
