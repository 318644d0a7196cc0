"""Stills of more than 8 bits a channel, which PIL would cut down: PNG, TIFF, OpenEXR."""

from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
import tifffile
from av.video.plane import VideoPlane
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base

from acetate.media.clip import AS_STATED, Asked, Frames, Limits, MediaError, to_uint8
from acetate.media.color import LINEAR, Stated, conversion
from acetate.media.exr import MAGIC, Layer, exr_header, read_exr
from acetate.media.placement import Placement, aspect_of, oriented
from acetate.media.png import SIGNATURE, png_header

NO_ALPHA = "save it as RGBA, or give a matte as NAME_fgr + NAME_pha"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ROUNDED = "16 bits rounded to 8"
UNPREMULTIPLIED_FLOOR = 1e-6  # alpha below it carries no colour
INKS = {tifffile.PHOTOMETRIC.SEPARATED: "CMYK", tifffile.PHOTOMETRIC.CIELAB: "CIELAB"}
ASSOCIATED, UNASSOCIATED = 1, 2  # TIFF's ExtraSamples; 0 could be anything
Unit = NDArray[np.float32]


class Deep(NamedTuple):
    """A file of more than 8 bits, as its header says. kind: png, tiff or exr. bits: 16, integers;
    32, floating point of 16 or 32 bits. width and height: as stored. associated: colour is
    multiplied by alpha."""

    kind: str
    bits: int
    width: int
    height: int
    alpha: bool
    associated: bool
    placement: Placement
    stated: Stated
    layer: Layer | None = None


def deep_header(path: Path, asked: Asked = AS_STATED) -> Deep | None:
    """Reads the header by content; None for a file that PIL reads without loss. Raises MediaError
    for a kind of it that is not read."""
    with open(path, "rb") as file:
        head = file.read(32)
    if head[:4] == MAGIC:
        header = exr_header(path, asked.layer)
        return Deep(
            "exr", 32, header.width, header.height, header.layer.alpha, True,
            Placement(aspect=header.aspect), header.stated, header.layer,
        )  # fmt: skip
    if head[:8] == SIGNATURE and head[24:25] == b"\x10":
        png = png_header(path.read_bytes())
        if png.animated:
            return None
        across, down = png.density
        placement = oriented(orientation_in(png.exif), aspect_of(down / across if across else None))
        return Deep(
            "png", 16, png.width, png.height, png.color_type >= 4 or png.transparent is not None,
            False, placement, png.stated,
        )  # fmt: skip
    return _deep_tiff(path) if head[:4] in TIFF else None


def read_deep(
    path: Path, deep: Deep, limits: Limits, asked: Asked = AS_STATED
) -> tuple[Frames, list[str]]:
    """Reads one frame (H, W, 4), straight sRGB; and returns what was done."""
    if not deep.alpha:
        what = (
            "no channel that ExtraSamples calls alpha"
            if deep.kind == "tiff"
            else "no alpha channel"
        )
        raise MediaError(f"{what}; {NO_ALPHA}")
    pixels = deep_pixels(path, deep, limits)
    if pixels.shape[-1] != 4:
        raise MediaError("its alpha is lost in decoding; save it as 8-bit RGBA")
    color, alpha = pixels[..., :3], pixels[..., 3:]
    notes = [] if deep.bits == 32 else [ROUNDED]
    if divides(deep, asked):
        visible = alpha > UNPREMULTIPLIED_FLOOR
        color = np.where(visible, color / np.where(visible, alpha, 1), 0).astype(np.float32)
        notes.append("divided by alpha")
    elif deep.associated:
        notes.append("colour taken as straight, as was said")
    notes += pages_note(path) if deep.kind == "tiff" else []
    color, said = to_srgb(color, deep.stated)
    layer = [f"layer {deep.layer.name}"] if deep.layer and deep.layer.name else []
    notes = [*layer, *said, *notes, *deep.placement.notes()]
    return to_uint8(np.concatenate((color, alpha), axis=-1)), notes


def divides(deep: Deep, asked: Asked) -> bool:
    """Tells whether reading divides colour by alpha: linear light by a person's word before the
    format's."""
    if asked.premultiplied is None or (deep.bits == 16 and not deep.associated):
        return deep.associated
    return asked.premultiplied


def to_srgb(color: Unit, stated: Stated) -> tuple[Unit, list[str]]:
    """Converts to sRGB, and returns what was done."""
    change = conversion(stated)
    return (color, []) if change is None else (cast(Unit, change.apply(color)), [change.note])


def deep_pixels(path: Path, deep: Deep, limits: Limits) -> Unit:
    """Reads (H, W, 3 or 4) upright, in [0, 1] for integers."""
    limits.check(path, 1, deep.width, deep.height)
    if deep.layer is not None:
        pixels = read_exr(path, deep.layer)
    elif deep.kind == "tiff":
        pixels = _tiff_pixels(path, deep)
    else:
        pixels = png_pixels(path.read_bytes())
    return deep.placement.apply(pixels)


def png_pixels(data: bytes) -> Unit:
    """Reads (H, W, 3 or 4) in [0, 1] of a PNG with 16 bits, as stored."""
    context = cast(av.VideoCodecContext, av.CodecContext.create("png", "r"))
    frames = context.decode(av.Packet(data)) + context.decode(None)
    if not frames:
        raise MediaError("no frame could be decoded; the file is damaged")
    frame = frames[0]
    name = frame.format.name
    order = ">" if name.endswith("be") else "<"
    names = {"rgba": 4, "rgb": 3, "ya": 2, "gray": 1}
    count = next((names[n] for n in names if name.startswith(n)), 0)
    if not count:
        raise MediaError(f"pixel format {name} is not read; save it as RGBA")
    rows = _rows(frame.planes[0], order + "u2", frame.height)[:, : frame.width * count]
    pixels = rows.reshape(frame.height, frame.width, count)
    return _as_color(pixels).astype(np.float32) / np.float32(65535)


def orientation_in(exif: bytes) -> int:
    """Returns the orientation in an EXIF block."""
    found = Image.Exif()
    found.load(exif)
    return found.get(Base.Orientation, 1)


def _deep_tiff(path: Path) -> Deep | None:
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        bits = max(np.atleast_1d(page.bitspersample))
        if page.extrasamples and page.photometric in INKS:
            raise MediaError(f"its colour is {INKS[page.photometric]}; save it as RGBA")
        if bits <= 8:
            return None
        floats = page.sampleformat == tifffile.SAMPLEFORMAT.IEEEFP
        if bits not in (16, 32) or (bits == 32 and not floats):
            raise MediaError(f"{bits}-bit samples; TIFF is read with 8 or 16 bits or 32-bit floats")
        extra = list(page.extrasamples)
        tags = {name: page.tags.valueof(name) for name in ("Orientation", "InterColorProfile")}
        profile = tags["InterColorProfile"]
        return Deep(
            "tiff", 32 if floats else 16, page.imagewidth, page.imagelength,
            bool({ASSOCIATED, UNASSOCIATED} & set(extra)), ASSOCIATED in extra,
            oriented(tags["Orientation"] or 1, aspect_of(_density(page))),
            Stated(icc=profile, transfer=LINEAR if floats else Stated().transfer),
        )  # fmt: skip


def pages_note(path: Path) -> list[str]:
    """Returns a note where a TIFF holds other pages than smaller versions of its first."""
    with tifffile.TiffFile(path) as file:
        count = sum(not page.is_reduced for page in file.pages)
    return [f"the first of its {count} pages"] if count > 1 else []


def _density(page: tifffile.TiffPage) -> float | None:
    across, down = (page.tags.valueof(name) for name in ("XResolution", "YResolution"))
    try:
        return (down[0] * across[1]) / (down[1] * across[0])
    except (TypeError, ZeroDivisionError):
        return None


def _tiff_pixels(path: Path, deep: Deep) -> Unit:
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        if page.photometric not in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK):
            raise MediaError(f"{page.photometric.name} with more than 8 bits; save it as RGBA")
        pixels = page.asarray(maxworkers=1)
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        own = 3 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
        extra = list(page.extrasamples)
    pixels = pixels.reshape(deep.height, deep.width, -1)
    kept = list(range(own))
    kept += [own + i for i, kind in enumerate(extra) if kind in (ASSOCIATED, UNASSOCIATED)][:1]
    top = 1 if deep.bits == 32 else 65535
    return _as_color(pixels[..., kept].astype(np.float32) / np.float32(top))


def _as_color(pixels: NDArray) -> NDArray:
    """Returns grey, or grey and alpha, as colour."""
    if pixels.shape[-1] > 2:
        return pixels
    return np.concatenate((pixels[..., :1].repeat(3, axis=-1), pixels[..., 1:]), axis=-1)


def _rows(plane: VideoPlane, dtype: str, height: int) -> NDArray[np.generic]:
    values = np.frombuffer(memoryview(plane), dtype)
    return values.reshape(-1, plane.line_size // values.itemsize)[:height]
