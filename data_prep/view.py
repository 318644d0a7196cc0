"""Writes one HTML page that plays transparent clips: of one folder, or of several systems side by
side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from acetate.alpha import border_mean
from acetate.cli import run
from acetate.console import printable
from acetate.media.clip import Limits, MediaError, RGBAClip
from acetate.pages.clips import Shown, page, shown
from acetate.replacing import check_out, written
from data_prep.bad_clips import print_bad
from data_prep.candidates import Candidate
from data_prep.executor import progress
from data_prep.finished import clips_of, named, opened, prompt_of


@dataclass(frozen=True)
class Work:
    """A clip's name, the files of each system, and those of the reference, if there is one."""

    name: str
    of: tuple[Candidate | None, ...]
    reference: Candidate | None


@dataclass(frozen=True)
class Look:
    """frames, side: at most this many pictures of a clip, of this longer side. lossless: whether
    the page holds them to the bit."""

    frames: int
    side: int
    lossless: bool
    limits: Limits


def show(work: Work, look: Look) -> list[Shown | str | None]:
    """Draws the clip of each system: None where it has none, the reason where it cannot be read."""
    reference = None
    if work.reference is not None:
        try:
            reference = _read(work.reference, look.limits)
        except MediaError as error:
            return [f"its reference: {error}"] * len(work.of)
    made: list[Shown | str | None] = []
    for candidate in work.of:
        if candidate is None:
            made.append(None)
            continue
        try:
            made.append(_shown(candidate, _read(candidate, look.limits), reference, look))
        except MediaError as error:
            made.append(str(error))
    return made


def _read(candidate: Candidate, limits: Limits) -> RGBAClip:
    return opened(candidate, limits).collected(candidate.files[0], limits)


def _shown(candidate: Candidate, clip: RGBAClip, reference: RGBAClip | None, look: Look) -> Shown:
    return shown(
        clip.frames,
        clip.fps or 16.0,
        prompt_of(candidate),
        figures(clip, reference),
        most=look.frames,
        side=look.side,
        lossless=look.lossless,
    )


def figures(clip: RGBAClip, reference: RGBAClip | None) -> dict[str, float]:
    """Measures a clip: coverage and the semi-transparent share of its pixels, mean alpha of its
    border; against a reference of the same size also `metrics.matting`."""
    alpha = _alpha(clip)
    found = {
        "coverage": float(alpha.mean()),
        "soft": float(((alpha > 0) & (alpha < 1)).float().mean()),
        "border": float(border_mean(alpha)[0]),
    }
    if reference is not None and reference.frames.shape == clip.frames.shape:
        from acetate.metrics.matting import MattingErrors  # torchmetrics: seconds

        metric = MattingErrors(connectivity=False)
        metric.update(alpha, _alpha(reference))
        found |= {name: float(value) for name, value in metric.compute().items()}
    return found


def _alpha(clip: RGBAClip) -> Tensor:
    return torch.from_numpy(clip.frames[..., 3].astype("float32") / 255)[None, None]


def works(folders: Sequence[Path], reference: Path | None) -> Iterator[Work]:
    """Yields every clip that any folder holds, in the order of their names."""
    found = [clips_of(folder) for folder in folders]
    true = clips_of(reference) if reference else {}
    for name in sorted(set().union(*found)):
        yield Work(name, tuple(clips.get(name) for clips in found), true.get(name))


def main(config: DictConfig) -> Path:
    out = Path(config.out)
    check_out(out)
    folders = [Path(folder).resolve() for folder in config.folders]
    systems = named(folders)
    reference = Path(config.reference) if config.reference else None
    todo = list(works(folders, reference))
    if not todo:
        raise ValueError(f"folders={', '.join(map(str, folders))}: no clip was found there.")
    limits = Limits(max_pixels=config.max_pixels, max_frames=config.max_frames)
    look = Look(config.frames, config.side, config.lossless, limits)
    clips, bad = [], {}
    settings = {"executor": "local", "workers": config.workers, "name": attrgetter("name")}
    with progress(partial(show, look=look), todo, desc="clips", **settings) as results:
        for work, made in results:
            bad |= {
                f"{system}/{work.name}": printable(one)
                for system, one in zip(systems, made, strict=True)
                if isinstance(one, str)
            }
            if any(isinstance(one, Shown) for one in made):
                clips.append((work.name, made))
    console = Console(markup=False, highlight=False)
    print_bad(console, bad, None)
    if not clips:
        raise ValueError(f"folders={', '.join(map(str, folders))}: no clip could be shown.")
    with written(out) as file:
        file.write(page(" and ".join(systems), systems, clips))
    size = out.stat().st_size / 2**20
    console.print(f"{out}: {len(clips)} clips, {size:.1f} MiB; open it in a browser")
    return out


if __name__ == "__main__":
    run("view")
