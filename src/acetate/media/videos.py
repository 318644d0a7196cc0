"""Films: QuickTime, MP4, WebM, Matroska, AVI. Frames come out upright, with square pixels, at a
constant rate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)
from numpy.typing import NDArray
from PIL import Image

from acetate.media.clip import (
    LIMITS,
    Description,
    Frames,
    Limits,
    MediaError,
    RGBAClip,
    decoding,
    joined,
    to_uint8,
)
from acetate.media.frame_times import constant_rate
from acetate.media.hevc_alpha import AlphaLayer

VIDEOS = (".mov", ".webm", ".mkv", ".mp4", ".m4v", ".avi")
# What a file may be, whatever its suffix says: no playlists, which could name other files and
# hosts.
OPEN = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "file",
}
# FFmpeg's own vp8 and vp9 decoders drop the alpha plane without a word.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
LOSSLESS = {"ffv1", "png", "apng", "qtrle", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "magicyuv"}
HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
UNSPECIFIED = 2  # matrix, primaries or transfer that the file does not name
BT709, BT601, BT2020 = 1, 6, 9  # FFmpeg's numbers of colour matrices; of primaries too
WIDEST_PIXEL = 8  # an aspect ratio beyond this is damage
# Chroma of half the size is repeated, not interpolated: that would carry the colour under alpha 0
# into soft edges.
INTERPOLATION = Interpolation.BILINEAR
# One for all frames: what it needs for BT.2020's colours takes it three seconds to make.
SCALER = VideoReformatter()
NO_ALPHA = (
    "give its matte as NAME_fgr + NAME_pha, or its rectangles if colour and alpha are packed in "
    "one picture"
)

Channels = Callable[[av.VideoFrame], Frames]


@dataclass(frozen=True)
class Film:
    """frames: (T, ...), as `channels` made them."""

    frames: Frames
    fps: float | None
    lossy: bool
    notes: tuple[str, ...]


def read_video(path: Path, limits: Limits = LIMITS) -> RGBAClip:
    """Of every codec that gives an alpha plane, VP8, VP9 and HEVC with alpha among them. Raises
    MediaError."""

    def channels(frame: av.VideoFrame) -> Frames:
        if not has_alpha(frame.format):
            why = (
                describe_video(path, limits).lost
                or f"pixel format {frame.format.name} has no alpha; {NO_ALPHA}"
            )
            raise MediaError(f"{path}: {why}")
        return np.concatenate((colour(frame), _alpha(frame)[..., None]), axis=-1)

    film = read_film(path, channels, limits)
    return RGBAClip(film.frames, film.fps, film.lossy, None, film.notes)


def read_film(path: Path, channels: Channels, limits: Limits = LIMITS) -> Film:
    """channels: of a decoded frame, (H, W) or (H, W, C); it is called in the order in which frames
    are shown.

    Frames are turned as the file's rotation says; pixels that are not square are stretched, the
    longer side up. BT.2020's colours become BT.709's. Raises MediaError, also for PQ and HLG: their
    light has no one rendering in 8 bits.
    """
    with decoding(path), _open(path) as container:
        stream = container.streams.video[0]
        announced = _check_header(path, stream, limits)
        starts, notes = [], list[str]()
        alpha_layer = AlphaLayer.of(path, stream)

        def shown() -> Iterator[Frames]:
            for frame in _decoded(stream, container, alpha_layer):
                _check_frame(path, frame)
                picture = _upright(channels(frame), frame.rotation, _pixel_aspect(stream))
                starts.append(_seconds(frame, stream))
                limits.check(path, len(starts), frame.width, frame.height)
                limits.check_memory(path, max(len(starts), announced), picture.nbytes)
                if len(starts) == 1:
                    notes.extend(_what_is_done(frame, stream))
                yield picture

        clip = joined(path, shown(), announced)
        if stream.frames > len(clip):
            notes.append(
                f"the file announces {stream.frames} frames and holds {len(clip)}: it is cut off"
            )
        if alpha_layer is not None and alpha_layer.premultiplied:
            # not every encoder's user kept to that
            notes.append("it calls its colour premultiplied")
        fps, lossy = _rate(stream), stream.codec_context.name not in LOSSLESS
        tick = max(float(stream.time_base or 0), 1e-4)
    times = np.array([start for start in starts if start is not None])
    if len(times) == len(clip) > 1 and (np.diff(times) > 0).all():
        rate = constant_rate(path, times, None, tick, limits.max_frames)
        if rate.note is not None:
            limits.check_memory(path, len(rate.indices), clip[0].nbytes)
            return Film(clip[rate.indices], rate.fps, lossy, (*notes, rate.note))
        if fps is None or abs(fps * (times[-1] - times[0]) / (len(times) - 1) - 1) > 0.01:
            fps = rate.fps  # some headers give the clock's rate
    return Film(clip, fps, lossy, tuple(notes))


def describe_video(path: Path, limits: Limits = LIMITS) -> Description:
    """Decodes the first frame: only that tells whether VP8, VP9 and HEVC have alpha. MediaError if
    unreadable."""
    with decoding(path), _open(path) as container:
        stream = container.streams.video[0]
        _check_header(path, stream, limits)
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        limits.check(path, count, stream.codec_context.width, stream.codec_context.height)
        lossy = stream.codec_context.name not in LOSSLESS
    with decoding(path), _open(path) as container:
        stream = container.streams.video[0]
        frame = next(_decoded(stream, container, AlphaLayer.of(path, stream)))
        limits.check(path, count, frame.width, frame.height)
        upright = _upright(
            np.empty((frame.height, frame.width), np.uint8), frame.rotation, _pixel_aspect(stream)
        )
        alpha = has_alpha(frame.format)
        lost = None if alpha else _lost_alpha(container, stream)
        return Description(count, upright.shape[1], upright.shape[0], lossy, alpha, lost)


def colour(frame: av.VideoFrame) -> Frames:
    """(H, W, 3) in sRGB's primaries, by the frame's own matrix and range.

    A file that names no matrix means BT.601 up to 576 lines and BT.709 above, as players take it.
    """
    if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
        frame.colorspace = BT709 if frame.height > 576 or frame.width > 1024 else BT601
    wide = frame.color_primaries == ColorPrimaries.BT2020
    target = (
        {"dst_color_primaries": ColorPrimaries.BT709, "dst_color_trc": ColorTrc.BT709}
        if wide
        else {}
    )
    return cast(
        Frames,
        SCALER.reformat(
            frame, format="rgb24", interpolation=INTERPOLATION, threads=1, **target
        ).to_ndarray(),
    )


def luma(frame: av.VideoFrame) -> Frames:
    """(H, W), stretched to 0..255."""
    if frame.format.is_rgb:
        return np.ascontiguousarray(colour(frame)[..., 1])
    bits = frame.format.components[0].bits
    values = _plane(frame, 0, bits)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith(("yuvj", "gray"))
    if full:
        return to_uint8(values / (2**bits - 1))
    return to_uint8((values / 2 ** (bits - 8) - 16) / 219)


def has_alpha(pixels: av.VideoFormat | None) -> bool:
    return pixels is not None and any(component.is_alpha for component in pixels.components)


def _lost_alpha(container: av.container.InputContainer, stream: av.VideoStream) -> str | None:
    """Of a video whose frames have none: what its container says of alpha nevertheless."""
    codec = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1":
        return (
            f"its container announces alpha (AlphaMode), and the decoder of {codec.name} gives "
            "none; convert it from its source to VP9, ProRes 4444 or a PNG sequence"
        )
    tracks = [
        track
        for track in container.streams.video
        if not track.disposition & Disposition.attached_pic
    ]
    sizes = {(track.codec_context.width, track.codec_context.height) for track in tracks}
    if len(tracks) > 1 and len(sizes) == 1:
        return (
            f"{len(tracks)} video tracks of one size, none with alpha; if one is the alpha of "
            "another, make a pair of them: ffmpeg -i FILE -map 0:v:0 -c copy NAME_fgr.mp4 -map "
            "0:v:1 -c copy NAME_pha.mp4"
        )
    return None


def _alpha(frame: av.VideoFrame) -> Frames:
    """(H, W). Rounded from the plane itself: the scaler would cut 12 bits off to 8 and make 4080
    opaque."""
    component = frame.format.components[-1]
    if not frame.format.is_planar and component.bits > 8:
        return to_uint8(frame.to_ndarray(format="rgba64le")[..., 3] / np.float32(65535))
    if not frame.format.is_planar:
        return cast(Frames, frame.to_ndarray(format="rgba"))[..., 3]
    return to_uint8(_plane(frame, component.plane, component.bits) / (2**component.bits - 1))


def _plane(frame: av.VideoFrame, index: int, bits: int) -> NDArray[np.float32]:
    plane = frame.planes[index]
    values = np.frombuffer(memoryview(plane), np.uint8 if bits <= 8 else np.uint16)
    rows = values.reshape(-1, plane.line_size // values.itemsize)
    return rows[: frame.height, : frame.width].astype(np.float32)


def _open(path: Path) -> av.container.InputContainer:
    container = av.open(f"file:{path}", "r", options=OPEN)
    if not container.streams.video:
        container.close()
        raise MediaError(f"{path}: holds no video")
    return container


def _check_header(path: Path, stream: av.VideoStream, limits: Limits) -> int:
    """The number of frames, before anything is decoded; a header without it still has a duration
    and a rate."""
    codec, rate = stream.codec_context, _rate(stream)
    count = stream.frames
    if not count and rate and stream.duration and stream.time_base:
        count = int(stream.duration * stream.time_base * Fraction(rate).limit_denominator(10**6))
    limits.check(path, max(count, 1), codec.width, codec.height)
    return count


def _check_frame(path: Path, frame: av.VideoFrame) -> None:
    if frame.is_corrupt:
        raise MediaError(
            f"{path}: a damaged frame; the decoder had to make up parts of it. Repair or cut the "
            "file"
        )
    if frame.color_trc in HDR:
        name = HDR[ColorTrc(frame.color_trc)]
        raise MediaError(
            f"{path}: {name} (HDR) has no one rendering in 8 bits; tone-map it to BT.709 first, "
            "for example with ffmpeg -vf zscale=transfer=linear,tonemap,zscale=transfer=bt709"
        )


def _decoded(
    stream: av.VideoStream, container: av.container.InputContainer, alpha_layer: AlphaLayer | None
) -> Iterator[av.VideoFrame]:
    """With one thread: clips are read by several processes, whose threads would stand in each
    other's way."""
    stream.codec_context.thread_count = 1
    if alpha_layer is not None:
        yield from alpha_layer.frames(container, stream)
    elif stream.codec_context.name not in ALPHA_DECODERS:
        yield from container.decode(stream)
    else:
        decoder = cast(
            av.VideoCodecContext,
            av.CodecContext.create(ALPHA_DECODERS[stream.codec_context.name], "r"),
        )
        decoder.thread_count = 1
        for packet in container.demux(stream):
            yield from decoder.decode(packet)


def _seconds(frame: av.VideoFrame, stream: av.VideoStream) -> float | None:
    base = frame.time_base or stream.time_base
    return None if frame.pts is None or base is None else float(frame.pts * base)


def _pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width of a pixel by its height."""
    aspect = stream.sample_aspect_ratio
    return (
        Fraction(aspect) if aspect and 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL else Fraction(1)
    )


def _upright(picture: Frames, rotation: int, aspect: Fraction) -> Frames:
    """rotation: counterclockwise degrees, of which only quarter turns are known. Channels are
    stretched one by one."""
    if aspect != 1:
        height, width = picture.shape[:2]
        size = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
        planes = [picture] if picture.ndim == 2 else list(np.moveaxis(picture, -1, 0))
        planes = [
            np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))
            for plane in planes
        ]
        picture = planes[0] if picture.ndim == 2 else np.stack(planes, axis=-1)
    return np.rot90(picture, round(rotation / 90) % 4) if rotation else picture


def _what_is_done(frame: av.VideoFrame, stream: av.VideoStream) -> list[str]:
    notes = []
    if frame.interlaced_frame:
        notes.append("interlaced: its fields are left woven together")
    if frame.rotation:
        notes.append(f"turned by {frame.rotation} degrees, as the file says")
    aspect = _pixel_aspect(stream)
    if aspect != 1:
        notes.append(f"pixels of {aspect.numerator}:{aspect.denominator} made square")
    if frame.color_primaries == ColorPrimaries.BT2020:
        notes.append("BT.2020 colours brought into BT.709")
    return notes


def _rate(stream: av.VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None
