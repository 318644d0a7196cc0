"""Reads what a film states of its pictures, by its container, its packets and its first frame."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from acetate.media.clip import MediaError
from acetate.media.color import UNSPECIFIED, Stated, conversion, stated_or
from acetate.media.containers import crop_of
from acetate.media.placement import Placement, aspect_of, turned_by

# What a file may be, whatever its suffix says: no playlists, which could name other files and
# hosts.
OPEN = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "file",
}
# FFmpeg's own vp8 and vp9 decoders drop the alpha plane without a word.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
BT709, BT601 = 1, 6  # numbers of matrices in H.273


@dataclass(frozen=True)
class Shown:
    """When pictures appear, by the packets alone. starts: rising seconds, or empty where the file
    does not say for all of them. count: of packets that show a picture."""

    starts: NDArray[np.float64]
    count: int


class Facts(NamedTuple):
    """A file's statements about all its pictures."""

    placement: Placement
    stated: Stated


def opened(path: Path) -> av.container.InputContainer:
    container = av.open(f"file:{path}", "r", options=OPEN)
    if not container.streams.video:
        container.close()
        raise MediaError(f"{path}: holds no video")
    return container


def facts_of(path: Path, stream: av.VideoStream, frame: av.VideoFrame) -> Facts:
    """Gathers what a film says. frame: the first. Other decoders than FFmpeg's own do not hand on
    what the container says of placement; its own first frame has that."""
    if stream.codec_context.name in (*ALPHA_DECODERS, "hevc"):
        with suppress(StopIteration, FFmpegError), opened(path) as container:
            frame = next(container.decode(container.streams.video[0]))
    sides = _side_data(frame)
    turns, mirrored = turned_by(sides.get(SideData.DISPLAYMATRIX))
    codec, ratio = stream.codec_context, stream.sample_aspect_ratio
    crop = crop_of(path, frame.width, frame.height)
    aspect = aspect_of(float(ratio) if ratio else None)
    stated = Stated(
        sides.get(SideData.ICC_PROFILE), int(codec.color_primaries), int(codec.color_trc)
    )
    return Facts(Placement(crop, aspect, mirrored, turns), stated)


def _side_data(frame: av.VideoFrame) -> dict[SideData, bytes]:
    return {data.type: bytes(data) for data in frame.side_data}


def of_frame(frame: av.VideoFrame) -> Stated:
    return Stated(primaries=int(frame.color_primaries), transfer=int(frame.color_trc))


def name_matrix(frame: av.VideoFrame, stream: av.VideoStream) -> None:
    """Takes the container's word where the stream has none, and before VP8's, which knows no
    matrix but BT.601's. What nobody names is BT.601 up to 576 lines and BT.709 above, as players
    take it."""
    if frame.format.is_rgb:
        return
    codec = stream.codec_context
    if codec.colorspace != UNSPECIFIED and (frame.colorspace == UNSPECIFIED or codec.name == "vp8"):
        frame.colorspace = codec.colorspace
    if frame.colorspace == UNSPECIFIED:
        frame.colorspace = BT709 if frame.height > 576 or frame.width > 1024 else BT601
    if frame.color_range == ColorRange.UNSPECIFIED:
        frame.color_range = codec.color_range


def packets_of(container: av.container.InputContainer, stream: av.VideoStream) -> Shown:
    base = stream.time_base
    times, count = [], 0
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard or _hidden(packet, stream):
            continue
        count += 1
        if packet.pts is not None and base is not None:
            times.append(float(packet.pts * base))
    starts = np.sort(np.array(times))
    known = len(starts) == count and bool((np.diff(starts) > 0).all())
    return Shown(starts if known else np.empty(0), count)


def _hidden(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Tells whether a packet only holds a picture that others refer to (VP8: RFC 6386, 9.1)."""
    return stream.codec_context.name == "vp8" and not bytes(packet)[0] >> 4 & 1


def what_is_done(frame: av.VideoFrame, facts: Facts) -> list[str]:
    notes = []
    if frame.interlaced_frame:
        notes.append("interlaced: its fields are left woven together")
    change = conversion(stated_or(of_frame(frame), facts.stated))
    return notes if change is None else [*notes, change.note]


def ends_early(
    container: av.container.InputContainer, stream: av.VideoStream, shown: Shown
) -> str | None:
    """Says so, in words, where the pictures end well before the file says that they do."""
    said = {name.lower(): value for name, value in stream.metadata.items()}.get("duration", "")
    alone = all(other.type == "video" for other in container.streams)
    if re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", said):
        hours, minutes, seconds = said.split(":")
        length = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    elif alone and container.duration:
        length = container.duration / av.time_base
    else:
        return None
    if len(shown.starts) < 2:
        return None
    usual = float(np.median(np.diff(shown.starts)))
    end = float(shown.starts[-1]) + usual
    if end + max(3 * usual, 0.05 * length) >= length:
        return None
    return (
        f"the file says it lasts {length:.2f} s, and its pictures end at {end:.2f} s: it is cut off"
    )
