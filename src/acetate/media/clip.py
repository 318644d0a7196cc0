"""Clips, descriptions, limits and errors, which every reader gives and raises."""

import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Frames = NDArray[np.uint8]
Rect = tuple[int, int, int, int]  # x, y, width, height in pixels

# Every way in which FFmpeg and PIL report a damaged file.
DECODER_ERRORS = (
    FFmpegError, OSError, SyntaxError, ValueError, TypeError, ArithmeticError, IndexError, KeyError,
    AttributeError,
    EOFError, StopIteration, RuntimeError, NotImplementedError, Image.DecompressionBombError,
    struct.error, zlib.error,
)  # fmt: skip


class MediaError(ValueError):
    """A file that cannot be read as RGBA; the text names the file, what is wrong and the way
    out."""


@dataclass(frozen=True)
class RGBAClip:
    """frames: uint8 (T, H, W, 4). fps: None for stills and sequences. premultiplied: None if not
    defined.

    notes: what was done to the file's pictures on the way, in words.
    """

    frames: Frames
    fps: float | None
    lossy: bool
    premultiplied: bool | None
    notes: tuple[str, ...] = ()


class Asked(NamedTuple):
    """A person's word about a file, before its own. premultiplied: of colour in linear light;
    layer: of an OpenEXR file."""

    premultiplied: bool | None = None
    layer: str | None = None


AS_STATED = Asked()


@dataclass
class Stream:
    """A clip that is decoded while it is iterated over, once. pictures: uint8 (H, W, C) each.

    frames: how many there are by the headers. Once all pictures have been given, `held` is how
    many there were, `shape` that of the last one, and notes are complete.
    """

    pictures: Iterator[Frames]
    frames: int
    fps: float | None
    lossy: bool
    premultiplied: bool | None
    notes: list[str]
    held: int = 0
    shape: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Frames]:
        for picture in self.pictures:
            self.held += 1
            self.shape = picture.shape
            yield picture

    def collected(self, name: object, limits: "Limits") -> RGBAClip:
        """Reads all of it. Raises MediaError where it takes more memory than the limits allow."""

        def within() -> Iterator[Frames]:
            for picture in self:
                if self.held == 1:
                    limits.check_memory(name, self.frames, picture.nbytes)
                elif self.held > self.frames:
                    limits.check_memory(name, self.held, picture.nbytes)
                yield picture

        frames = joined(name, within(), self.frames)
        return RGBAClip(frames, self.fps, self.lossy, self.premultiplied, tuple(self.notes))


def stream_of(clip: RGBAClip) -> Stream:
    """Returns a stream of a clip that is in memory."""
    frames = iter(clip.frames)
    return Stream(
        frames, len(clip.frames), clip.fps, clip.lossy, clip.premultiplied, list(clip.notes)
    )


@dataclass(frozen=True)
class Description:
    """The statements of a file's headers; nothing but a first frame is decoded.

    lost: why the alpha that an opaque file has nevertheless cannot be read, and the way out.
    divided: whether reading divides its colour by alpha, in linear light; None where nothing says
    that colour is multiplied.
    """

    frames: int
    width: int
    height: int
    lossy: bool
    alpha: bool
    lost: str | None = None
    divided: bool | None = None


@dataclass(frozen=True)
class Limits:
    """Bounds beyond which a file is refused from its headers, before anything is decoded."""

    max_pixels: int = 2**26  # of one picture: 8192 x 8192
    max_frames: int = 100_000
    max_bytes: int = 2**34  # of the decoded clip, where it is held in memory whole
    # bytes of memory_gb, a setting of the program, for each byte of it; None: there is no such
    memory_per_byte: float | None = None

    def check(self, name: object, frames: int, width: int, height: int) -> None:
        """Raises MediaError if a file announces more, or no picture at all; of memory,
        `check_memory`."""
        size = f"{name}: {frames} frames of {width}x{height}"
        if frames < 1 or width < 1 or height < 1:
            raise MediaError(f"{size}; the file is empty or damaged")
        if width * height > self.max_pixels:
            raise MediaError(
                f"{size}; a picture has at most max_pixels={self.max_pixels}. Scale it or raise "
                "max_pixels"
            )
        if frames > self.max_frames:
            raise MediaError(
                f"{size}; a clip has at most max_frames={self.max_frames}. Cut it or raise "
                "max_frames"
            )

    def check_memory(self, name: object, frames: int, bytes_per_frame: int) -> None:
        """Raises MediaError if what is kept of the decoded frames is more."""
        if frames * bytes_per_frame > self.max_bytes:
            way_out = "allow more memory"
            if self.memory_per_byte is not None:
                needed = frames * bytes_per_frame * self.memory_per_byte / 2**30
                way_out = f"raise memory_gb to {math.ceil(10 * needed) / 10:g}"
            raise MediaError(
                f"{name}: {frames} frames are {frames * bytes_per_frame / 2**30:.2f} GiB decoded; "
                f"the limit is {self.max_bytes / 2**30:.2f} GiB. Cut or scale it, or {way_out}"
            )


LIMITS = Limits()


def joined(name: object, frames: Iterable[Frames], expected: int) -> Frames:
    """Returns the frames as one array, (T, ...), which is filled as they come, so that the clip is
    not held twice.

    expected: how many there probably are. Raises MediaError if there is none, or if their sizes
    differ.
    """
    whole, count = np.empty(0, np.uint8), 0
    for frame in frames:
        if count == 0:
            whole = np.empty((max(expected, 1), *frame.shape), np.uint8)
        if frame.shape != whole.shape[1:]:
            raise MediaError(
                f"{name}: the size changes between frames; split the file where it does"
            )
        if count == len(whole):
            whole = np.concatenate((whole, np.empty((1 + count // 2, *frame.shape), np.uint8)))
        whole[count] = frame
        count += 1
    if count == 0:
        raise MediaError(f"{name}: no frame could be decoded; the file is empty or damaged")
    return whole[:count]


def to_uint8(unit: NDArray[np.float32]) -> Frames:
    """Scales [0, 1] to 0..255, rounded; what is not a number becomes 0."""
    return (np.nan_to_num(unit).clip(0, 1) * 255 + 0.5).astype(np.uint8)


@contextmanager
def decoding(name: object) -> Iterator[None]:
    """Turns a decoder's own errors into MediaError, each with the file's name."""
    try:
        yield
    except MediaError as error:
        if str(name) in str(error):
            raise
        raise MediaError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise MediaError(f"{name}: no such file") from error
    except MemoryError as error:
        raise MediaError(
            f"{name}: does not fit into memory; cut or scale it, or allow more memory"
        ) from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name}: cannot be decoded: its content is no picture that is read, whatever its name "
            "says; save it as PNG"
        ) from error
    except DECODER_ERRORS as error:
        raise MediaError(
            f"{name}: cannot be decoded; it is damaged, cut off, or of a kind that is not read "
            f"({type(error).__name__}: {error})"
        ) from error
