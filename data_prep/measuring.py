"""Measures a finished clip, alone or against the true one, a few pictures at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from acetate.alpha import unpremultiply
from acetate.console import printable
from acetate.media.clip import Frames, Limits, MediaError, Stream
from acetate.metrics.faults import Faults, named
from acetate.metrics.looks import AlphaLooks, GuideAdherence
from acetate.metrics.matting import MattingErrors
from acetate.metrics.moving import AlphaMotion
from acetate.metrics.palette import PaletteQuality
from acetate.metrics.published import PublishedComposites
from acetate.metrics.temporal import TemporalErrors
from data_prep.candidates import Candidate
from data_prep.finished import opened, said_of

PIECE = 8  # pictures in memory at a time
PATH = ("centre", "axes", "angle", "end_centre", "end_axes", "end_angle")  # of a guide's ellipse


@dataclass(frozen=True)
class Work:
    """A clip of a system. candidate: its files; reference: those of the true clip, if there is
    one. through: whether an RGBA-VAE's reconstruction of it is measured, against it. why: what
    keeps it from being measured, known before."""

    system: str
    name: str
    stratum: str
    candidate: Candidate
    reference: Candidate | None = None
    through: bool = False
    why: str = ""

    def __str__(self) -> str:
        return f"{self.system}/{self.name}"


@dataclass(frozen=True)
class Choices:
    """lpips: measure it too. published: AlphaVAE's composites; None: of stills. cut_longer: of two
    lengths the frames that both have count."""

    lpips: bool
    published: bool | None
    cut_longer: bool
    limits: Limits


@dataclass(frozen=True)
class Measured:
    """A clip's figures; faults in words; why it was not measured."""

    frames: int = 0
    height: int = 0
    width: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    why: str = ""


class Piece(NamedTuple):
    """rgb (1, 3, T, H, W) in [-1, 1] and alpha (1, 1, T, H, W) in [0, 1]."""

    rgb: Tensor
    alpha: Tensor

    @property
    def frames(self) -> int:
        return self.alpha.shape[2]

    @property
    def size(self) -> str:
        return f"{self.alpha.shape[4]}x{self.alpha.shape[3]}"

    def part(self, start: int, end: int) -> "Piece":
        return Piece(self.rgb[:, :, start:end], self.alpha[:, :, start:end])


# of a clip, in pieces: as a VAE gives it back, and the clip itself
Reconstruct = Callable[[Candidate, Stream, Limits], Iterator[tuple[Piece, Piece]]]


def measured(work: Work, choices: Choices, again: Reconstruct | None = None) -> Measured:
    """Measures a clip; why it cannot be is in the result. again: what makes the
    reconstruction of clips that go through a VAE."""
    if work.why:
        return Measured(why=work.why)
    try:
        with torch.no_grad():
            return _measured(work, choices, again)
    except ValueError as error:  # of the file, its guide, or frames that are too small
        return Measured(why=printable(error))


def _measured(work: Work, choices: Choices, again: Reconstruct | None) -> Measured:
    stream = opened(work.candidate, choices.limits)
    true = None if work.reference is None else opened(work.reference, choices.limits)
    published = stream.frames == 1 if choices.published is None else choices.published
    guide = {} if work.through else guide_of(work.candidate)
    against = true is not None or work.through
    measure = Measures(against, choices.lpips, published, bool(guide))
    frames, last = 0, None
    if work.through:
        assert again is not None
        pieces = again(work.candidate, stream, choices.limits)
    else:
        pieces = _pieces(work, stream, true, choices.cut_longer)
    for piece, other in pieces:
        ellipses = _ellipses(guide, stream.frames, piece, frames) if guide else None
        measure.add(piece, other, ellipses, goes_on=frames > 0)
        frames, last = frames + piece.frames, piece
    if last is None:
        raise MediaError(f"{work.candidate.files[0]}: no frame could be decoded")
    figures = measure.figures()
    height, width = last.alpha.shape[3:]
    return Measured(frames, height, width, figures, tuple(named(figures)))


class Measures:
    """The metrics of one clip. against: whether there is a true one; guided: a guide."""

    def __init__(self, against: bool, lpips: bool, published: bool, guided: bool) -> None:
        self.looks, self.moving = AlphaLooks(), AlphaMotion()
        self.guided = [GuideAdherence()] if guided else []
        self.pairs = [PaletteQuality(lpips)] if against else []
        self.published = [PublishedComposites(lpips)] if against and published else []
        self.mattes = [MattingErrors(normalised=True), TemporalErrors()] if against else []
        self.faults = [Faults()] if against else []

    def add(self, piece: Piece, true: Piece | None, guide: Tensor | None, goes_on: bool) -> None:
        """Adds a piece of the clip, the first one of which does not go on."""
        self.looks.update(*piece)
        self.moving.update(*piece, goes_on=goes_on)
        for metric in self.guided if guide is not None else ():
            metric.update(piece.alpha, guide)
        if true is None:
            return
        for metric in (*self.pairs, *self.published):
            metric.update(*piece, *true)
        for metric in self.mattes:
            metric.update(piece.alpha, true.alpha, goes_on=goes_on)
        for metric in self.faults:
            metric.update(*piece, *true, goes_on=goes_on)

    def figures(self) -> dict[str, float]:
        """Returns all of them by name."""
        metrics = (
            *self.pairs, *self.published, *self.mattes, *self.faults, self.looks, self.moving,
            *self.guided,
        )  # fmt: skip
        return {
            name: float(value) for metric in metrics for name, value in metric.compute().items()
        }


def _pieces(
    work: Work, stream: Stream, true: Stream | None, cut_longer: bool
) -> Iterator[tuple[Piece, Piece | None]]:
    """Yields pieces of the clip and of the true one. Raises MediaError where size or length
    differ."""
    pieces = _read(work.candidate, stream)
    if true is None or work.reference is None:
        yield from ((piece, None) for piece in pieces)
        return
    others = _read(work.reference, true)
    while True:
        piece, other = next(pieces, None), next(others, None)
        if piece is None or other is None or piece.frames != other.frames:
            break
        if piece.size != other.size:
            raise MediaError(
                f"is {piece.size}, and its reference {work.reference.files[0]} {other.size}; a "
                "pair has one size. Scale or crop one of them."
            )
        yield piece, other
    if piece is None and other is None:
        return
    if not cut_longer:
        lengths = [_length(stream, pieces), _length(true, others)]
        raise MediaError(
            f"has {lengths[0]} frames, and its reference {work.reference.files[0]} {lengths[1]}; a "
            "pair has one length. Cut the longer one, or give cut_longer=true: the first "
            f"{min(lengths)} of both count then."
        )
    if piece is not None and other is not None:
        frames = min(piece.frames, other.frames)
        yield piece.part(0, frames), other.part(0, frames)


def _length(stream: Stream, pieces: Iterator[Piece]) -> int:
    """Returns how many pictures there are, once the others are read, too."""
    for _ in pieces:
        continue
    return stream.held


def _read(candidate: Candidate, stream: Stream) -> Iterator[Piece]:
    """Yields the clip in pieces of straight color. Raises MediaError where its size changes."""
    pictures, shape = iter(stream), None
    while held := list(islice(pictures, PIECE)):
        shape = shape or held[0].shape
        if any(picture.shape != shape for picture in held):
            raise MediaError(
                f"{candidate.files[0]}: the size changes between frames; split it where it does"
            )
        yield piece_of(held, stream)


def piece_of(pictures: Sequence[Frames], stream: Stream) -> Piece:
    """Returns pictures, uint8 (H, W, 4), of straight color."""
    unit = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None].float() / 255
    rgb, alpha = unit[:, :3] * 2 - 1, unit[:, 3:]
    return Piece(unpremultiply(rgb, alpha) if stream.premultiplied else rgb, alpha)


def guide_of(candidate: Candidate) -> dict[str, Any]:
    """Returns the ellipse that the JSON beside a clip gives as its guide; nothing without one."""
    said = said_of(candidate).get("guide")
    if not isinstance(said, dict):
        return {}
    found = {name: said[name] for name in PATH if said.get(name) is not None}
    for name, value in found.items():
        numbers = [value] if "angle" in name else value
        right = isinstance(numbers, list) and len(numbers) == (1 if "angle" in name else 2)
        if not right or not all(isinstance(number, int | float) for number in numbers):
            raise MediaError(
                f"{candidate.files[0]}: the JSON beside it says guide.{name}={value}; that is "
                f"{'an angle' if 'angle' in name else 'two numbers'}. Correct it or leave it out."
            )
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def _ellipses(guide: Mapping[str, Any], frames: int, piece: Piece, start: int) -> Tensor:
    """Returns the guide's ellipses in pixels of the piece's frames, (T, 5)."""
    from acetate.sampling import EllipsePath  # seconds to import, and few clips have a guide

    path = EllipsePath(**guide).ellipses(max(frames, 1), *piece.alpha.shape[3:])[0]
    places = torch.arange(start, start + piece.frames).clamp_max(len(path) - 1)
    return path[places]
