"""RGBA in and out of files. Frames are uint8 (T, H, W, 4), alpha 0..255, colour as the file stores
it."""

import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from acetate.media.clip import (
    LIMITS,
    Description,
    Frames,
    Limits,
    MediaError,
    Rect,
    RGBAClip,
    decoding,
    joined,
)
from acetate.media.images import IMAGES, OPAQUE_IMAGES, describe_image, image_halves, read_image
from acetate.media.packed import Packing, find_packing
from acetate.media.videos import VIDEOS, Film, colour, describe_video, luma, read_film, read_video

# Of a clip in a shard: no other demuxer, decoder, file or host
FFV1_ALONE = {
    "format_whitelist": "matroska,webm",
    "codec_whitelist": "ffv1",
    "protocol_whitelist": "none",
}
SPARE = 64  # pixels of a side by which FFmpeg's buffers may be larger than the picture
PACKING_PICTURES = 6  # of a video, spread over its length, that its rectangles are measured on


def read_rgba(path: Path, limits: Limits = LIMITS) -> RGBAClip:
    """A still, a folder of them, an animated image or a video with alpha; see `read_image` and
    `read_video`.

    Raises MediaError for a damaged file, an unknown kind of file, one without alpha or beyond the
    limits.
    """
    if path.is_dir():
        return _read_sequence(path, limits)
    if path.suffix.lower() in IMAGES:
        return read_image(path, limits)
    if path.suffix.lower() in VIDEOS:
        return read_video(path, limits)
    raise MediaError(
        f"{path}: {path.suffix or 'no'} suffix; RGBA is read from {', '.join(IMAGES + VIDEOS)}"
    )


def read_pair(fgr: Path, pha: Path, limits: Limits = LIMITS) -> RGBAClip:
    """Colour of `fgr` with the luma of `pha` as alpha; each a video, an image or a folder of
    images.

    Limited-range luma is stretched so that 16..235 becomes 0..255. MediaError if length or size
    differ.
    """
    picture, matte = _stack(fgr, colour, limits), _stack(pha, luma, limits)
    if len(picture.frames) != len(matte.frames):
        raise MediaError(
            f"{fgr.name}: {len(picture.frames)} frames, {pha.name}: {len(matte.frames)}; a pair "
            "has equally many. Cut the longer one."
        )
    if picture.frames.shape[1:3] != matte.frames.shape[1:3]:
        sizes = [f"{film.frames.shape[2]}x{film.frames.shape[1]}" for film in (picture, matte)]
        raise MediaError(
            f"{fgr.name}: {sizes[0]}, {pha.name}: {sizes[1]}; a pair has one size. Scale one of "
            "them"
        )
    limits.check_memory(fgr, len(picture.frames), picture.frames[0].nbytes + matte.frames[0].nbytes)
    frames = np.concatenate((picture.frames, matte.frames[..., None]), axis=-1)
    notes = tuple(dict.fromkeys(picture.notes + matte.notes))
    return RGBAClip(frames, picture.fps, picture.lossy or matte.lossy, None, notes)


def read_packed(
    path: Path, colour_rect: Rect, alpha_rect: Rect, limits: Limits = LIMITS
) -> RGBAClip:
    """Colour and alpha from two rectangles of an opaque video; alpha is scaled to the colour's
    size."""

    def channels(frame: av.VideoFrame) -> Frames:
        for name, (x, y, width, height) in (("colour", colour_rect), ("alpha", alpha_rect)):
            inside = 0 <= x < x + width <= frame.width and 0 <= y < y + height <= frame.height
            if not inside:
                raise MediaError(
                    f"{path}: {name} rectangle {[x, y, width, height]} (x, y, width, height) is "
                    f"not inside {frame.width}x{frame.height}. Correct the rectangle."
                )
        picture, matte = _cut(colour(frame), colour_rect), _cut(luma(frame), alpha_rect)
        if matte.shape != picture.shape[:2]:
            size = (picture.shape[1], picture.shape[0])
            matte = np.asarray(Image.fromarray(matte).resize(size, Image.Resampling.BILINEAR))
        return np.concatenate((picture, matte[..., None]), axis=-1)

    film = read_film(path, channels, limits)
    return RGBAClip(film.frames, film.fps, film.lossy, None, film.notes)


def measure_packing(path: Path, limits: Limits = LIMITS) -> Packing | None:
    """Where colour and alpha of a packed video are, as its pictures show it; see `find_packing`."""
    count = describe_video(path, limits).frames
    wanted = {(2 * i + 1) * count // (2 * PACKING_PICTURES) for i in range(PACKING_PICTURES)}
    pictures: list[Frames] = []
    seen = 0

    def some(frame: av.VideoFrame) -> Frames:
        nonlocal seen
        if seen in wanted:
            pictures.append(colour(frame))
        seen += 1
        return np.zeros((1, 1), np.uint8)

    read_film(path, some, limits)
    return find_packing(pictures)


def describe(path: Path, limits: Limits = LIMITS) -> Description:
    """Length, size and whether there is alpha; decodes one frame at most. MediaError if
    unreadable."""
    if path.is_dir():
        files = sequence_files(path)
        first = describe(files[0], limits)
        limits.check(path, len(files), first.width, first.height)
        return replace(first, frames=len(files))
    if path.suffix.lower() in IMAGES + OPAQUE_IMAGES:
        return describe_image(path, limits)
    return describe_video(path, limits)


def sequence_files(folder: Path) -> list[Path]:
    """The images of a folder in natural order: frame2 before frame10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES + OPAQUE_IMAGES]
    if not files:
        raise MediaError(
            f"{folder}: no image in the folder; a sequence is a folder of {', '.join(IMAGES)}"
        )
    return sorted(
        files,
        key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)],
    )


def encode_ffv1(frames: Frames, fps: float) -> bytes:
    """Lossless Matroska of RGBA frames (T, H, W, 4); the same bytes for the same frames.

    bgra: FFV1 codes it through a reversible colour transform, so every bit survives. The Rice
    coder's files are a sixth larger than the range coder's (measured on effect videos) and decode
    up to twice as fast.
    """
    if frames.ndim != 4 or frames.shape[-1] != 4 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            f"frames: {frames.dtype} {frames.shape}; FFV1 clips are uint8 (T, H, W, 4), not empty"
        )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        options = {"level": "3", "slicecrc": "1", "coder": "rice"}
        rate = Fraction(fps).limit_denominator(1001)
        stream = cast(av.VideoStream, container.add_stream("ffv1", rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgra"
        stream.codec_context.flags |= Flags.bitexact
        for frame in frames:
            rgba = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgba")
            container.mux(stream.encode(rgba.reformat(format="bgra")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_ffv1(data: bytes, name: str, shape: tuple[int, int, int]) -> tuple[Frames, float]:
    """Inverse of `encode_ffv1`: frames (T, H, W, 4) and fps.

    shape: the frames, height and width that were promised; decoding stops where there are more.
    Raises MediaError, which names `name`, for another shape, for what has no alpha, and for
    anything but Matroska with one stream of FFV1.
    """
    count, height, width = shape
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
        fps, seen = float(stream.average_rate or stream.guessed_rate or 0), 0
        frames = np.empty((count, height, width, 4), np.uint8)
        for frame in container.decode(stream):
            if frame.format.name != "bgra":
                raise MediaError(
                    f"{name}: pixel format {frame.format.name}; a clip has alpha, FFV1 in bgra"
                )
            if seen == count:
                raise MediaError(f"{name}: more than the promised {count} frames")
            frames[seen] = frame.to_ndarray(format="rgba")
            seen += 1
    if seen != count:
        raise MediaError(f"{name}: {seen} frames, promised are {count}")
    return frames, fps


def _only_ffv1(name: str, container: av.container.InputContainer) -> av.VideoStream:
    kinds = [getattr(stream.codec_context, "name", stream.type) for stream in container.streams]
    if kinds != ["ffv1"]:
        raise MediaError(f"{name}: holds {', '.join(kinds) or 'no stream'}; a clip is one of FFV1")
    return container.streams.video[0]


def write_video(path: Path, frames: Frames, fps: float) -> None:
    """H.264 MP4 of opaque frames (T, H, W, 3) in BT.709; an odd side repeats its last row or
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
            stream.width, stream.height, stream.pix_fmt = (
                frames.shape[2],
                frames.shape[1],
                "yuv420p",
            )
            stream.codec_context.colorspace, stream.codec_context.color_range = (
                Colorspace.ITU709,
                ColorRange.MPEG,
            )
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


def _read_sequence(folder: Path, limits: Limits) -> RGBAClip:
    files = sequence_files(folder)
    _check(folder, files, limits)
    stills = [read_image(file, limits) for file in files]
    for file, still in zip(files, stills, strict=True):
        if still.frames.shape != stills[0].frames.shape:
            shapes = [f"{s.frames.shape[2]}x{s.frames.shape[1]}" for s in (stills[0], still)]
            raise MediaError(
                f"{folder}: {file.name} is {shapes[1]}, {files[0].name} is {shapes[0]}; a sequence "
                "has one size"
            )
    notes = tuple(dict.fromkeys(note for still in stills for note in still.notes))
    frames = joined(folder, (still.frames[0] for still in stills), len(stills))
    return RGBAClip(frames, None, any(still.lossy for still in stills), False, notes)


def _stack(path: Path, channel: Callable[[av.VideoFrame], Frames], limits: Limits) -> Film:
    """One channel group of every frame of a video, an image or a folder of images."""
    if path.is_dir() or path.suffix.lower() in IMAGES + OPAQUE_IMAGES:
        files = sequence_files(path) if path.is_dir() else [path]
        _check(path, files, limits)
        halves = (image_halves(file, limits)[channel is luma] for file in files)
        return Film(
            joined(path, halves, len(files)),
            None,
            any(describe_image(file, limits).lossy for file in files),
            (),
        )
    return read_film(path, channel, limits)


def _check(path: Path, files: list[Path], limits: Limits) -> None:
    """Of a sequence, by its first image."""
    header = describe(files[0], limits)
    limits.check(path, len(files), header.width, header.height)
    limits.check_memory(path, len(files), 4 * header.width * header.height)


def _cut(picture: Frames, rect: Rect) -> Frames:
    x, y, width, height = rect
    return picture[y : y + height, x : x + width]
