"""Films: QuickTime, MP4, WebM, Matroska, AVI. Frames come out upright, with square pixels, at a
constant rate."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray

from acetate.media.clip import (
    LIMITS,
    Description,
    Frames,
    Limits,
    MediaError,
    RGBAClip,
    Stream,
    decoding,
    to_uint8,
)
from acetate.media.color import Stated, conversion, stated_or
from acetate.media.containers import missing_bytes
from acetate.media.film_facts import (
    ALPHA_DECODERS,
    Facts,
    Shown,
    ends_early,
    facts_of,
    name_matrix,
    of_frame,
    opened,
    packets_of,
    what_is_done,
)
from acetate.media.frame_times import constant_rate
from acetate.media.hevc_alpha import AlphaLayer

VIDEOS = (".mov", ".webm", ".mkv", ".mp4", ".m4v", ".avi")
LOSSLESS = {"ffv1", "png", "apng", "qtrle", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "magicyuv"}
# Chroma of half the size is repeated, not interpolated: that would carry the colour under alpha 0
# into soft edges.
INTERPOLATION = Interpolation.BILINEAR
SCALER = VideoReformatter()
NO_ALPHA = (
    "give its matte as NAME_fgr + NAME_pha, or its rectangles if colour and alpha are packed in "
    "one picture"
)

Channels = Callable[[av.VideoFrame, Stated], Frames]


def read_video(path: Path, limits: Limits = LIMITS) -> RGBAClip:
    """Reads all of `open_video`."""
    with decoding(path):
        return open_video(path, limits).collected(path, limits)


def open_video(path: Path, limits: Limits = LIMITS) -> Stream:
    """Opens a video: (H, W, 4) of every codec that gives an alpha plane, VP8, VP9 and HEVC with
    alpha among them. Raises MediaError."""

    def channels(frame: av.VideoFrame, stated: Stated) -> Frames:
        if not has_alpha(frame.format):
            why = (
                describe_video(path, limits).lost
                or f"pixel format {frame.format.name} has no alpha; {NO_ALPHA}"
            )
            raise MediaError(f"{path}: {why}")
        return np.concatenate((color(frame, stated), _alpha(frame)[..., None]), axis=-1)

    return open_film(path, channels, limits)


def open_film(path: Path, channels: Channels, limits: Limits = LIMITS) -> Stream:
    """Opens a film. channels: of a decoded frame and the colour that is stated for it, (H, W) or
    (H, W, C); it is called in the order in which frames are shown.

    Pictures are cropped, turned and mirrored as the file says; pixels that are not square are
    stretched, the longer side up. The colour that is stated becomes sRGB's (`media.color`). Raises
    MediaError, also while it is iterated over.
    """
    with decoding(path), opened(path) as container:
        stream = container.streams.video[0]
        _check_header(path, stream, limits)
        shown = packets_of(container, stream)
        announced, early = stream.frames, ends_early(container, stream, shown)
        limits.check(path, max(shown.count, 1), *_coded_size(stream))
        fps, lossy = _rate(stream), stream.codec_context.name not in LOSSLESS
        tick = max(float(stream.time_base or 0), 1e-4)
        alpha_layer = AlphaLayer.of(path, stream)
    notes: list[str] = []
    if missing := missing_bytes(path):
        notes.append(f"the file ends {missing} bytes early: it is cut off")
    elif announced > shown.count:
        notes.append(
            f"the file announces {announced} frames and holds {shown.count}: it is cut off"
        )
    elif early:
        notes.append(early)
    if alpha_layer is not None and alpha_layer.premultiplied:
        # not every encoder's user kept to that
        notes.append("it calls its colour premultiplied")
    repeats: NDArray[np.intp] | None = None
    count = shown.count
    if len(shown.starts) > 1:
        rate = constant_rate(path, shown.starts, None, tick, limits.max_frames)
        if rate.note is not None:
            repeats = np.bincount(rate.indices, minlength=len(shown.starts))
            fps, count = rate.fps, len(rate.indices)
            notes.append(rate.note)
        elif fps is None or abs(fps / rate.fps - 1) > 0.01:
            fps = rate.fps  # some headers give the clock's rate
    pictures = _pictures(path, channels, limits, alpha_layer, shown, repeats, notes)
    return Stream(pictures, max(count, 1), fps, lossy, None, notes)


def _pictures(
    path: Path, channels: Channels, limits: Limits, alpha_layer: AlphaLayer | None, shown: Shown,
    repeats: NDArray[np.intp] | None, notes: list[str],
) -> Iterator[Frames]:  # fmt: skip
    """Makes the reader. repeats: how often each picture of the file is shown; None: once."""
    held, cut_off = 0, next((note for note in notes if "cut off" in note), None)
    with decoding(path), opened(path) as container:
        stream = container.streams.video[0]
        facts: Facts | None = None
        for frame in _whole(_decoded(stream, container, alpha_layer), cut_off):
            if frame.is_corrupt:
                raise MediaError(
                    f"{path}: a damaged frame; the decoder had to make up parts of it. Repair or "
                    "cut the file"
                )
            if facts is None:
                facts = facts_of(path, stream, frame)
                notes += [*facts.placement.notes(), *what_is_done(frame, facts)]
            stated = stated_or(of_frame(frame), facts.stated)
            name_matrix(frame, stream)
            limits.check(path, max(held, 1), frame.width, frame.height)
            picture = facts.placement.apply(channels(frame, stated))
            place = held
            if repeats is not None and (start := _seconds(frame, stream)) is not None:
                place = int(np.abs(shown.starts - start).argmin())
            held += 1
            for _ in range(1 if repeats is None else repeats[min(place, len(repeats) - 1)]):
                yield picture
        _check_count(path, stream, held, shown.count, alpha_layer, notes)


def describe_video(path: Path, limits: Limits = LIMITS) -> Description:
    """Decodes the first frame: only that tells whether VP8, VP9 and HEVC have alpha. MediaError if
    unreadable."""
    with decoding(path), opened(path) as container:
        stream = container.streams.video[0]
        _check_header(path, stream, limits)
        count = packets_of(container, stream).count
        limits.check(path, count, *_coded_size(stream))
        lossy = stream.codec_context.name not in LOSSLESS
    with decoding(path), opened(path) as container:
        stream = container.streams.video[0]
        frame = next(_decoded(stream, container, AlphaLayer.of(path, stream)))
        limits.check(path, count, frame.width, frame.height)
        size = facts_of(path, stream, frame).placement.size(frame.width, frame.height)
        alpha = has_alpha(frame.format)
        lost = None if alpha else _lost_alpha(container, stream)
        return Description(count, *size, lossy, alpha, lost)


def color(frame: av.VideoFrame, stated: Stated) -> Frames:
    """Returns (H, W, 3) in sRGB, by the frame's own matrix and range."""
    change = conversion(stated)
    pixels = "rgb24" if change is None else "rgb48le"
    rgb = SCALER.reformat(frame, format=pixels, interpolation=INTERPOLATION, threads=1)
    values = rgb.to_ndarray()
    return cast(Frames, values if change is None else change.apply(values))


def luma(frame: av.VideoFrame, stated: Stated) -> Frames:
    """Returns (H, W), stretched to 0..255; of colour the green, as it is stored."""
    del stated  # a matte has none
    bits = frame.format.components[0].bits
    if frame.format.is_rgb or bits > 16:
        return np.ascontiguousarray(color(frame, Stated())[..., 1])
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith(("yuvj", "gray"))
    return _plane(frame, 0, bits, full)


def has_alpha(pixels: av.VideoFormat | None) -> bool:
    return pixels is not None and any(component.is_alpha for component in pixels.components)


def _lost_alpha(container: av.container.InputContainer, stream: av.VideoStream) -> str | None:
    """Returns what the container of a video whose frames have no alpha says of it nevertheless."""
    codec = stream.codec_context
    said = {name.lower(): value for name, value in stream.metadata.items()}
    if said.get("alpha_mode") == "1":
        return (
            "its container announces alpha (AlphaMode), and the decoder of "
            f"{codec.codec.canonical_name} gives none with its first picture; convert it from its "
            "source to VP9, ProRes 4444 or a PNG sequence"
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
    """Returns (H, W), rounded from the plane itself: the scaler would cut 12 bits off to 8 and make
    4080 opaque."""
    component = frame.format.components[-1]
    if component.bits > (16 if frame.format.is_planar else 8):
        return to_uint8(frame.to_ndarray(format="rgba64le")[..., 3] / np.float32(65535))
    if not frame.format.is_planar:
        return cast(Frames, frame.to_ndarray(format="rgba"))[..., 3]
    return _plane(frame, component.plane, component.bits, full=True)


def _plane(frame: av.VideoFrame, index: int, bits: int, full: bool) -> Frames:
    """Returns (H, W), rounded to 8 bits."""
    plane = frame.planes[index]
    values = np.frombuffer(memoryview(plane), np.uint8 if bits <= 8 else np.uint16)
    rows = values.reshape(-1, plane.line_size // values.itemsize)
    return _levels(bits, full).take(rows[: frame.height, : frame.width], mode="clip")


@lru_cache(maxsize=16)
def _levels(bits: int, full: bool) -> Frames:
    """Returns (2 ** bits,): what each value becomes; not full: 16 to 235 of 255 are stretched."""
    values = np.arange(2**bits, dtype=np.float32)
    if full:
        return to_uint8(values / (2**bits - 1))
    return to_uint8((values / 2 ** (bits - 8) - 16) / 219)


def _check_header(path: Path, stream: av.VideoStream, limits: Limits) -> None:
    """Checks, before anything is decoded; a header without the number of frames still has a
    duration and a rate."""
    codec, rate = stream.codec_context, _rate(stream)
    count = stream.frames
    if not count and rate and stream.duration and stream.time_base:
        count = int(stream.duration * stream.time_base * Fraction(rate).limit_denominator(10**6))
    limits.check(path, max(count, 1), codec.width, codec.height)


def _decoded(
    stream: av.VideoStream, container: av.container.InputContainer, alpha_layer: AlphaLayer | None
) -> Iterator[av.VideoFrame]:
    """Decodes with one thread: clips are read by several processes, whose threads would stand in
    each other's way."""
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


def _whole(frames: Iterator[av.VideoFrame], cut_off: str | None) -> Iterator[av.VideoFrame]:
    """Raises MediaError with what is known of the file's end where a decoder knows that it is
    damaged."""
    try:
        yield from frames
    except FFmpegError as error:
        if cut_off is None:
            raise
        raise MediaError(f"cannot be decoded: {cut_off}; copy it again") from error


def _seconds(frame: av.VideoFrame, stream: av.VideoStream) -> float | None:
    base = frame.time_base or stream.time_base
    return None if frame.pts is None or base is None else float(frame.pts * base)


def _check_count(
    path: Path, stream: av.VideoStream, held: int, packets: int, alpha_layer: AlphaLayer | None,
    notes: list[str],
) -> None:  # fmt: skip
    """Disbelieves a decoder that gives far fewer pictures than there are packets, or that drops
    pictures for want of their alpha."""
    lost = packets - held
    if lost <= 0 or not held:
        return
    codec = stream.codec_context.name
    if codec in ALPHA_DECODERS or alpha_layer is not None:
        raise MediaError(
            f"{path}: alpha in {held} of its {packets} pictures; convert it from its source, or "
            "make a pair of colour and alpha"
        )
    if lost > packets // 2:
        raise MediaError(
            f"{path}: {held} pictures of its {packets} packets could be decoded; it is damaged. "
            "Convert it from its source"
        )
    notes.append(f"{lost} of its {packets} packets gave no picture")


def _coded_size(stream: av.VideoStream) -> tuple[int, int]:
    return stream.codec_context.width, stream.codec_context.height


def _rate(stream: av.VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None
