"""Finds the images of a folder that are frames of a sequence, by their names, numbers and sizes."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from acetate.media.images import OPAQUE_IMAGES, describe_image, image_size
from acetate.media.sequences import COUNTER
from acetate.video_io import MediaError

# what a picture is called that shows another file in short
PREVIEW = re.compile(
    r"(?:^|[\W_])(poster|preview|prev|thumb|thumbs|thumbnail|cover|proxy|contact_?sheet)(?=$|[\W_])",
    re.IGNORECASE,
)
FEWEST = 3  # frames of a sequence that other images stand beside


@dataclass(frozen=True)
class Run:
    """Images of one folder whose names differ in one number. pattern: their name, with * for it."""

    pattern: Path
    files: tuple[Path, ...]
    numbers: tuple[int, ...]

    @property
    def called(self) -> Path:
        """The pattern's folder with the words of its name."""
        words = re.sub(r"[\W_]*\*[\W_]*", "_", self.pattern.stem).strip("_")
        return self.pattern.with_name(words or "frames")

    @property
    def opaque(self) -> bool:
        return self.pattern.suffix.lower() in OPAQUE_IMAGES


@dataclass(frozen=True)
class Sequences:
    """runs: those that are sequences. beside: file -> why it is left out. notes: in words, what
    the folder's images are not, and what stands beside them."""

    runs: list[Run]
    beside: dict[Path, str]
    notes: list[str]


def find_runs(images: Sequence[Path]) -> list[Run]:
    """Finds the runs of one folder's images; a file that counts with no other is in none."""
    alike: dict[tuple[str, ...], list[Path]] = {}
    for path in images:
        if COUNTER not in path.name:
            words = tuple(re.split(r"\d+", path.stem.casefold()))
            alike.setdefault((*words, path.suffix.lower()), []).append(path)
    runs = []
    for paths in alike.values():
        fields = [[int(n) for n in re.findall(r"\d+", path.stem)] for path in paths]
        changing = [i for i in range(len(fields[0])) if len({row[i] for row in fields}) > 1]
        if not changing:
            continue
        last, shots = changing[-1], dict[tuple[int, ...], list[tuple[int, Path]]]()
        for path, row in zip(paths, fields, strict=True):
            rest = tuple(n for i, n in enumerate(row) if i != last)
            shots.setdefault(rest, []).append((row[last], path))
        for shot in shots.values():
            if len(shot) > 1:
                numbers, files = zip(*sorted(shot), strict=True)
                runs.append(Run(_pattern(files[0], last), files, numbers))
    return sorted(runs, key=lambda run: run.pattern)


def sequences_of(images: Sequence[Path], paired: Collection[Path] = ()) -> Sequences:
    """Returns one run that counts up without a gap and has one size, or several with the same
    numbers (passes of one render); other images may stand beside them.

    paired: images that belong to another by their own names. Previews, and JPEGs that show the
    frames again, are left out; a run whose numbers or sizes do not agree is stills.
    """
    notes = list[str]()
    free = [path for path in images if path not in paired]
    runs, shadows = _without_shadows(find_runs(free), free)
    kept = []
    for run in runs:
        why = _refused(run)
        if why is None:
            kept.append(run)
        elif why:
            notes.append(f"{why}; list the folder in a table to make them a sequence")
    inside = {path for run in kept for path in run.files}
    others = [path for path in images if path not in inside and path not in shadows]
    beside = {path: "a preview of the sequence" for path in others if PREVIEW.search(path.stem)}
    strays = [path for path in others if path not in beside]
    if len({run.numbers for run in kept}) > 1:
        names = ", ".join(run.pattern.name for run in kept[:3])
        notes.append(
            f"{len(kept)} runs of numbered images ({names}) are stills; give each a "
            "folder of its own to make it a sequence"
        )
        kept = []
    alone = len(kept) == 1 and not others
    if not kept or len(inside) <= len(strays) or not (alone or len(kept[0].files) >= FEWEST):
        return Sequences([], {}, notes)
    beside |= dict.fromkeys(sorted(shadows), "shows a frame again that is beside it with alpha")
    for what, some in (("left out", list(beside)), ("of the same group", strays)):
        if some:
            names = ", ".join(path.name for path in some[:3]) + ", ..." * (len(some) > 3)
            frames = " and ".join(run.pattern.name for run in kept[:3])
            notes.append(f"beside the sequence {frames}: {names} ({len(some)} {what})")
    return Sequences(kept, beside, notes)


def _without_shadows(runs: list[Run], images: Sequence[Path]) -> tuple[list[Run], set[Path]]:
    """Returns the runs without JPEGs that have the names of frames with alpha, and those JPEGs."""
    frames = {path.stem.casefold() for run in runs if not run.opaque for path in run.files}
    shadows = {
        path
        for path in images
        if path.suffix.lower() in OPAQUE_IMAGES and path.stem.casefold() in frames
    }
    return [run for run in runs if not shadows.issuperset(run.files)], shadows


def _refused(run: Run) -> str | None:
    """Returns why a run is no sequence: None if it is one, "" where nothing speaks for it."""
    numbers, count = run.numbers, len(run.numbers)
    span = numbers[-1] - numbers[0] + 1
    if span > 2 * count:
        return ""
    if len(set(numbers)) < count:
        twice = next(n for n, m in pairwise(numbers) if n == m)
        return f"number {twice} is there twice, so its {count} images are stills"
    sizes = _sizes(run.files)
    if sizes is None or 2 * len(sizes) < count:
        return ""
    (usual, most), *unusual = Counter(sizes.values()).most_common()
    if unusual:
        odd = next(path for path in sizes if sizes[path] != usual)
        (wide, high), (width, height) = sizes[odd], usual
        said = f"{odd.name} is {wide}x{high} and others {width}x{height}"
        return f"{said}, so its {count} images are stills" if 2 * most >= max(count, 4) else ""
    if span > count:
        missing = next(n for n in range(numbers[0], numbers[-1]) if n not in set(numbers))
        return f"number {missing} is missing, so its {count} images are stills"
    return None


def _sizes(files: Sequence[Path]) -> dict[Path, tuple[int, int]] | None:
    """Returns the sizes of those that can be read; the others are the sequence's fault. None if one
    is an animation."""
    sizes = {}
    for path in files:
        try:
            sizes[path] = image_size(path)
        except MediaError:
            with suppress(MediaError):
                if describe_image(path).frames > 1:
                    return None
    return sizes


def _pattern(file: Path, field: int) -> Path:
    """Returns the file's name with * for the number of that index."""
    place = list(re.finditer(r"\d+", file.stem))[field]
    return file.with_name(file.name[: place.start()] + COUNTER + file.name[place.end() :])
