"""Finds the clips that come from one source, so that they never stand on both sides of the
split."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from acetate.console import printable
from acetate.media.sequences import is_sequence, sequence_files
from data_prep.candidates import FORM, MATTES, PAIR_COLOR, WHOLE_COLOR, Candidate
from data_prep.found import Found
from data_prep.looks import Look, alike
from data_prep.sequences import PREVIEW
from data_prep.tables import column

# what a name ends in that is one part or copy of a thing; and numbers that stand alone in it
PART = re.compile(
    r"(?:^|[\W_])(?:part|pt|cut|shot|scene|take|seg|segment|piece|copy|kopie|copie|v)?[\W_]*$"
    r"|^copy of ",
    re.IGNORECASE,
)
PIECE = re.compile(r"(?:^|[\W_])(part|pt|cut|shot|scene|take|seg|segment|piece)[\W_]*\d", re.I)
NUMBER = re.compile(r"(?<![^\W\d_])\d+|\d+(?![^\W\d_])")
# names that say nothing of what is shown
BARE = re.compile(
    r"(?:^|[\W_])(image|img|dsc|dscn|pic|picture|photo|sample|frame|still|render|output|out|file"
    r"|video|vid|movie|mov|clip|film|untitled|item|comfyui|screenshot)$",
    re.IGNORECASE,
)
FORMS = PAIR_COLOR + WHOLE_COLOR + MATTES
MOST_TOLD = 3  # groups that a report tells of by name
NO_LOOKS: Mapping[str, Look] = {}
Mark = tuple[str, ...]  # what clips of one group share


def grouped(
    source: Path, clips: Sequence[tuple[Candidate, Found]], looks: Mapping[str, Look] = NO_LOOKS
) -> tuple[list[Found], list[str]]:
    """Returns the clips with their groups, and what a person should know of those.

    One group: what a table says; what was cut from one film; forms, parts, previews and copies of
    one thing, by their names; stills of one folder that count up and look alike; files of equal
    content. A name that a table gives a group says nothing more. looks: by the keys of stills;
    those without one count as alike.
    """
    same, contents = _Sets(), _contents(clips)
    counted, different = _counting_up(clips, looks)
    sequences = {
        file if file.is_dir() else file.parent
        for candidate, _ in clips
        for file in candidate.files
        if is_sequence(file)
    }
    for i, (candidate, clip) in enumerate(clips):
        for mark in (
            ("named", _label(source, candidate)),
            *_marks(candidate, counted.get(clip.key), sequences),
            *contents.get(clip.key, ()),
        ):
            same.join(i, mark)
    labels, said = dict[object, str](), dict[object, str]()
    for i, (candidate, _) in enumerate(clips):
        root = same.root(i)
        labels.setdefault(root, _label(source, candidate))
        if name := column(candidate.row, "group"):
            said[root] = min(name, said.get(root, name))
    found = [
        replace(clip, group=(labels | said)[same.root(i)]) for i, (_, clip) in enumerate(clips)
    ]
    return found, _told(found, {key for key in counted if key not in different}, len(different))


def _label(source: Path, candidate: Candidate) -> str:
    """Returns what a table says, the film that it was cut from, or the clip's name; with its folder
    where the name tells nothing."""
    if said := column(candidate.row, "group"):
        return printable(said)
    if "path" in candidate.origin:
        return printable(f"{candidate.origin.get('source', '')}/{candidate.origin['path']}")
    name, folder = candidate.name, candidate.path.parent
    if _thing(name):
        return printable(name)
    inside = folder.relative_to(source) if folder.is_relative_to(source) else folder
    return printable("/".join([*(p for p in inside.parts if p.lower() not in FORMS), name]))


def _marks(
    candidate: Candidate, counted: Mark | None, sequences: set[Path]
) -> Iterator[tuple[str, ...]]:
    """Yields what a clip shares with others of its source, beside its group's name. counted: what
    stills share that count up."""
    if "path" in candidate.origin:
        yield "named", printable(candidate.name)
    if column(candidate.row, "group"):
        return
    folder, name = str(candidate.path.parent), candidate.name
    thing, bare = _thing(name), _bare(name)
    if counted:
        yield counted
    elif thing or bare == name or PIECE.search(name):
        yield "thing", folder, bare.casefold()
    if not thing and PREVIEW.search(name):
        yield "numbered", folder
    for file in candidate.files:
        inside = file if file.is_dir() else file.parent
        if inside in sequences:
            yield "numbered", str(inside)


def _bare(name: str) -> str:
    """Returns the name without forms, previews, parts and numbers."""
    before = None
    while name != before:
        before = name
        for ending in (FORM, PREVIEW, PART, NUMBER):
            name = ending.sub("", name)
    return name


def _thing(name: str) -> str:
    """Returns what the name tells of what is shown; "" if nothing."""
    bare = _bare(name)
    telling = re.search(r"[^\W\d_]{2}", bare) and not BARE.search(bare)
    return bare if telling and bare.lower() not in FORMS else ""


def _counting_up(
    clips: Sequence[tuple[Candidate, Found]], looks: Mapping[str, Look]
) -> tuple[dict[str, Mark], set[str]]:
    """Returns what each still, with or without a matte, that is numbered in one folder shares with
    others; and the keys of those that count up and show different things.

    Where most neighbours look alike, all of them are frames of one thing; else those are that do.
    Under names that tell nothing, stills that mostly have a size of their own show different
    things.
    """
    series: dict[Mark, list[tuple[list[int], Found]]] = {}
    for candidate, clip in clips:
        name, bare, thing = candidate.name, _bare(candidate.name), _thing(candidate.name)
        nameless = BARE.search(bare) or re.fullmatch(r"[^\W\d_]{0,2}", bare)
        special = PIECE.search(name) or PREVIEW.search(name) or column(candidate.row, "group")
        if clip.frames == 1 and name != bare and (thing or nameless) and not special:
            folder = str(candidate.path.parent)
            mark = ("thing", folder, bare.casefold()) if thing else ("numbered", folder)
            numbers = [int(number) for number in re.findall(r"\d+", name)]
            series.setdefault(mark, []).append((numbers, clip))
    marks, different = dict[str, Mark](), set[str]()
    for mark, members in series.items():
        stills = [clip for _, clip in sorted(members, key=lambda one: (one[0], one[1].key))]
        sizes = {(clip.width, clip.height) for clip in stills}
        if len(stills) < 2 or (mark[0] == "numbered" and 2 * len(sizes) > len(stills) + 1):
            continue
        near = [_alike(looks, *pair) for pair in pairwise(stills)]
        first = stills[0].key
        for clip, like in zip(stills, [True, *near], strict=True):
            first = first if like else clip.key
            marks[clip.key] = mark if 2 * sum(near) >= len(near) else ("alike", first)
        if marks[stills[0].key] != mark:
            different |= {clip.key for clip in stills}
    return marks, different


def _alike(looks: Mapping[str, Look], one: Found, other: Found) -> bool:
    known = one.key in looks and other.key in looks
    return not known or alike(looks[one.key], looks[other.key])


def _contents(clips: Sequence[tuple[Candidate, Found]]) -> dict[str, list[tuple[str, ...]]]:
    """Returns key -> digest, of clips whose files have the sizes of another's, in bytes."""
    alike: dict[tuple[int, ...], list[tuple[str, list[Path]]]] = {}
    for _, clip in clips:
        first = Path(clip.files[0])
        files = sequence_files(first) if is_sequence(first) else [first]
        sizes = tuple(path.stat().st_size for path in files if path.exists())
        alike.setdefault(sizes, []).append((clip.key, files))
    digests = {}
    for some in alike.values():
        for key, files in some if len(some) > 1 else []:
            digest = hashlib.sha256()
            for path in files:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            digests[key] = [("content", digest.hexdigest())]
    return digests


def _told(clips: Sequence[Found], counted: set[str], different: int) -> list[str]:
    counts = Counter(clip.group for clip in clips)
    stills = Counter(clip.group for clip in clips if clip.key in counted)
    notes = [
        f"{number} numbered stills are one group, {group}, and stay on one side of the split; a "
        "column group of a table divides them"
        for group, number in stills.most_common(MOST_TOLD)
        if number > 1
    ]
    if different:
        notes.append(
            f"{different} numbered stills look different from those beside them, and are no group; "
            "a column group of a table makes them one"
        )
    if len(counts) == 1 < len(clips):
        notes.append(
            f"all {len(clips)} clips are of one group, so that none of them can validate; a column "
            "group of a table divides them"
        )
    return notes


class _Sets:
    """Clips and what they share, joined: a union of sets by their roots."""

    def __init__(self) -> None:
        self.above: dict[object, object] = {}

    def root(self, one: object) -> object:
        while (above := self.above.get(one, one)) != one:
            self.above[one] = self.above.get(above, above)
            one = above
        return one

    def join(self, one: object, other: object) -> None:
        self.above[self.root(one)] = self.root(other)
