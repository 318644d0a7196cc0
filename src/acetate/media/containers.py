"""Reads what stands in a container beside its packets: crops that FFmpeg's decoders do not apply,
and whether the file ends early."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from acetate.media.clip import Rect

EBML, SEGMENT, TRACKS, TRACK, VIDEO = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0xE0
CROPS = {0x54CC: "left", 0x54BB: "top", 0x54DD: "right", 0x54AA: "bottom"}  # RFC 9559, 5.1.4.1.28
CLAP = b"\0\0\0\x28clap"  # a box' size and name
LARGEST_HEADER = 2**26  # bytes of an ISO file's header that are searched
ISO_FAMILIES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
MOST_BOXES = 10_000


class Box(NamedTuple):
    """A box of a file of boxes within boxes. start: of its contents; end: where it says that they
    end."""

    kind: bytes | int
    start: int
    end: int


def missing_bytes(path: Path) -> int:
    """Counts the bytes that a file is shorter than it says: RIFF (AVI, WebP), ISO media (MOV, MP4,
    AVIF) and Matroska. 0 for others."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            return max(0, 8 + struct.unpack("<I", head[4:8])[0] - size)
        if head[4:8] in ISO_FAMILIES:
            ends = [box.end for box in _iso(file, 0, size)]
        elif head[:4] == EBML.to_bytes(4, "big"):
            ends = [box.end for box in _ebml(file, 0, size) if box.kind in (EBML, SEGMENT)]
        else:
            ends = []
    return max(0, max(ends, default=0) - size)


def crop_of(path: Path, width: int, height: int) -> Rect | None:
    """Returns the part of the first video track's stored pixels that is to be shown: Matroska's
    PixelCrop, ISO media's clean aperture. None for all of them, and for what lies outside of
    them."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == EBML.to_bytes(4, "big"):
            left, top, right, bottom = _pixel_crop(file, size)
        elif head[4:8] in ISO_FAMILIES:
            left, top, right, bottom = _clean_aperture(file, size, width, height)
        else:
            return None
    rect = (left, top, width - left - right, height - top - bottom)
    if not any((left, top, right, bottom)) or min(*rect[:2], rect[2] - 1, rect[3] - 1) < 0:
        return None
    return rect


def _pixel_crop(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    for segment in _ebml(file, 0, size):
        if segment.kind != SEGMENT:
            continue
        tracks = (box for box in _ebml(file, segment.start, size) if box.kind == TRACKS)
        for track in _ebml_in(file, next(tracks, None), TRACK):
            for video in _ebml_in(file, track, VIDEO):
                found = dict.fromkeys(CROPS.values(), 0)
                for box in _ebml(file, video.start, video.end):
                    if box.kind in CROPS:
                        file.seek(box.start)
                        value = file.read(min(box.end - box.start, 8))
                        found[CROPS[box.kind]] = int.from_bytes(value, "big")
                return found["left"], found["top"], found["right"], found["bottom"]
    return 0, 0, 0, 0


def _clean_aperture(
    file: BinaryIO, size: int, width: int, height: int
) -> tuple[int, int, int, int]:
    """Reads the size of the aperture, and how far its middle is off the picture's: ISO 14496-12,
    12.1.4.2."""
    for box in _iso(file, 0, size):
        if box.kind not in (b"moov", b"meta"):
            continue
        file.seek(box.start)
        header = file.read(min(box.end - box.start, LARGEST_HEADER))
        place = header.find(CLAP)
        if place < 0 or place + 40 > len(header):
            return 0, 0, 0, 0
        numbers = struct.unpack_from(">8i", header, place + len(CLAP))
        if any(below <= 0 for below in numbers[1::2]):
            return 0, 0, 0, 0
        wide, high, across, down = (numbers[i] / numbers[i + 1] for i in (0, 2, 4, 6))
        left, top = round((width - wide) / 2 + across), round((height - high) / 2 + down)
        return left, top, width - left - round(wide), height - top - round(high)
    return 0, 0, 0, 0


def _iso(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """Yields the boxes of ISO 14496-12, 4.2. A box of size 0 goes on to the end."""
    for _ in range(MOST_BOXES):
        if start + 8 > end:
            return
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            size, head = int.from_bytes(file.read(8), "big"), 16
        size = size or end - start
        if size < head:
            return
        yield Box(kind, start + head, start + size)
        start += size


def _ebml(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """Yields the elements of RFC 8794. An element of unknown size goes on to the end."""
    for _ in range(MOST_BOXES):
        if start >= end:
            return
        file.seek(start)
        kind, length = _number(file, keep_marker=True), _number(file, keep_marker=False)
        if kind is None or length is None:
            return
        begin = file.tell()
        unknown = length[0] == 2 ** (7 * length[1]) - 1
        yield Box(kind[0], begin, end if unknown else begin + length[0])
        start = end if unknown else begin + length[0]


def _ebml_in(file: BinaryIO, box: Box | None, kind: int) -> Iterator[Box]:
    if box is not None:
        yield from (inner for inner in _ebml(file, box.start, box.end) if inner.kind == kind)


def _number(file: BinaryIO, keep_marker: bool) -> tuple[int, int] | None:
    """Reads a number of variable length, and that length; None at the end of the file."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    data = first + file.read(length - 1)
    value = int.from_bytes(data, "big")
    return (value if keep_marker else value & (2 ** (7 * length) - 1)), length
