"""Stills and animated images: PNG, APNG, WebP, GIF, AVIF, TIFF, OpenEXR, Targa, BMP."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import av
import numpy as np
from av.video.plane import VideoPlane
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    IMAGELENGTH,
    IMAGEWIDTH,
    SAMPLEFORMAT,
    ImageFileDirectory_v2,
)

from acetate.media.apng import SIGNATURE, chunks, composed
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
from acetate.media.exr_header import exr_size
from acetate.media.frame_times import Rate, constant_rate, delays_as_shown

IMAGES = (
    ".png",
    ".apng",
    ".webp",
    ".gif",
    ".avif",
    ".avifs",
    ".tif",
    ".tiff",
    ".exr",
    ".tga",
    ".bmp",
)
OPAQUE_IMAGES = (".jpg", ".jpeg")  # good for either half of a pair
# By content, whatever the suffix says; without the formats for which PIL starts other programs.
FORMATS = ("PNG", "WEBP", "GIF", "AVIF", "TIFF", "JPEG", "TGA", "BMP")
NO_ALPHA = "save it as RGBA, or give a matte as NAME_fgr + NAME_pha"
# EXIF orientation -> counterclockwise quarter turns, after a mirror image where it says so.
TURNS = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (1, True),
    6: (3, False),
    7: (3, True),
    8: (1, False),
}
ROUNDED = "16 bits rounded to 8"
UNPREMULTIPLIED_FLOOR = 1e-6  # alpha below it carries no colour
Unit = NDArray[np.float32]
Pixels = TypeVar("Pixels", Frames, Unit)


class Deep(NamedTuple):
    """A still of more than 8 bits a channel, from its header. decoder: FFmpeg's; it keeps them all,
    PIL does not."""

    decoder: str
    bits: int  # 16: integers; 32: floating point, of 16 or 32 bits
    width: int  # as shown
    height: int
    alpha: bool
    associated: bool  # colour is multiplied by alpha
    orientation: int


def read_image(path: Path, limits: Limits = LIMITS) -> RGBAClip:
    """Animations are composed (partial frames, dispose, blend) and come out at a constant rate.

    PNG, WebP, GIF and AVIF are straight by definition. TIFF says so itself (ExtraSamples). OpenEXR
    is premultiplied and linear by definition: colour is divided by alpha, cut off at 1 and encoded
    as sRGB; light without alpha (a glow that adds) has no straight colour and is lost.
    Floating-point TIFF is taken as linear too. More than 8 bits are rounded. Raises MediaError.
    """
    with decoding(path):
        deep = deep_header(path)
        if deep is not None:
            limits.check(path, 1, deep.width, deep.height)
            frame, note = _read_deep(path, deep)
            return RGBAClip(frame[None], None, False, False, (note,))
        with _opened(path) as image:
            if not _may_have_alpha(image):
                raise MediaError(f"{path}: mode {image.mode} has no alpha channel; {NO_ALPHA}")
            first, count = _animation(image)
            limits.check(path, count, *image.size)
            limits.check_memory(path, count, 4 * image.width * image.height)
            delays = []
            notes = (ROUNDED,) if count > 1 and _sixteen_bits(path) else ()

            def shown() -> Iterator[Frames]:
                if image.format == "PNG" and count > 1:
                    decode = _eight_bits if not notes else lambda file: _decoded(path, "png", file)
                    for picture, delay in islice(composed(path.read_bytes(), decode), count):
                        yield to_uint8(picture)
                        delays.append(delay)
                    return
                for i in range(first, first + count):
                    image.seek(i)
                    rgba = np.asarray(image.convert("RGBA"))
                    yield rgba if count > 1 else _upright(rgba, _orientation(image))
                    # of WebP known once the frame is decoded
                    delays.append(float(image.info.get("duration") or 0))

            clip = joined(path, shown(), count)
            if len(clip) < count:
                raise MediaError(
                    f"{path}: announces {count} frames and holds {len(clip)}; the file is cut off"
                )
            lossy, is_gif = _lossy(path, image), image.format == "GIF"
        if is_gif and clip[..., 3].min() == 255:
            raise MediaError(f"{path}: no pixel of any frame is transparent; {NO_ALPHA}")
        if count == 1:
            return RGBAClip(clip, None, lossy, False)
        rate = _rate(path, delays, limits)
        if rate.note is None:
            return RGBAClip(clip, rate.fps, lossy, False, notes)
        limits.check_memory(path, len(rate.indices), clip[0].nbytes)
        return RGBAClip(clip[rate.indices], rate.fps, lossy, False, (*notes, rate.note))


def describe_image(path: Path, limits: Limits = LIMITS) -> Description:
    """frames: of the file. A GIF may turn out opaque once its frames are seen."""
    with decoding(path):
        deep = deep_header(path)
        if deep is not None:
            limits.check(path, 1, deep.width, deep.height)
            return Description(1, deep.width, deep.height, False, deep.alpha)
        with _opened(path) as image:
            count = _animation(image)[1]
            limits.check(path, count, *image.size)
            limits.check_memory(path, count, 4 * image.width * image.height)
            width, height = image.size
            if count == 1 and _orientation(image) > 4:
                width, height = height, width
            return Description(count, width, height, _lossy(path, image), _may_have_alpha(image))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height from the header; nothing is decoded. MediaError for what is not one
    still."""
    with decoding(path):
        deep = deep_header(path)
        if deep is not None:
            return deep.width, deep.height
        with _opened(path) as image:
            if _animation(image)[1] != 1:
                raise MediaError(f"{path}: an animation, not a still")
            return image.size


def image_halves(path: Path, limits: Limits = LIMITS) -> tuple[Frames, Frames]:
    """Colour (H, W, 3) and luma (H, W) of an image; one of the two is half of a pair."""
    with decoding(path):
        deep = deep_header(path)
        if deep is not None:
            limits.check(path, 1, deep.width, deep.height)
            pixels = _decoded(path, deep.decoder, path.read_bytes(), deep.orientation)[..., :3]
            image = Image.fromarray(to_uint8(encode_srgb(pixels) if deep.bits == 32 else pixels))
            return np.asarray(image), np.asarray(image.convert("L"))
        with _opened(path) as image:
            limits.check(path, 1, *image.size)
            halves = np.asarray(image.convert("RGB")), np.asarray(image.convert("L"))
            colour, luma = (_upright(half, _orientation(image)) for half in halves)
            return colour, luma


def encode_srgb(linear: Unit) -> Unit:
    """IEC 61966-2-1, [0, 1] to [0, 1]."""
    linear = linear.clip(0, 1)
    return np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    ).astype(np.float32)


def deep_header(path: Path) -> Deep | None:
    """None for a file that PIL reads without loss, by its content."""
    with open(path, "rb") as file:
        head = file.read(65536)
    if head[:4] == b"v/1\x01":
        width, height, channels = exr_size(head)
        return _deep("exr", 32, (width, height), "A" in channels, True, 1)
    if _sixteen_bits(path) and b"acTL" not in head[: head.find(b"IDAT")]:
        width, height, colour_type = struct.unpack(">II", head[16:24]) + (head[25],)
        exif = next(
            (contents for kind, contents in chunks(path.read_bytes()) if kind == b"eXIf"), b""
        )
        alpha = colour_type >= 4 or b"tRNS" in head[: head.find(b"IDAT")]
        return _deep("png", 16, (width, height), alpha, False, _in_exif(exif))
    if head[:4] in (b"II*\0", b"MM\0*"):
        return _deep_tiff(path)
    return None


def _deep_tiff(path: Path) -> Deep | None:
    """ExtraSamples 1 is associated (premultiplied) alpha, 2 unassociated (straight); 0 could be
    anything."""
    with open(path, "rb") as file:
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
    bits, extra = max(tags.get(BITSPERSAMPLE, (1,))), tags.get(EXTRASAMPLES, ())
    if bits <= 8:
        return None
    if bits not in (16, 32) or (bits == 32) != (3 in tags.get(SAMPLEFORMAT, ())):
        raise MediaError(
            f"{path}: {bits}-bit samples; TIFF is read with 8 or 16 bits or 32-bit floats"
        )
    size = tags[IMAGEWIDTH], tags[IMAGELENGTH]
    return _deep(
        "tiff", bits, size, 1 in extra or 2 in extra, 1 in extra, tags.get(Base.Orientation, 1)
    )


def _deep(
    decoder: str, bits: int, size: tuple[int, int], alpha: bool, associated: bool, orientation: int
) -> Deep:
    """size: width and height as stored."""
    width, height = size[::-1] if orientation > 4 else size
    return Deep(decoder, bits, width, height, alpha, associated, orientation)


def _sixteen_bits(path: Path) -> bool:
    """Whether it is a PNG of that depth."""
    with open(path, "rb") as file:
        head = file.read(25)
    return head[:8] == SIGNATURE and head[24:] == b"\x10"


def _read_deep(path: Path, deep: Deep) -> tuple[Frames, str]:
    """One frame (H, W, 4), straight sRGB; and what was done."""
    if not deep.alpha:
        what = (
            "no channel that ExtraSamples calls alpha"
            if deep.decoder == "tiff"
            else "no alpha channel"
        )
        raise MediaError(f"{path}: {what}; {NO_ALPHA}")
    pixels = _decoded(path, deep.decoder, path.read_bytes(), deep.orientation)
    if pixels.shape[-1] != 4:
        raise MediaError(
            f"{path}: FFmpeg's {deep.decoder} decoder drops its alpha; save it as 8-bit RGBA"
        )
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if deep.associated:
        visible = alpha > UNPREMULTIPLIED_FLOOR
        colour = np.where(visible, colour / np.where(visible, alpha, 1), 0)
    if deep.bits == 32:
        colour = encode_srgb(colour)
    note = "linear light encoded as 8-bit sRGB" if deep.bits == 32 else ROUNDED
    return to_uint8(
        np.concatenate((colour, alpha), axis=-1)
    ), note + ", divided by alpha" * deep.associated


def _decoded(path: Path, decoder: str, data: bytes, orientation: int = 1) -> Unit:
    """(H, W, 3 or 4), upright, in [0, 1] for integers."""
    context = cast(av.VideoCodecContext, av.CodecContext.create(decoder, "r"))
    frames = context.decode(av.Packet(data)) + context.decode(None)
    if not frames:
        raise MediaError(
            f"{path}: no frame could be decoded; the file is damaged or compressed in an unknown "
            "way"
        )
    return _upright(_deep_pixels(path, frames[0]), orientation)


def _eight_bits(file: bytes) -> Unit:
    """A PNG, (H, W, 4)."""
    with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGBA")).astype(np.float32) / np.float32(255)


def _deep_pixels(path: Path, frame: av.VideoFrame) -> Unit:
    name = frame.format.name
    order = ">" if name.endswith("be") else "<"
    kind, top = ("f4", 1) if "f32" in name else ("f2", 1) if "f16" in name else ("u2", 65535)
    if name.startswith("gbr"):  # planar: green, blue, red, alpha
        planes = [
            _rows(plane, order + kind, frame.height)[:, : frame.width] for plane in frame.planes
        ]
        pixels = np.stack([planes[i] for i in (2, 0, 1, 3)[: len(planes)]], axis=-1)
    else:
        names = {"rgba": 4, "rgb": 3, "ya": 2, "gray": 1}
        count = next((names[n] for n in names if name.startswith(n)), 0)
        if not count:
            raise MediaError(f"{path}: pixel format {name} is not read; save it as RGBA")
        rows = _rows(frame.planes[0], order + kind, frame.height)[:, : frame.width * count]
        pixels = rows.reshape(frame.height, frame.width, count)
        if count < 3:
            pixels = np.concatenate((pixels[..., :1].repeat(3, axis=-1), pixels[..., 1:]), axis=-1)
    return pixels.astype(np.float32) / np.float32(top)


def _rows(plane: VideoPlane, dtype: str, height: int) -> NDArray[np.generic]:
    values = np.frombuffer(memoryview(plane), dtype)
    return values.reshape(-1, plane.line_size // values.itemsize)[:height]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Not by its path: PIL would map an uncompressed TIFF into memory, and turn that wrongly
    (13.0)."""
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        yield image


def _orientation(image: Image.Image) -> int:
    """That is still to be applied: PIL turns a TIFF itself."""
    return 1 if image.format == "TIFF" else image.getexif().get(Base.Orientation, 1)


def _in_exif(data: bytes) -> int:
    exif = Image.Exif()
    exif.load(data)
    return exif.get(Base.Orientation, 1)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """(H, W, ...), turned as the camera's orientation tag says."""
    turns, mirrored = TURNS.get(orientation, (0, False))
    return cast(Pixels, np.rot90(pixels[:, ::-1] if mirrored else pixels, turns))


def _animation(image: Image.Image) -> tuple[int, int]:
    """First frame and number of frames; the default image of some APNG is not part of it, nor are
    pages of a TIFF."""
    first = int(getattr(image, "default_image", False))
    return first, 1 if image.format == "TIFF" else getattr(image, "n_frames", 1) - first


def _rate(path: Path, delays: list[float], limits: Limits) -> Rate:
    shown = np.cumsum([0.0, *delays_as_shown(delays)]) / 1000
    return constant_rate(path, shown[:-1], shown[-1], 0.001, limits.max_frames)


def _may_have_alpha(image: Image.Image) -> bool:
    """A GIF's first frame may be opaque and a later one not."""
    return image.has_transparency_data or image.format == "GIF"


def _lossy(path: Path, image: Image.Image) -> bool:
    if image.format == "WEBP":
        return b"VP8 " in path.read_bytes()  # the chunk of lossy WebP; lossless is VP8L
    return image.format in ("JPEG", "AVIF")
