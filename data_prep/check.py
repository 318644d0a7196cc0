"""Says of files whether players and editors will see their transparency: what they carry, what
their pictures hold, and what is wrong with either."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from acetate.cli import run
from acetate.console import printable
from acetate.media.alpha_plane import Carried, carried, who_shows
from acetate.media.clip import Frames, Limits, MediaError
from acetate.media.packed import stated_packing
from acetate.video_io import VIDEOS, describe, open_rgba
from data_prep.analysis import analyse, how_sure
from data_prep.rectangles import detected_rectangles


@dataclass
class Verdict:
    """lines: name -> what is so. faults: what keeps transparency from being seen as meant. notes:
    what does not, and should be known."""

    path: Path
    lines: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"  {name:10} {text}" for name, text in self.lines.items()]
        rows += [f"  note       {text}" for text in self.notes]
        rows += [f"  fault      {text}" for text in self.faults]
        return "\n".join([f"{printable(self.path)}: {'faulty' if self.faults else 'fine'}", *rows])


def check(path: Path, limits: Limits) -> Verdict:
    """Decodes the whole file once, a picture at a time. What cannot be read is a fault."""
    verdict = Verdict(path)
    try:
        header, structure = describe(path, limits), carried(path)
    except MediaError as error:
        verdict.faults.append(_said(error, path))
        return verdict
    told = [f"{structure.codec}, {structure.pixels}, {header.width}x{header.height}"]
    told += [f"{header.frames} pictures"] if header.frames > 1 else []
    verdict.lines["file"] = ", ".join(told)
    verdict.faults += structure.faults(header.alpha)
    if structure.stated is not None:
        verdict.lines["stated"] = structure.stated or "nothing of its colour"
        if structure.unstated:
            verdict.notes.append(
                f"{', '.join(structure.unstated)} of its colour are not stated: programs differ in "
                "what they guess"
            )
    if not header.alpha:
        verdict.faults.append(header.lost or "no alpha: every program shows it opaque")
        verdict.notes += _packed(path, (header.width, header.height), limits)
        return verdict
    try:
        _look(verdict, path, limits, structure)
    except MediaError as error:
        verdict.faults.append(_said(error, path))
    return verdict


def _said(error: MediaError, path: Path) -> str:
    """Leaves out the file's name, which stands above."""
    return printable(str(error).removeprefix(f"{path}: "))


def _look(verdict: Verdict, path: Path, limits: Limits, structure: Carried) -> None:
    """Adds what the pictures show."""
    levels = np.zeros(256, np.int64)
    clip = open_rgba(path, limits)
    clip.pictures = _counted(clip.pictures, levels)
    found = analyse(clip)
    empty, opaque = levels[0] / levels.sum(), levels[255] / levels.sum()
    held = np.flatnonzero(levels)
    verdict.lines["alpha"] = (
        f"{held[0]} to {held[-1]}; {empty:.0%} empty, {opaque:.0%} opaque, "
        f"{1 - empty - opaque:.0%} between"
    )
    verdict.lines["colour"] = found.reasons["color"]
    if shown := who_shows(path, structure.codec):
        verdict.lines["shown by"] = shown[0]
        if shown[1]:
            verdict.lines["not by"] = shown[1]
    verdict.notes += [printable(note) for note in clip.notes]
    if held[0] == 255:
        verdict.faults.append("opaque throughout: alpha is 255 everywhere")
    elif found.matte == "empty":
        verdict.faults.append(f"empty throughout: alpha is at most {held[-1]}")
    elif found.matte == "full":
        verdict.faults.append(f"opaque throughout: alpha is at least {held[0]}")
    elif found.alpha_range:
        low, high = found.alpha_range
        verdict.faults.append(
            f"alpha reaches from {low} to {high} in place of 0 to 255, as after a conversion to "
            "limited range: what should be empty or opaque is not"
        )
    if found.matte == "flickers":
        verdict.notes.append(f"it flickers: {found.reasons['matte']}")
    if found.color not in ("straight", "matte"):
        sure = how_sure(found.confidence)
        text = f"its colour is mixed with {found.color} ({sure}): edges show that where programs "
        text += "take it for straight"
        (verdict.notes if clip.premultiplied or sure == "unsure" else verdict.faults).append(text)


def _counted(pictures: Iterator[Frames], levels: NDArray[np.int64]) -> Iterator[Frames]:
    """Gives the pictures on, and counts their alpha."""
    for picture in pictures:
        levels += np.bincount(picture[..., 3].ravel(), minlength=256)
        yield picture


def _packed(path: Path, size: tuple[int, int], limits: Limits) -> list[str]:
    """Says so where colour and alpha lie side by side in one picture."""
    if path.suffix.lower() not in VIDEOS:
        return []
    try:
        rects = stated_packing(path, size) or detected_rectangles(path, limits)
    except MediaError:
        return []
    if rects is None:
        return []
    return [
        f"colour and alpha lie in one picture, at {list(rects[0])} and {list(rects[1])} (x, "
        "y, width, height): only players that know this layout show it transparent"
    ]


def main(config: DictConfig) -> list[Verdict]:
    limits = Limits(max_pixels=config.max_pixels, max_frames=config.max_frames)
    verdicts = []
    for name in config.files:
        verdicts.append(check(Path(name), limits))
        print(verdicts[-1], flush=True)
    if any(verdict.faults for verdict in verdicts):
        raise SystemExit(1)
    return verdicts


if __name__ == "__main__":
    run("check")
