"""PNG's chunks: what a file states, and APNG composed from them.

What PIL's blending (12.0, 13.0) leaves of soft alpha over anything is wrong: it mixes alpha like a
colour, so that 128 over nothing becomes 64; and it cuts 16 bits down to 8.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from acetate.media.color import Stated

LARGEST_PROFILE = 2**24  # bytes of an ICC profile
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TO_BACKGROUND, TO_PREVIOUS = 1, 2  # dispose_op
OVER = 1  # blend_op
Unit = NDArray[np.float32]


class Header(NamedTuple):
    """A PNG's statements before its pixels. exif: as in the file; density: pixels a unit, across
    and down."""

    width: int
    height: int
    bits: int
    color_type: int  # 0 grey, 2 colour, 3 palette, 4 grey with alpha, 6 colour with alpha
    transparent: bytes | None  # tRNS
    animated: bool
    stated: Stated
    exif: bytes
    density: tuple[int, int]


def png_header(data: bytes) -> Header:
    """Reads the whole file, for its checksums: ValueError where one is wrong. Of several ways to
    state colour the order is cICP, iCCP, sRGB, then gAMA and cHRM (PNG, third edition, 4.3)."""
    parts: dict[bytes, bytes] = {}
    for kind, contents in chunks(data):
        parts.setdefault(kind, contents)
    if b"IHDR" not in parts or b"IDAT" not in parts:
        raise ValueError("no picture in it")
    width, height, bits, color_type = struct.unpack_from(">IIBB", parts[b"IHDR"])
    density = struct.unpack_from(">II", parts.get(b"pHYs", b"").ljust(8, b"\0"))
    return Header(
        width, height, bits, color_type, parts.get(b"tRNS"), b"acTL" in parts, _stated(parts),
        parts.get(b"eXIf", b""), density,
    )  # fmt: skip


def _stated(parts: dict[bytes, bytes]) -> Stated:
    if len(parts.get(b"cICP", b"")) == 4:
        primaries, transfer, _, full = parts[b"cICP"]
        return Stated(primaries=primaries, transfer=transfer, narrow=full == 0)
    if b"iCCP" in parts:
        packed = parts[b"iCCP"].partition(b"\0")[2][1:]
        try:
            return Stated(icc=zlib.decompressobj().decompress(packed, LARGEST_PROFILE))
        except zlib.error:
            return Stated(icc=b"")
    if b"sRGB" in parts:
        return Stated()
    places = None
    if len(parts.get(b"cHRM", b"")) == 32:
        white, *rest = zip(*[iter(struct.unpack(">8I", parts[b"cHRM"]))] * 2, strict=True)
        places = tuple(value / 100_000 for pair in (*rest, white) for value in pair)
    coded = int.from_bytes(parts.get(b"gAMA", b""), "big")
    return Stated(chromaticities=places, gamma=100_000 / coded if coded else None)


class Control(NamedTuple):
    """A frame's fcTL chunk (PNG specification, third edition, 11.3.6.2), behind its sequence
    number."""

    width: int
    height: int
    x: int
    y: int
    delay: int  # seconds, as a fraction
    denominator: int  # 0 means 100
    dispose: int
    blend: int

    @property
    def milliseconds(self) -> float:
        return 1000 * self.delay / (self.denominator or 100)


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields kind and contents, in order. Raises ValueError where a checksum is wrong or the file
    is cut off before IEND."""
    at, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ValueError("the file is cut off")
        (length,) = struct.unpack_from(">I", data, at)
        kind, contents = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if data[at + 8 + length : at + 12 + length] != struct.pack(
            ">I", zlib.crc32(kind + contents)
        ):
            raise ValueError(f"the checksum of chunk {kind!r} is wrong")
        yield kind, contents
        at += 12 + length


def composed(data: bytes, decode: Callable[[bytes], Unit]) -> Iterator[tuple[Unit, float]]:
    """Yields what an APNG shows, (H, W, 4) in [0, 1], and for how many milliseconds.

    decode: a PNG file as (h, w, 4). ValueError for damage and for a frame that does not lie inside
    of the picture.
    """
    header = next(contents for kind, contents in chunks(data) if kind == b"IHDR")
    width, height = struct.unpack_from(">II", header)
    canvas = np.zeros((height, width, 4), np.float32)
    for control, file in _frames(data, header):
        x, y = control.x, control.y
        if x + control.width > width or y + control.height > height:
            raise ValueError(
                f"a frame of {control.width}x{control.height} at {x}, {y} in {width}x{height}"
            )
        before = canvas.copy()
        region = canvas[y : y + control.height, x : x + control.width]
        picture = decode(file)
        region[:] = _over(picture, region) if control.blend == OVER else picture
        yield canvas.copy(), control.milliseconds
        if control.dispose == TO_BACKGROUND:
            region[:] = 0
        elif control.dispose == TO_PREVIOUS:
            canvas = before


def _frames(data: bytes, header: bytes) -> Iterator[tuple[Control, bytes]]:
    """Yields each frame as a PNG file of its own. The default image is one of them only if it has a
    control chunk before it."""
    shared: list[tuple[bytes, bytes]] = []  # palette and its transparency
    control: Control | None = None
    body = b""
    for kind, contents in chunks(data):
        if kind in (b"fcTL", b"IEND"):
            if control is not None and body:
                size = struct.pack(">II", control.width, control.height)
                yield (
                    control,
                    _file([(b"IHDR", size + header[8:]), *shared, (b"IDAT", body), (b"IEND", b"")]),
                )
            control = (
                Control(*struct.unpack_from(">4I2H2B", contents, 4)) if kind == b"fcTL" else None
            )
            body = b""
        elif kind in (b"IDAT", b"fdAT"):
            body += contents if kind == b"IDAT" else contents[4:]
        elif kind in (b"PLTE", b"tRNS"):
            shared.append((kind, contents))


def _file(parts: list[tuple[bytes, bytes]]) -> bytes:
    return SIGNATURE + b"".join(
        struct.pack(">I", len(contents))
        + kind
        + contents
        + struct.pack(">I", zlib.crc32(kind + contents))
        for kind, contents in parts
    )


def _over(top: Unit, below: Unit) -> Unit:
    """Computes Porter and Duff 1984 for straight colour."""
    kept = below[..., 3:] * (1 - top[..., 3:])
    alpha = top[..., 3:] + kept
    color = (top[..., :3] * top[..., 3:] + below[..., :3] * kept) / np.where(alpha > 0, alpha, 1)
    return np.concatenate((color, alpha), axis=-1).astype(np.float32)
