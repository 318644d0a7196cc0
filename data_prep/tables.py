"""Tables and texts that describe clips, and which file each row means."""

import codecs
import csv
import io
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from acetate.console import printable
from acetate.documents import parse, read_plain, shown
from acetate.media.images import IMAGES, OPAQUE_IMAGES
from acetate.media.videos import VIDEOS
from data_prep.tree import Tree

FILE = ("file", "path", "name", "filename", "file_name")  # columns that name a row's file
PAIR = ("video_fgr", "video_pha")
MOST_TEXT = 2**29  # bytes of a table
Row = dict[str, Any]


@dataclass
class Tables:
    """rows: file or folder -> what its row says. pairs: colour, alpha and their row. files: the
    tables themselves. notes: rows that mean no file, or one that is called otherwise."""

    rows: dict[Path, Row] = field(default_factory=dict)
    pairs: list[tuple[tuple[Path, Path], Row]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def column(row: Row, *names: str) -> str:
    return next((str(row[name]).strip() for name in names if row.get(name) not in (None, "")), "")


def read_text(path: Path) -> str:
    """Reads UTF-8, or UTF-16 with its mark; a byte order mark is no part of it. Raises
    UnicodeDecodeError for what is neither, OSError for what is no plain file."""
    data = read_plain(path, MOST_TEXT)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def read_tables(tree: Tree) -> Tables:
    """Reads the tables of the source and the folders below it, whose files are named from where the
    table lies.

    Raises ValueError for a table of the source itself that cannot be read or used; a file below
    that is no table of clips is left alone.
    """
    tables, names = Tables(), _Names(tree)
    paths = [path for path in tree.files() if path.suffix.lower() in (".csv", ".jsonl")]
    for path in sorted(paths, key=lambda path: (path.parent != tree.source, path)):
        top = path.parent == tree.source
        try:
            found = [
                {_plain(name): value for name, value in row.items() if name}
                for row in read_rows(path)
            ]
        except ValueError as error:
            if top:
                raise
            tables.notes.append(f"{tree.name(path)}: no row of it counts: {error}")
            continue
        if not any(column(row, *FILE, *PAIR) for row in found):
            if top or _names_media(found):
                known = ", ".join((*FILE, *PAIR))
                tables.notes.append(
                    f"{tree.name(path)}: no row of it names a file; the column for that is one of "
                    f"{known}"
                )
                tables.files.append(path)
            continue
        tables.files.append(path)
        for number, row in enumerate(found, start=1):
            if column(row, "video_fgr"):
                tables.pairs.append(_pair(names, path, number, row))
            else:
                _take(tables, names, path, number, row)
    return tables


def _names_media(rows: list[Row]) -> bool:
    """Tells whether a name or a value of its first rows is called as media are."""
    words = [str(word).strip().lower() for row in rows[:3] for pair in row.items() for word in pair]
    return any(word.endswith((*IMAGES, *OPAQUE_IMAGES, *VIDEOS)) for word in words)


def _take(tables: Tables, names: "_Names", table: Path, number: int, row: Row) -> None:
    """Notes which file the row means, or that it means none."""
    text = column(row, *FILE)
    here = f"{names.tree.name(table)}, row {number}"
    if not text:
        tables.notes.append(f"{here}: names no file")
        return
    found, why = names.find(text, table.parent)
    shown = printable(text)
    if found is None:
        tables.notes.append(f"{here}: {shown} {why}")
        return
    if why:
        tables.notes.append(f"{here}: {shown} is taken for {names.tree.name(found)}, {why}")
    if found in tables.rows:
        tables.notes.append(f"{here}: {shown} has a row already; this one counts")
    tables.rows[found] = row


def read_rows(table: Path) -> list[Row]:
    """Reads the rows of a .csv, whose columns a comma, a semicolon or a tab divides, or a .jsonl.
    Raises ValueError for what is no table."""
    try:
        text = read_text(table)
        if table.suffix.lower() == ".csv":
            head = text.split("\n", 1)[0]
            delimiter = max(",;\t", key=head.count)
            return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        found = [parse(line) for line in text.split("\n") if line.strip()]
        if others := [row for row in found if not isinstance(row, dict)]:
            raise ValueError(f"{shown(others[0])} is no row of names and values")
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{printable(table)} is not a table ({error}). Repair it or move it away."
        ) from error
    return found


def _plain(name: str) -> str:
    """Returns a column's name in lower case, with _ for spaces and dashes and color for colour."""
    return re.sub(r"[\s-]+", "_", name.strip().lower()).replace("colour", "color")


def _pair(names: "_Names", table: Path, number: int, row: Row) -> tuple[tuple[Path, Path], Row]:
    """Reads a row of Wan-Alpha's layout: video_fgr, video_pha, prompt, and status, where `static`
    means a still."""
    here, status = f"{printable(table)}, row {number}", column(row, "status").lower()
    if status not in ("", "static", "dynamic"):
        raise ValueError(f"{here}: status={status}; it is static or dynamic.")
    texts = [column(row, name) for name in PAIR]
    if not texts[1]:
        raise ValueError(f"{here}: no video_pha; a pair has colour and alpha.")
    color, alpha = (names.find(text, table.parent)[0] or table.parent / text for text in texts)
    return (color, alpha), ({**row, "still": "true"} if status == "static" else row)


class _Names:
    """Files and folders of a tree by what a table may call them."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.paths = {*tree.folders, *tree.files()}
        self.folded: dict[str, list[Path]] = {}
        self.ends: dict[str, list[Path]] = {}  # by every end of their paths, of whole names
        for path in sorted(self.paths):
            parts = path.relative_to(tree.source).parts
            self.folded.setdefault(_folded("/".join(parts)), []).append(path)
            for i in range(len(parts)):
                self.ends.setdefault(_folded("/".join(parts[i:])), []).append(path)

    def find(self, text: str, base: Path) -> tuple[Path | None, str]:
        """Returns what a row of a table in `base` means, and why that is not its very name; or None
        and why."""
        source = self.tree.source
        slashed = text.replace("\\", "/")
        for name in (text, slashed):
            for start in dict.fromkeys((base, source)):
                path = Path(os.path.normpath(start / name))
                if path in self.paths:
                    return path, ""
        if _absolute(slashed) and (resolved := Path(slashed).resolve()) in self.paths:
            return resolved, ""
        parts = PurePosixPath(os.path.normpath(slashed)).parts
        loose = [
            (self._below(base, parts), "which differs in case or writing"),
            (self.folded.get(_folded("/".join(parts)), []), "which differs in case or writing"),
        ]
        if source.name in parts[:-1]:
            inside = parts[len(parts) - parts[::-1].index(source.name) :]
            loose.append((self.folded.get(_folded("/".join(inside)), []), "by its path in there"))
        if _absolute(slashed):
            for i in range(1, len(parts)):
                ends = self.ends.get(_folded("/".join(parts[i:])), [])
                if i == len(parts) - 1:  # a bare name may be anything's in another folder
                    ends = [path for path in ends if path.is_relative_to(base)]
                loose.append((ends, "by the end of its path"))
        for found, why in loose:
            if len(found) == 1:
                return found[0], why
            if found:
                return None, f"could be {len(found)} files, {self.tree.name(found[0])} first"
        return None, "names no file"

    def _below(self, base: Path, parts: tuple[str, ...]) -> list[Path]:
        inside = (*base.relative_to(self.tree.source).parts, *parts)
        return self.folded.get(_folded("/".join(inside)), [])


def _absolute(slashed: str) -> bool:
    return slashed.startswith("/") or re.match(r"[A-Za-z]:/|file://", slashed) is not None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
