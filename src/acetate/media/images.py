"""Stills and animated images: PNG, APNG, WebP, GIF, AVIF, TIFF, OpenEXR, Targa, BMP."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from acetate.media.clip import (
    AS_STATED,
    LIMITS,
    Asked,
    Description,
    Frames,
    Limits,
    MediaError,
    RGBAClip,
    decoding,
    joined,
    to_uint8,
)
from acetate.media.color import Conversion, Stated, conversion
from acetate.media.containers import crop_of, missing_bytes
from acetate.media.deep import (
    NO_ALPHA,
    ROUNDED,
    Unit,
    deep_header,
    deep_pixels,
    divides,
    pages_note,
    png_pixels,
    read_deep,
    to_srgb,
)
from acetate.media.frame_times import Rate, constant_rate, delays_as_shown
from acetate.media.placement import Placement, aspect_of, oriented
from acetate.media.png import Header, composed, png_header

IMAGES = (
    ".png", ".apng", ".webp", ".gif", ".avif", ".avifs", ".tif", ".tiff", ".exr", ".tga", ".bmp",
)  # fmt: skip
OPAQUE_IMAGES = (".jpg", ".jpeg")  # good for either half of a pair
# By content, whatever the suffix says; without the formats for which PIL starts other programs.
FORMATS = ("PNG", "WEBP", "GIF", "AVIF", "TIFF", "JPEG", "TGA", "BMP")
WITH_DENSITY = ("PNG", "TIFF", "JPEG")  # whose pixels' shape is taken from it
GREY = 0  # PNG's colour type


def read_image(path: Path, limits: Limits = LIMITS, asked: Asked = AS_STATED) -> RGBAClip:
    """Animations are composed (partial frames, dispose, blend) and come out at a constant rate.

    PNG, WebP, GIF and AVIF are straight by definition. TIFF says so itself (ExtraSamples). OpenEXR
    is premultiplied and linear by definition: colour is divided by alpha, unless `asked` says
    otherwise, cut off at 1 and encoded as sRGB; light without alpha (a glow that adds) has no
    straight colour and is lost. Floating-point TIFF is taken as linear too. More than 8 bits are
    rounded. The colour that a file states becomes sRGB (`media.color`). Raises MediaError.
    """
    with decoding(path):
        deep = deep_header(path, asked)
        if deep is not None:
            frame, notes = read_deep(path, deep, limits, asked)
            return RGBAClip(frame[None], None, False, False, tuple(notes))
        with _opened(path) as image:
            png = _png(path, image)
            if not _may_have_alpha(image, png):
                raise MediaError(f"{path}: mode {image.mode} has no alpha channel; {NO_ALPHA}")
            first, count = _animation(image)
            limits.check(path, count, *image.size)
            limits.check_memory(path, count, 4 * image.width * image.height)
            deep_frames = png is not None and png.bits == 16
            notes = [ROUNDED] if deep_frames else []
            change, placement = _change(path, image, png), _placement(path, image)
            notes += [change.note] if change else []
            notes += placement.notes()
            notes += pages_note(path) if image.format == "TIFF" else []
            delays = []

            def shown() -> Iterator[Frames]:
                for rgba, delay in _pictures(path, image, png, first, count):
                    delays.append(delay)
                    if change is not None:
                        rgba = np.concatenate((change.apply(rgba[..., :3]), rgba[..., 3:]), axis=-1)
                    yield placement.apply(rgba)

            clip = joined(path, shown(), count)
            if len(clip) < count:
                raise MediaError(
                    f"{path}: announces {count} frames and holds {len(clip)}; the file is cut off"
                )
            if missing := _cut_off(path, image):
                notes.append(missing)
            lossy, is_gif = _lossy(path, image), image.format == "GIF"
        if is_gif and clip[..., 3].min() == 255:
            raise MediaError(f"{path}: no pixel of any frame is transparent; {NO_ALPHA}")
        if count == 1:
            return RGBAClip(clip, None, lossy, False, tuple(notes))
        rate = _rate(path, delays, limits)
        if rate.note is None:
            return RGBAClip(clip, rate.fps, lossy, False, tuple(notes))
        limits.check_memory(path, len(rate.indices), clip[0].nbytes)
        return RGBAClip(clip[rate.indices], rate.fps, lossy, False, (*notes, rate.note))


def describe_image(path: Path, limits: Limits = LIMITS, asked: Asked = AS_STATED) -> Description:
    """Describes an image from its header. frames: of the file. A GIF may turn out opaque once its
    frames are seen."""
    with decoding(path):
        deep = deep_header(path, asked)
        if deep is not None:
            limits.check(path, 1, deep.width, deep.height)
            size = deep.placement.size(deep.width, deep.height)
            divided = divides(deep, asked) if deep.associated or deep.bits == 32 else None
            return Description(1, *size, False, deep.alpha, divided=divided)
        with _opened(path) as image:
            count = _animation(image)[1]
            limits.check(path, count, *image.size)
            limits.check_memory(path, count, 4 * image.width * image.height)
            size = _placement(path, image).size(*image.size)
            alpha = _may_have_alpha(image, _png(path, image))
            return Description(count, *size, _lossy(path, image), alpha)


def image_size(path: Path) -> tuple[int, int]:
    """Reads width and height from the header; nothing is decoded. Raises MediaError for what is not
    one still."""
    with decoding(path):
        deep = deep_header(path)
        if deep is not None:
            return deep.placement.size(deep.width, deep.height)
        with _opened(path) as image:
            if _animation(image)[1] != 1:
                raise MediaError(f"{path}: an animation, not a still")
            return image.size


def image_halves(path: Path, limits: Limits = LIMITS) -> tuple[Frames, Frames]:
    """Reads colour (H, W, 3), in sRGB, and luma (H, W), as stored, of an image; one of the two is
    half of a pair."""
    with decoding(path):
        deep = deep_header(path)
        if deep is not None:
            pixels = deep_pixels(path, deep, limits)[..., :3]
            color = to_uint8(to_srgb(pixels, deep.stated)[0])
            return color, np.asarray(Image.fromarray(to_uint8(pixels)).convert("L"))
        with _opened(path) as image:
            limits.check(path, 1, *image.size)
            placement, change = _placement(path, image), _change(path, image, _png(path, image))
            color, luma = np.asarray(image.convert("RGB")), np.asarray(image.convert("L"))
            if change is not None:
                color = cast(Frames, change.apply(color))
            return placement.apply(color), placement.apply(luma)


def _pictures(
    path: Path, image: Image.Image, png: Header | None, first: int, count: int
) -> Iterator[tuple[Frames, float]]:
    """Yields (H, W, 4) as stored, and for how many milliseconds each is shown."""
    if png is not None and count > 1:
        decode = _eight_bits if png.bits < 16 else png_pixels
        for picture, delay in islice(composed(path.read_bytes(), decode), count):
            yield to_uint8(picture), delay
        return
    for i in range(first, first + count):
        image.seek(i)
        if png is not None and png.color_type == GREY and png.bits < 8 and png.transparent:
            rgba = _keyed_grey(image, png)
        else:
            rgba = np.asarray(image.convert("RGBA"))
        yield rgba, float(image.info.get("duration") or 0)  # of WebP known once it is decoded


def _keyed_grey(image: Image.Image, png: Header) -> Frames:
    """Reads grey with a transparent level itself: PIL (13.0) compares that, as it is stored, with
    levels of 8 bits."""
    grey = np.asarray(image.convert("L"))
    level = int.from_bytes(png.transparent or b"", "big") * 255 // (2**png.bits - 1)
    alpha = np.where(grey == level, 0, 255).astype(np.uint8)
    return np.stack((grey, grey, grey, alpha), axis=-1)


def _png(path: Path, image: Image.Image) -> Header | None:
    """Reads a PNG; its checksums are compared, too, which PIL does not do."""
    return png_header(path.read_bytes()) if image.format == "PNG" else None


def _change(path: Path, image: Image.Image, png: Header | None) -> Conversion | None:
    """Returns what turns its colour into sRGB, if it is another."""
    stated = png.stated if png is not None else Stated(icc=image.info.get("icc_profile") or None)
    if image.format == "AVIF" and stated.icc is None:
        stated = _nclx(path)
    return conversion(stated)


def _nclx(path: Path) -> Stated:
    """Reads the colour information box of code points (ISO 14496-12, 12.1.5), which PIL does not
    hand out."""
    with open(path, "rb") as file:
        head = file.read(65536)
    at = head.find(b"colrnclx") + 8
    if at < 8 or at + 4 > len(head):
        return Stated()
    primaries, transfer = head[at + 1], head[at + 3]
    return Stated(primaries=primaries, transfer=transfer)


def _placement(path: Path, image: Image.Image) -> Placement:
    """Returns the placement that is still to be applied: PIL turns a TIFF itself."""
    across, down = image.info.get("dpi") or image.info.get("aspect") or (1, 1)
    if image.format == "JPEG" and image.info.get("jfif_unit") == 0:
        across, down = image.info.get("jfif_density", (1, 1))
    known = image.format in WITH_DENSITY and across
    aspect = aspect_of(float(down) / float(across) if known else None)
    if image.format == "TIFF":
        return oriented(1, aspect)
    turned = oriented(image.getexif().get(Base.Orientation, 1), aspect)
    return turned._replace(crop=crop_of(path, *image.size)) if image.format == "AVIF" else turned


def _cut_off(path: Path, image: Image.Image) -> str | None:
    if image.format in ("WEBP", "AVIF") and (missing := missing_bytes(path)):
        return f"the file ends {missing} bytes early: it is cut off"
    if image.format == "GIF" and not path.read_bytes().rstrip(b"\0\r\n ").endswith(b";"):
        return "the file has no end mark: it is perhaps cut off"
    return None


def _eight_bits(file: bytes) -> Unit:
    """Reads a PNG, (H, W, 4)."""
    with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGBA")).astype(np.float32) / np.float32(255)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image, but not by its path: PIL would map an uncompressed TIFF into memory, and turn
    that wrongly (13.0)."""
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        yield image


def _animation(image: Image.Image) -> tuple[int, int]:
    """Returns first frame and number of frames; the default image of some APNG is not part of it,
    nor are pages of a TIFF."""
    first = int(getattr(image, "default_image", False))
    return first, 1 if image.format == "TIFF" else getattr(image, "n_frames", 1) - first


def _rate(path: Path, delays: list[float], limits: Limits) -> Rate:
    shown = np.cumsum([0.0, *delays_as_shown(delays)]) / 1000
    return constant_rate(path, shown[:-1], shown[-1], 0.001, limits.max_frames)


def _may_have_alpha(image: Image.Image, png: Header | None) -> bool:
    """Returns whether alpha may come: a GIF's first frame may be opaque and a later one not."""
    keyed = png is not None and png.transparent is not None
    return image.has_transparency_data or keyed or image.format == "GIF"


def _lossy(path: Path, image: Image.Image) -> bool:
    if image.format == "WEBP":
        return b"VP8 " in path.read_bytes()  # the chunk of lossy WebP; lossless is VP8L
    return image.format in ("JPEG", "AVIF")
