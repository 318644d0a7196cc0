"""Reads and writes RGBA files. Frames are uint8 (T, H, W, 4), alpha 0..255, colour as the file
stores it."""

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice, zip_longest
from pathlib import Path
from typing import BinaryIO, cast

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from acetate.media.clip import (
    AS_STATED,
    LIMITS,
    Asked,
    Description,
    Frames,
    Limits,
    MediaError,
    Rect,
    RGBAClip,
    Stream,
    decoding,
    stream_of,
)
from acetate.media.color import Stated
from acetate.media.images import IMAGES, OPAQUE_IMAGES, describe_image, image_halves, read_image
from acetate.media.mattes import open_matte
from acetate.media.packed import Packing, find_packing
from acetate.media.sequences import check_frames, is_sequence, sequence_files
from acetate.media.videos import VIDEOS, color, describe_video, luma, open_film, open_video

# Of a clip in a shard: no other demuxer, decoder, file or host
FFV1_ALONE = {
    "format_whitelist": "matroska,webm",
    "codec_whitelist": "ffv1",
    "protocol_whitelist": "none",
}
KEY = 4  # frames from one key frame to the next
SPARE = 64  # pixels of a side by which FFmpeg's buffers may be larger than the picture
SAME_RATE = 0.01  # rates of a pair nearer than this share are one
PACKING_PICTURES = 6  # of a video, spread over its length, that its rectangles are measured on


def read_rgba(path: Path, limits: Limits = LIMITS, asked: Asked = AS_STATED) -> RGBAClip:
    """Reads all frames of `open_rgba` into memory."""
    if path.suffix.lower() in IMAGES and not is_sequence(path):
        return read_image(path, limits, asked)
    with decoding(path):
        return open_rgba(path, limits, asked).collected(path, limits)


def open_rgba(path: Path, limits: Limits = LIMITS, asked: Asked = AS_STATED) -> Stream:
    """Opens a still, a folder of them, an animated image or a video with alpha, picture by picture;
    see `read_image` and `open_video`. asked: what a person says of it.

    Raises MediaError, also while it is iterated over, for a damaged file, an unknown kind of file,
    one without alpha or beyond the limits.
    """
    if is_sequence(path):
        return _open_sequence(path, limits, asked)
    if path.suffix.lower() in IMAGES:
        return stream_of(read_image(path, limits, asked))
    if path.suffix.lower() in VIDEOS:
        return open_video(path, limits)
    raise MediaError(
        f"{path}: {path.suffix or 'no'} suffix; RGBA is read from {', '.join(IMAGES + VIDEOS)}"
    )


def read_pair(fgr: Path, pha: Path, limits: Limits = LIMITS) -> RGBAClip:
    """Reads all frames of `open_pair` into memory."""
    return open_pair(fgr, pha, limits).collected(fgr, limits)


def open_pair(fgr: Path, pha: Path, limits: Limits = LIMITS) -> Stream:
    """Opens colour of `fgr` with `pha` as alpha, as `open_matte` takes it; each a video, an image
    or a sequence.

    Limited-range luma is stretched so that 16..235 becomes 0..255. MediaError, also while it is
    iterated over, if length or size differ.
    """
    films = [_open_color(fgr, limits), open_matte(pha, limits)]
    rates = [film.fps for film in films if film.fps]
    notes: list[str] = []
    if len(rates) == 2 and abs(rates[0] / rates[1] - 1) > SAME_RATE:
        notes.append(
            f"{fgr.name} has {rates[0]:.4g} frames/s and {pha.name} {rates[1]:.4g}: taken frame by "
            "frame, at the first's"
        )

    def pictures() -> Iterator[Frames]:
        for picture, matte in zip_longest(*films):
            if picture is None or matte is None:
                for film in films:
                    deque(film, maxlen=0)
                raise MediaError(
                    f"{fgr.name}: {films[0].held} frames, {pha.name}: {films[1].held}; a pair has "
                    "equally many. Cut the longer one."
                )
            if picture.shape[:2] != matte.shape:
                sizes = [f"{half.shape[1]}x{half.shape[0]}" for half in (picture, matte)]
                raise MediaError(
                    f"{fgr.name}: {sizes[0]}, {pha.name}: {sizes[1]}; a pair has one size. Scale "
                    "one of them"
                )
            yield np.concatenate((picture, matte[..., None]), axis=-1)
        notes.extend(dict.fromkeys(films[0].notes + films[1].notes))

    lossy = films[0].lossy or films[1].lossy
    return Stream(pictures(), films[0].frames, films[0].fps, lossy, None, notes)


def read_packed(
    path: Path, color_rect: Rect, alpha_rect: Rect, limits: Limits = LIMITS
) -> RGBAClip:
    """Reads all frames of `open_packed` into memory."""
    with decoding(path):
        return open_packed(path, color_rect, alpha_rect, limits).collected(path, limits)


def open_packed(path: Path, color_rect: Rect, alpha_rect: Rect, limits: Limits = LIMITS) -> Stream:
    """Opens colour and alpha from two rectangles of an opaque video, as it is shown; alpha is
    scaled to the colour's size."""

    def channels(frame: av.VideoFrame, stated: Stated) -> Frames:
        return np.concatenate((color(frame, stated), luma(frame, stated)[..., None]), axis=-1)

    def pictures() -> Iterator[Frames]:
        for whole in film:
            height, width = whole.shape[:2]
            for name, (x, y, wide, high) in (("color", color_rect), ("alpha", alpha_rect)):
                if not (0 <= x < x + wide <= width and 0 <= y < y + high <= height):
                    raise MediaError(
                        f"{path}: {name} rectangle {[x, y, wide, high]} (x, y, width, height) is "
                        f"not inside {width}x{height}. Correct the rectangle."
                    )
            picture, matte = _cut(whole, color_rect)[..., :3], _cut(whole, alpha_rect)[..., 3]
            if matte.shape != picture.shape[:2]:
                size = (picture.shape[1], picture.shape[0])
                matte = np.asarray(Image.fromarray(matte).resize(size, Image.Resampling.BILINEAR))
            yield np.concatenate((picture, matte[..., None]), axis=-1)

    film = open_film(path, channels, limits)
    return Stream(pictures(), film.frames, film.fps, film.lossy, None, film.notes)


def measure_packing(path: Path, limits: Limits = LIMITS) -> Packing | None:
    """Finds where colour and alpha of a packed video are, as its pictures show it; see
    `find_packing`."""
    film = open_film(path, color, limits)
    count = film.frames
    wanted = {(2 * i + 1) * count // (2 * PACKING_PICTURES) for i in range(PACKING_PICTURES)}
    return find_packing([picture for i, picture in enumerate(film) if i in wanted])


def describe(path: Path, limits: Limits = LIMITS, asked: Asked = AS_STATED) -> Description:
    """Returns length, size and whether there is alpha; decodes one frame at most. Raises MediaError
    if the file is unreadable."""
    if is_sequence(path):
        files = sequence_files(path)
        check_frames(path, files)
        first = describe(files[0], limits, asked)
        limits.check(path, len(files), first.width, first.height)
        return replace(first, frames=len(files))
    if path.suffix.lower() in IMAGES + OPAQUE_IMAGES:
        return describe_image(path, limits, asked)
    return describe_video(path, limits)


def encode_ffv1(frames: Iterable[Frames], fps: float) -> bytes:
    """Returns what `write_ffv1` writes."""
    buffer = io.BytesIO()
    write_ffv1(buffer, frames, fps)
    return buffer.getvalue()


def write_ffv1(file: BinaryIO, frames: Iterable[Frames], fps: float) -> None:
    """Encodes RGBA frames, uint8 (H, W, 4) each, which may come one by one, as lossless Matroska;
    the same bytes for the same frames. Raises ValueError for others, and for none.

    bgra: FFV1 codes it through a reversible colour transform, so every bit survives. The Rice
    coder's files are a sixth larger than the range coder's (measured on effect videos) and decode
    up to twice as fast. Every KEY-th frame is a key frame, so that a few frames of a long clip can
    be decoded without the others.
    """
    size: tuple[int, ...] = ()
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        options = {"level": "3", "slicecrc": "1", "coder": "rice", "g": str(KEY)}
        rate = Fraction(fps).limit_denominator(1001)
        stream = cast(av.VideoStream, container.add_stream("ffv1", rate=rate, options=options))
        for frame in frames:
            size = size or frame.shape
            if frame.dtype != np.uint8 or frame.shape != size or len(size) != 3 or size[2] != 4:
                raise ValueError(
                    f"frames: {frame.dtype} {frame.shape} after {size}; FFV1 clips are uint8 "
                    "(T, H, W, 4) of one size"
                )
            if not stream.codec_context.is_open:
                stream.width, stream.height, stream.pix_fmt = frame.shape[1], frame.shape[0], "bgra"
                stream.codec_context.flags |= Flags.bitexact
            rgba = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgba")
            container.mux(stream.encode(rgba.reformat(format="bgra")))
        if not size:
            raise ValueError("frames: none; FFV1 clips are uint8 (T, H, W, 4), not empty")
        container.mux(stream.encode())


def decode_ffv1(
    data: bytes, name: str, shape: tuple[int, int, int], span: tuple[int, int] | None = None
) -> tuple[Frames, float]:
    """Inverts `encode_ffv1`: returns frames (T, H, W, 4) and fps.

    shape: the frames, height and width that were promised. span: first frame and the one after the
    last that are wanted; None: all. Nothing after them is decoded, and nothing before the key frame
    that they need. Raises MediaError, which names `name`, for another shape, for what has no alpha,
    and for anything but Matroska with one stream of FFV1.
    """
    count, height, width = shape
    first, last = span or (0, count)
    limit = {"max_pixels": str((height + SPARE) * (width + SPARE))}
    with (
        decoding(name),
        av.open(io.BytesIO(data), "r", format="matroska", options=FFV1_ALONE | limit) as container,
    ):
        stream = _only_ffv1(name, container)
        found = (stream.codec_context.height, stream.codec_context.width)
        if found != (height, width):
            # FFmpeg knows no size beyond the limit
            size = "x".join(map(str, found)) if all(found) else "larger"
            raise MediaError(f"{name}: pictures are {size}, promised are {height}x{width}")
        stream.codec_context.options = limit
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        packets = list(
            islice((packet for packet in container.demux(stream) if packet.size), count + 1)
        )
        if len(packets) > count:
            raise MediaError(f"{name}: more than the promised {count} frames")
        if len(packets) < count:
            raise MediaError(f"{name}: {len(packets)} frames, promised are {count}")
        start = max(i for i in range(first + 1) if packets[i].is_keyframe or not i)
        frames, seen = np.empty((last - first, height, width, 4), np.uint8), start
        for packet in (*packets[start:last], None):  # None: what the decoder holds back
            for frame in stream.codec_context.decode(packet):
                if frame.format.name != "bgra":
                    raise MediaError(
                        f"{name}: pixel format {frame.format.name}; a clip has alpha, FFV1 in bgra"
                    )
                if first <= seen < last:
                    frames[seen - first] = frame.to_ndarray(format="rgba")
                seen += 1
    if seen != last:
        raise MediaError(f"{name}: {seen - start} of {last - start} pictures can be decoded")
    return frames, fps


def _only_ffv1(name: str, container: av.container.InputContainer) -> av.VideoStream:
    kinds = [getattr(stream.codec_context, "name", stream.type) for stream in container.streams]
    if kinds != ["ffv1"]:
        raise MediaError(f"{name}: holds {', '.join(kinds) or 'no stream'}; a clip is one of FFV1")
    return container.streams.video[0]


def write_video(path: Path, frames: Frames, fps: float) -> None:
    """Writes H.264 MP4 of opaque frames (T, H, W, 3) in BT.709; an odd side repeats its last row or
    column.

    The file appears under its name only when it is whole.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            f"{path}: {frames.dtype} {frames.shape}; a video is uint8 (T, H, W, 3), not empty"
        )
    odd = [side % 2 for side in frames.shape[1:3]]
    frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with av.open(
            str(temporary), "w", format="mp4", options={"movflags": "+faststart"}
        ) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = cast(
                av.VideoStream, container.add_stream("libx264", rate=rate, options={"crf": "16"})
            )
            stream.width = frames.shape[2]
            stream.height = frames.shape[1]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.MPEG
            for frame in frames:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                yuv = rgb.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
                container.mux(stream.encode(yuv))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open_sequence(folder: Path, limits: Limits, asked: Asked) -> Stream:
    files = sequence_files(folder)
    header = _check(folder, files, limits)
    notes: list[str] = []

    def pictures() -> Iterator[Frames]:
        size = None
        for file in files:
            still = read_image(file, limits, asked)
            height, width = still.frames.shape[1:3]
            size = size or (width, height)
            if (width, height) != size:
                raise MediaError(
                    f"{folder}: {file.name} is {width}x{height}, {files[0].name} is "
                    f"{size[0]}x{size[1]}; a sequence has one size"
                )
            notes.extend(note for note in still.notes if note not in notes)
            yield still.frames[0]

    return Stream(pictures(), len(files), None, header.lossy, False, notes)


def _open_color(path: Path, limits: Limits) -> Stream:
    """Opens the colour of every frame of a video, an image or a sequence."""
    if is_sequence(path) or path.suffix.lower() in IMAGES + OPAQUE_IMAGES:
        files = sequence_files(path) if is_sequence(path) else [path]
        header = _check(path, files, limits)
        halves = (image_halves(file, limits)[0] for file in files)
        return Stream(halves, len(files), None, header.lossy, None, [])
    return open_film(path, color, limits)


def _check(path: Path, files: list[Path], limits: Limits) -> Description:
    """Checks a sequence by its first image."""
    check_frames(path, files)
    header = describe(files[0], limits)
    limits.check(path, len(files), header.width, header.height)
    return header


def _cut(picture: Frames, rect: Rect) -> Frames:
    x, y, width, height = rect
    return picture[y : y + height, x : x + width]
