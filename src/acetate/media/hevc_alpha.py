"""HEVC with alpha, as Apple writes it: a second layer in the same stream, which FFmpeg's decoder
skips in silence.

The alpha layer depends on no other (Apple, "HEVC Video with Alpha Interoperability Profile"), so
that its NAL units, once they say layer 0, are an HEVC stream of their own, whose luma is alpha.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.reformatter import ColorRange

PARAMETER_SETS = (32, 33, 34)  # video, sequence and picture
SEI = 39
ALPHA_CHANNEL_INFORMATION = 165
START = b"\0\0\0\1"
PLANES = {"yuv420p": ("yuva420p", 8), "yuvj420p": ("yuva420p", 8), "yuv420p10le": ("yuva420p10le",
    10),
          "yuv422p": ("yuva422p", 8), "yuv444p": ("yuva444p", 8), "yuv444p10le": ("yuva444p10le",
          10)}  # fmt: skip


class AlphaLayer:
    """The alpha of one HEVC stream. premultiplied: what its SEI message claims; None if it says
    nothing."""

    def __init__(self, sets: list[bytes], length_size: int, premultiplied: bool | None):
        self.sets, self.length_size, self.premultiplied = sets, length_size, premultiplied

    @classmethod
    def of(cls, path: Path, stream: av.VideoStream) -> "AlphaLayer | None":
        """Returns the layer; None for another codec, or for HEVC without a second layer in its
        first picture."""
        extra = stream.codec_context.extradata
        if stream.codec_context.name != "hevc" or not extra or len(extra) < 23 or extra[0] != 1:
            return None
        length_size = (extra[21] & 3) + 1
        with av.open(f"file:{path}", "r") as container:
            packet = next(container.demux(container.streams.video[0]))
            units = list(_units(bytes(packet), length_size))
        if not any(_layer(unit) for unit in units):
            return None
        sets = [*_hvcc(bytes(extra), 22), *_lhvc(path)]
        sei = [unit for unit in (*sets, *units) if _type(unit) == SEI]
        return cls(
            [s for s in sets if _type(s) in PARAMETER_SETS], length_size, _premultiplied(sei)
        )

    def frames(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[av.VideoFrame]:
        """Yields colour with its alpha as one more plane."""
        alpha_decoder = cast(av.VideoCodecContext, av.CodecContext.create("hevc", "r"))
        alpha_decoder.thread_count = 1
        head = b"".join(START + _as_base(unit) for unit in self._alpha_sets())
        colors: list[av.VideoFrame] = []
        alphas: list[av.VideoFrame] = []
        for packet in container.demux(stream):
            units = [
                START + _as_base(u)
                for u in _units(bytes(packet), self.length_size)
                if _layer(u) == 1
            ]
            if units:
                mine = av.Packet(head + b"".join(units))
                mine.pts, mine.dts, mine.time_base = packet.pts, packet.dts, packet.time_base
                alphas += alpha_decoder.decode(mine)
                head = b""
            colors += stream.codec_context.decode(packet)
            if not packet.size:
                alphas += alpha_decoder.decode(None)
            while colors and alphas:
                yield with_alpha(colors.pop(0), alphas.pop(0))
        if colors or alphas:
            raise ValueError(
                f"{len(colors)} pictures too many in one of its layers, colour and alpha"
            )

    def _alpha_sets(self) -> list[bytes]:
        """Returns layer 1's parameter sets, and layer 0's video parameter set."""
        return [
            s
            for s in self.sets
            if _layer(s) == 1 or (_type(s) == PARAMETER_SETS[0] and _layer(s) == 0)
        ]


def with_alpha(color: av.VideoFrame, alpha: av.VideoFrame) -> av.VideoFrame:
    """Returns a frame with the colour's planes and the luma of `alpha`, in full range, as the
    fourth."""
    if color.format.name not in PLANES or (color.width, color.height) != (
        alpha.width,
        alpha.height,
    ):
        raise ValueError(
            f"colour is {color.width}x{color.height} {color.format.name}, alpha "
            f"{alpha.width}x{alpha.height}; layers have one size, 4:2:0 or 4:4:4, and 8 or 10 bits"
        )
    pixels, bits = PLANES[color.format.name]
    frame = av.VideoFrame(color.width, color.height, pixels)
    for theirs, mine in zip(color.planes, frame.planes, strict=False):
        _rows(mine, bits)[:, : theirs.width] = _rows(theirs, bits)[: mine.height, : mine.width]
    depth = alpha.format.components[0].bits
    values = _rows(alpha.planes[0], depth)[:, : alpha.width].astype(np.float32) / 2 ** (depth - 8)
    full = alpha.color_range == ColorRange.JPEG or alpha.format.name.startswith(("yuvj", "gray"))
    unit = values / 255 if full else (values - 16) / 219
    _rows(frame.planes[3], bits)[:, : frame.width] = np.rint(unit.clip(0, 1) * (2**bits - 1))
    frame.pts, frame.time_base = color.pts, color.time_base
    frame.colorspace, frame.color_range = color.colorspace, color.color_range
    frame.color_primaries, frame.color_trc = color.color_primaries, color.color_trc
    return frame


def _rows(plane: av.video.plane.VideoPlane, bits: int) -> np.ndarray:
    values = np.frombuffer(plane, np.uint8 if bits == 8 else np.uint16)
    return values.reshape(-1, plane.line_size // values.itemsize)[: plane.height]


def _units(data: bytes, length_size: int) -> Iterator[bytes]:
    """Yields NAL units, each behind its length; what a damaged length cuts off is left to the
    decoder to miss."""
    at = 0
    while at + length_size < len(data):
        length = int.from_bytes(data[at : at + length_size], "big")
        at += length_size
        if length >= 2:
            yield data[at : at + length]
        at += length


def _type(unit: bytes) -> int:
    return unit[0] >> 1 & 63


def _layer(unit: bytes) -> int:
    return (unit[0] & 1) << 5 | unit[1] >> 3


def _as_base(unit: bytes) -> bytes:
    return bytes((unit[0] & 0xFE, unit[1] & 7)) + unit[2:]


def _hvcc(record: bytes, at: int) -> list[bytes]:
    """Returns the NAL units of a decoder configuration record whose number of arrays stands at `at`
    (ISO 14496-15, 8.3.3)."""
    units, arrays, at = [], record[at], at + 1
    for _ in range(arrays):
        count, at = int.from_bytes(record[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            length = int.from_bytes(record[at : at + 2], "big")
            units.append(record[at + 2 : at + 2 + length])
            at += 2 + length
    return [unit for unit in units if len(unit) > 2]


def _lhvc(path: Path) -> list[bytes]:
    """Returns the parameter sets of the further layers: a box beside hvcC (ISO 14496-15, 9.6.3),
    which FFmpeg does not hand out."""
    data = path.read_bytes()
    at = data.find(b"lhvC")
    return _hvcc(data[at + 4 : at + int.from_bytes(data[at - 4 : at], "big")], 5) if at > 4 else []


def _premultiplied(sei: list[bytes]) -> bool | None:
    """Reads alpha_channel_use_idc, ITU-T H.265 F.14.3.8: 0: colour is to be multiplied by alpha; 1:
    it has been."""
    for unit in sei:
        if len(unit) > 4 and unit[2] == ALPHA_CHANNEL_INFORMATION and not unit[4] & 0x80:
            return {0: False, 1: True}.get(unit[4] >> 4 & 7)
    return None
