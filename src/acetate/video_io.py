"""RGBA in and out of files. Frames are uint8 (T, H, W, 4), alpha 0..255, colour as the file stores it."""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.codec.context import Flags
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image

Frames = NDArray[np.uint8]
Rect = tuple[int, int, int, int]  # x, y, width, height in pixels

IMAGES = (".png", ".apng", ".webp")
OPAQUE_IMAGES = (".jpg", ".jpeg", ".bmp", ".tif", ".tiff")  # good for either half of a pair
VIDEOS = (".mov", ".webm", ".mkv", ".mp4", ".m4v", ".avi")
# FFmpeg's own vp8 and vp9 decoders drop the alpha plane without a word.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
LOSSLESS = {"ffv1", "png", "apng", "qtrle", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "magicyuv"}

# Every way in which FFmpeg and PIL report a damaged file.
DECODER_ERRORS = (
    FFmpegError, OSError, SyntaxError, ValueError, IndexError, EOFError, StopIteration, Image.DecompressionBombError,
)  # fmt: skip


class MediaError(ValueError):
    """A file that cannot be read as RGBA; the text names the file, what is wrong and the way out."""


@dataclass(frozen=True)
class RGBAClip:
    """frames: uint8 (T, H, W, 4). fps: None for stills and sequences. premultiplied: None if not defined."""

    frames: Frames
    fps: float | None
    lossy: bool
    premultiplied: bool | None


@dataclass(frozen=True)
class Description:
    """What a file's headers say; nothing but a first frame is decoded."""

    frames: int
    width: int
    height: int
    fps: float | None
    lossy: bool
    alpha: bool


def read_rgba(path: Path) -> RGBAClip:
    """A still (PNG, WebP), a folder of them, APNG, animated WebP, or a video (ProRes 4444, VP8, VP9, FFV1).

    Raises MediaError for a damaged file, an unknown kind of file, or one without alpha.
    """
    if path.is_dir():
        return _read_sequence(path)
    if path.suffix.lower() in IMAGES:
        return _read_image(path)
    if path.suffix.lower() in VIDEOS:
        return _read_video(path)
    raise MediaError(f"{path}: {path.suffix or 'no'} suffix; RGBA is read from {', '.join(IMAGES + VIDEOS)}")


def read_pair(fgr: Path, pha: Path) -> RGBAClip:
    """Colour of `fgr` with the luma of `pha` as alpha; each a video, an image or a folder of images.

    Limited-range luma is stretched so that 16..235 becomes 0..255. MediaError if length or size differ.
    """
    colour, alpha = _stack(fgr, _colour), _stack(pha, _luma)
    if len(colour) != len(alpha):
        raise MediaError(
            f"{fgr.name}: {len(colour)} frames, {pha.name}: {len(alpha)}; a pair has equally many. Cut the longer one."
        )
    if colour.shape[1:3] != alpha.shape[1:3]:
        sizes = [f"{a.shape[2]}x{a.shape[1]}" for a in (colour, alpha)]
        raise MediaError(f"{fgr.name}: {sizes[0]}, {pha.name}: {sizes[1]}; a pair has one size. Scale one of them")
    header = describe(fgr)
    frames = np.concatenate((colour, alpha[..., None]), axis=-1)
    return RGBAClip(frames, header.fps, header.lossy or describe(pha).lossy, None)


def read_packed(path: Path, colour_rect: Rect, alpha_rect: Rect) -> RGBAClip:
    """Colour and alpha from two rectangles of an opaque video; alpha is scaled to the colour's size."""
    frames = []
    with _decoding(path):
        for frame in _video_frames(path):
            for name, (x, y, width, height) in (("colour", colour_rect), ("alpha", alpha_rect)):
                inside = 0 <= x < x + width <= frame.width and 0 <= y < y + height <= frame.height
                if not inside:
                    raise MediaError(
                        f"{path}: {name} rectangle {[x, y, width, height]} (x, y, width, height) is not "
                        f"inside {frame.width}x{frame.height}. Correct the rectangle."
                    )
            colour, alpha = _cut(_colour(frame), colour_rect), _cut(_luma(frame), alpha_rect)
            if alpha.shape != colour.shape[:2]:
                size = (colour.shape[1], colour.shape[0])
                alpha = np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BILINEAR))
            frames.append(np.concatenate((colour, alpha[..., None]), axis=-1))
    header = describe(path)
    return RGBAClip(_joined(path, frames), header.fps, header.lossy, None)


def describe(path: Path) -> Description:
    """Length, size, rate and whether there is alpha; decodes one frame at most. MediaError if unreadable."""
    with _decoding(path):
        if path.is_dir():
            first = describe(sequence_files(path)[0])
            return Description(len(sequence_files(path)), first.width, first.height, None, first.lossy, first.alpha)
        if path.suffix.lower() in IMAGES + OPAQUE_IMAGES:
            with Image.open(path) as image:
                first, count = _animation(image)
                fps = _frame_rate(image) if count > 1 else None
                return Description(count, *image.size, fps, _lossy_image(path), image.has_transparency_data)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            # The header calls VP8 and VP9 opaque either way, and not every writer sets the alpha_mode tag.
            vpx = codec.name in ALPHA_DECODERS
            alpha = _has_alpha(next(_video_frames(path)).format if vpx else codec.format)
            return Description(count, codec.width, codec.height, _rate(stream), codec.name not in LOSSLESS, alpha)


def sequence_files(folder: Path) -> list[Path]:
    """The images of a folder in natural order: frame2 before frame10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES + OPAQUE_IMAGES]
    if not files:
        raise MediaError(f"{folder}: no image in the folder; a sequence is a folder of {', '.join(IMAGES)}")
    return sorted(files, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


def encode_ffv1(frames: Frames, fps: float) -> bytes:
    """Lossless Matroska of RGBA frames (T, H, W, 4); the same bytes for the same frames.

    bgra: FFV1 codes it through a reversible colour transform, so every bit survives. The Rice coder's files are a
    sixth larger than the range coder's (measured on effect videos) and decode up to twice as fast.
    """
    if frames.ndim != 4 or frames.shape[-1] != 4 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames: {frames.dtype} {frames.shape}; FFV1 clips are uint8 (T, H, W, 4), not empty")
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


def decode_ffv1(data: bytes, name: str) -> tuple[Frames, float]:
    """Inverse of `encode_ffv1`: frames (T, H, W, 4) and fps. MediaError (it names `name`) without alpha."""
    frames = []
    with _decoding(name), av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        fps = _rate(stream) or 0.0
        for frame in container.decode(stream):
            if frame.format.name != "bgra":
                raise MediaError(f"{name}: pixel format {frame.format.name}; a clip has alpha, FFV1 in bgra")
            frames.append(frame.to_ndarray(format="rgba"))
    return _joined(name, frames), fps


def write_video(path: Path, frames: Frames, fps: float) -> None:
    """H.264 MP4 of opaque frames (T, H, W, 3) in BT.709; an odd side repeats its last row or column.

    The file appears under its name only when it is whole.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"{path}: {frames.dtype} {frames.shape}; a video is uint8 (T, H, W, 3), not empty")
    odd = [side % 2 for side in frames.shape[1:3]]
    frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = cast(av.VideoStream, container.add_stream("libx264", rate=rate, options={"crf": "16"}))
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
            stream.codec_context.colorspace, stream.codec_context.color_range = (
                Colorspace.ITU709,
                ColorRange.MPEG,
            )
            for frame in frames:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
                container.mux(stream.encode(yuv))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_sequence(folder: Path) -> RGBAClip:
    files = sequence_files(folder)
    stills = [_read_image(file) for file in files]
    for file, still in zip(files, stills, strict=True):
        if still.frames.shape != stills[0].frames.shape:
            sizes = [f"{s.frames.shape[2]}x{s.frames.shape[1]}" for s in (stills[0], still)]
            raise MediaError(
                f"{folder}: {file.name} is {sizes[1]}, {files[0].name} is {sizes[0]}; a sequence has one size"
            )
    frames = np.concatenate([still.frames for still in stills])
    return RGBAClip(frames, None, any(still.lossy for still in stills), False)


def _read_image(path: Path) -> RGBAClip:
    """PIL composes animations (partial frames, dispose, blend). PNG and WebP are straight by definition."""
    with _decoding(path), Image.open(path) as image:
        if not image.has_transparency_data:
            raise MediaError(
                f"{path}: mode {image.mode} has no alpha channel; save it as RGBA, or give a matte as "
                "NAME_fgr + NAME_pha"
            )
        first, count = _animation(image)
        fps = _frame_rate(image) if count > 1 else None
        frames = []
        for i in range(first, first + count):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGBA")))
    return RGBAClip(_joined(path, frames), fps, _lossy_image(path), False)


def _read_video(path: Path) -> RGBAClip:
    frames = []
    with _decoding(path):
        for frame in _video_frames(path):
            if not _has_alpha(frame.format):
                raise MediaError(
                    f"{path}: pixel format {frame.format.name} has no alpha; give its matte as NAME_fgr + "
                    "NAME_pha, or its rectangles if colour and alpha are packed in one picture"
                )
            frames.append(np.concatenate((_colour(frame), _alpha(frame)[..., None]), axis=-1))
    header = describe(path)
    return RGBAClip(_joined(path, frames), header.fps, header.lossy, None)


def _video_frames(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.codec_context.name not in ALPHA_DECODERS:
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
            return
        name = ALPHA_DECODERS[stream.codec_context.name]
        decoder = cast(av.VideoCodecContext, av.CodecContext.create(name, "r"))
        for packet in container.demux(stream):
            yield from decoder.decode(packet)


def _stack(path: Path, channel: Callable[[av.VideoFrame], Frames]) -> Frames:
    """One channel group of every frame of a video, an image or a folder of images."""
    with _decoding(path):
        if path.is_dir():
            return np.concatenate([_stack(file, channel) for file in sequence_files(path)])
        if path.suffix.lower() in IMAGES + OPAQUE_IMAGES:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB" if channel is _colour else "L"))[None]
        return _joined(path, [channel(frame) for frame in _video_frames(path)])


def _colour(frame: av.VideoFrame) -> Frames:
    """(H, W, 3); the frame's own colour matrix and range apply."""
    return cast(Frames, frame.to_ndarray(format="rgb24"))


def _alpha(frame: av.VideoFrame) -> Frames:
    """(H, W). Rounded from the plane itself: the scaler would cut 12 bits off to 8 and make 4080 opaque."""
    component = frame.format.components[-1]
    if not frame.format.is_planar:
        return cast(Frames, frame.to_ndarray(format="rgba"))[..., 3]
    return _to_uint8(_plane(frame, component.plane, component.bits) / (2**component.bits - 1))


def _luma(frame: av.VideoFrame) -> Frames:
    """(H, W), stretched to 0..255."""
    if frame.format.is_rgb:
        return np.ascontiguousarray(_colour(frame)[..., 1])
    bits = frame.format.components[0].bits
    luma = _plane(frame, 0, bits)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith(("yuvj", "gray"))
    if full:
        return _to_uint8(luma / (2**bits - 1))
    return _to_uint8((luma / 2 ** (bits - 8) - 16) / 219)


def _plane(frame: av.VideoFrame, index: int, bits: int) -> NDArray[np.float32]:
    plane = frame.planes[index]
    values = np.frombuffer(memoryview(plane), np.uint8 if bits <= 8 else np.uint16)
    rows = values.reshape(-1, plane.line_size // values.itemsize)
    return rows[: frame.height, : frame.width].astype(np.float32)


def _to_uint8(unit: NDArray[np.float32]) -> Frames:
    return (unit.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _has_alpha(pixels: av.VideoFormat | None) -> bool:
    return pixels is not None and any(component.is_alpha for component in pixels.components)


def _animation(image: Image.Image) -> tuple[int, int]:
    """First frame and number of frames; the default image of some APNG is not part of the animation."""
    first = int(getattr(image, "default_image", False))
    return first, getattr(image, "n_frames", 1) - first


def _frame_rate(image: Image.Image) -> float | None:
    """Of an animation with a duration (ms) per frame: the mean."""
    first, count = _animation(image)
    total = 0.0
    for i in range(first, first + count):
        image.seek(i)
        image.load()  # WebP knows a frame's duration only once it is decoded
        total += image.info.get("duration") or 0
    return 1000 * count / total if total > 0 else None


def _lossy_image(path: Path) -> bool:
    if path.suffix.lower() != ".webp":
        return path.suffix.lower() in (".jpg", ".jpeg")
    return b"VP8 " in path.read_bytes()  # the chunk of lossy WebP; lossless is VP8L


def _rate(stream: av.VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _cut(picture: Frames, rect: Rect) -> Frames:
    x, y, width, height = rect
    return picture[y : y + height, x : x + width]


def _joined(name: object, frames: list[Frames]) -> Frames:
    if not frames:
        raise MediaError(f"{name}: no frame could be decoded; the file is empty or damaged")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise MediaError(f"{name}: the size changes between frames; split the file where it does")
    return np.stack(frames)


@contextmanager
def _decoding(name: object) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{name}: no such file") from error
    except DECODER_ERRORS as error:
        raise MediaError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error
