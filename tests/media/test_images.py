import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

from acetate.media.clip import Limits, MediaError
from acetate.media.color import encode_srgb
from acetate.media.images import describe_image, image_halves, image_size, read_image
from tests.media.films import ffmpeg, needs_ffmpeg


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def encode(path, pixels, codec, name):
    """One picture by FFmpeg's encoder; `pixels` as bytes of format `name`, planes one after the
    other."""
    height, width = pixels.shape[-3:-1] if name.startswith(("rgba", "ya")) else pixels.shape[-2:]
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.time_base = (
        width,
        height,
        name,
        Fraction(1),
    )
    frame = av.VideoFrame(width, height, name)
    planes = [pixels.reshape(height, -1)] if frame.format.is_planar is False else list(pixels)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.frombuffer(plane, values.dtype).reshape(height, -1)
        rows[:, : values.shape[1]] = values
    path.write_bytes(
        b"".join(bytes(packet) for packet in context.encode(frame) + context.encode(None))
    )
    return path


def tiff(path, pixels, extra, kind, orientation=1):
    """An uncompressed little-endian TIFF of (H, W, 4) with the given ExtraSamples; kind: 1
    integers, 3 floats."""
    height, width, _ = pixels.shape
    bits = pixels.dtype.itemsize * 8
    data = pixels.tobytes()
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 4, 8), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 24),
            (274, 3, 1, orientation), (277, 3, 1, 4), (278, 4, 1, height), (279, 4, 1, len(data)),
            (338, 3, 1, extra),
            (339, 3, 4, 16)]  # fmt: skip
    head = struct.pack("<4H4H", *[bits] * 4, *[kind] * 4)
    # little-endian: a short is an int's first half
    entries = [struct.pack("<HHII", *entry) for entry in tags]
    directory = struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 24 + len(data)) + head + data + directory)
    return path


def rounded(values):
    return np.floor(values / 65535 * 255 + 0.5).astype(np.uint8)


def test_sixteen_bit_png_is_rounded_not_cut(tmp_path):
    pixels = noise(9, 7, 4, dtype=np.uint16)
    path = encode(tmp_path / "a.png", pixels.astype(">u2"), "png", "rgba64be")
    clip = read_image(path)
    assert np.array_equal(clip.frames[0], rounded(pixels)) and clip.notes == (
        "16 bits rounded to 8",
    )
    assert (clip.premultiplied, clip.lossy, describe_image(path).alpha, image_size(path)) == (
        False,
        False,
        True,
        (7, 9),
    )


def test_sixteen_bit_grey_with_alpha(tmp_path):
    pixels = noise(8, 6, 2, dtype=np.uint16)
    clip = read_image(encode(tmp_path / "a.png", pixels.astype(">u2"), "png", "ya16be"))
    grey = rounded(pixels)
    assert np.array_equal(clip.frames[0], grey[..., [0, 0, 0, 1]])


def test_grey_with_alpha_and_palette(tmp_path):
    grey = noise(8, 6, 2)
    Image.fromarray(grey, "LA").save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").frames[0], grey[..., [0, 0, 0, 1]])


@pytest.mark.parametrize(("extra", "name"), [(2, "unassociated"), (1, "associated")])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_says_whether_color_is_multiplied(tmp_path, dtype, extra, name):
    straight = np.random.default_rng(1).uniform(0.2, 1, (6, 8, 4)).astype(np.float32)
    stored = straight.copy()
    if extra == 1:
        stored[..., :3] *= stored[..., 3:]
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    path = tiff(
        tmp_path / "a.tif",
        (stored * top).round(0 if top > 1 else 9).astype(dtype),
        extra,
        3 if top == 1 else 1,
    )
    if top == 1:
        straight[..., :3] = encode_srgb(straight[..., :3])
    tolerance = 6 if dtype == np.uint8 and extra == 1 else 1  # 8-bit quotients by alpha of 0.2
    assert np.abs(read_image(path).frames[0].astype(int) - straight * 255).max() <= tolerance
    assert describe_image(path).alpha and image_size(path) == (8, 6)


def test_tiff_with_an_unnamed_channel_is_refused(tmp_path):
    for dtype, reason in (
        (np.uint8, "mode RGB has no alpha"),
        (np.uint16, "no channel that ExtraSamples calls alpha"),
    ):
        with pytest.raises(MediaError, match=reason):
            read_image(tiff(tmp_path / "a.tif", noise(4, 4, 4, dtype=dtype), 0, 1))


def test_tiff_of_inks_is_refused_by_its_name(tmp_path):
    inks = np.zeros((16, 16, 5), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", inks, photometric="separated", extrasamples=[2])
    with pytest.raises(MediaError, match=r"a\.tif: its colour is CMYK; save it as RGBA"):
        read_image(tmp_path / "a.tif")


def test_exr_is_linear_and_premultiplied(tmp_path):
    straight = np.random.default_rng(2).uniform(0, 1, (6, 8, 4)).astype(np.float32)
    straight[0, 0] = (0.5, 0.25, 1, 0)  # light without alpha
    stored = np.concatenate((straight[..., :3] * straight[..., 3:], straight[..., 3:]), axis=-1)
    stored[0, 0, :3] = 7
    path = encode(
        tmp_path / "a.exr",
        np.moveaxis(stored[..., [1, 2, 0, 3]], -1, 0).copy(),
        "exr",
        "gbrapf32le",
    )
    clip = read_image(path)
    wanted = np.concatenate((encode_srgb(straight[..., :3]), straight[..., 3:]), axis=-1) * 255
    wanted[0, 0] = 0
    assert np.abs(clip.frames[0] - wanted).max() <= 0.51 and "linear" in clip.notes[0]
    assert clip.premultiplied is False and image_size(path) == (8, 6)
    opaque = encode(
        tmp_path / "b.exr", np.moveaxis(stored[..., [1, 2, 0]], -1, 0).copy(), "exr", "gbrpf32le"
    )
    with pytest.raises(MediaError, match="no alpha channel"):
        read_image(opaque)


def test_srgb_curve():
    assert encode_srgb(np.float32([0, 0.0031308, 0.214041, 1])) == pytest.approx(
        [0, 0.04045, 0.5, 1], abs=1e-4
    )


def test_gif_disposal_and_delays(tmp_path):
    """A square that moves, over nothing: its former place must be transparent again."""
    images = []
    for i in range(4):
        image = Image.new("RGBA", (32, 16))
        ImageDraw.Draw(image).rectangle((6 * i, 4, 6 * i + 5, 9), fill=(255, 0, 0, 255))
        images.append(image)
    images[0].save(
        tmp_path / "a.gif",
        save_all=True,
        append_images=images[1:],
        duration=[50, 50, 100, 50],
        disposal=2,
    )
    clip = read_image(tmp_path / "a.gif")
    assert clip.fps == 20 and len(clip.frames) == 5
    for frame, i in zip(clip.frames, (0, 1, 2, 2, 3), strict=True):
        assert np.array_equal(frame[..., 3], np.asarray(images[i])[..., 3])
    Image.new("P", (4, 4)).save(tmp_path / "b.gif")
    with pytest.raises(MediaError, match=r"b\.gif: no pixel of any frame is transparent"):
        read_image(tmp_path / "b.gif")


def test_avif(tmp_path):
    frames = np.zeros((1, 16, 16, 4), np.uint8)
    frames[:, 4:12, 4:12] = (200, 60, 60, 255)
    Image.fromarray(frames[0]).save(tmp_path / "a.avif", quality=90)
    clip = read_image(tmp_path / "a.avif")
    assert clip.lossy and np.abs(clip.frames[..., 3].astype(int) - frames[..., 3]).max() <= 8


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# EXIF's orientations: what is shown of the stored pixels.
SHOWN = {
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1), 6: lambda p: p[::-1].swapaxes(0, 1), 7: lambda p: p[::-1,
    ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("name", ["a.png", "deep.png", "a.tif", "deep.tif", "a.webp"])
def test_a_camera_that_was_turned(tmp_path, name, orientation):
    path, pixels = tmp_path / name, noise(4, 6, 4)
    wide = pixels.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = orientation
    if name == "deep.png":
        encode(path, wide.astype(">u2"), "png", "rgba64be")
        data, tail = path.read_bytes(), chunk(b"IEND", b"")
        late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + tail
        path.write_bytes(data.replace(tail, late))
    elif name.endswith(".tif"):
        tiff(path, wide if name == "deep.tif" else pixels, 2, 1, orientation)
    else:
        Image.fromarray(pixels).save(path, exif=exif, lossless=True, exact=True)
    shown = SHOWN[orientation](pixels)
    assert np.array_equal(read_image(path).frames[0], shown)
    assert np.array_equal(image_halves(path)[0], shown[..., :3])
    header = describe_image(path)
    assert (header.height, header.width) == shown.shape[:2]


def png_of(width, height):
    """A bomb: a header that announces more than the file could hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def apng(path, frames, hidden=None):
    """frames: (pixels, x, y, dispose, blend), of which the first fills the picture; hidden: a
    default image."""
    height, width, _ = frames[0][0].shape
    depth = 8 * frames[0][0].dtype.itemsize
    parts, number = [chunk(b"acTL", struct.pack(">II", len(frames), 0))], 0

    def packed(pixels):
        rows = pixels.astype(f">u{depth // 8}").view(np.uint8).reshape(len(pixels), -1)
        return zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())

    if hidden is not None:
        parts.append(chunk(b"IDAT", packed(hidden)))
    for pixels, x, y, dispose, blend in frames:
        size = pixels.shape[1], pixels.shape[0]
        parts.append(
            chunk(b"fcTL", struct.pack(">5I2H2B", number, *size, x, y, 1, 20, dispose, blend))
        )
        number += 1
        if len(parts) == 2:
            parts.append(chunk(b"IDAT", packed(pixels)))
            continue
        data = packed(pixels)
        for half in (data[:20], data[20:]):
            parts.append(chunk(b"fdAT", struct.pack(">I", number) + half))
            number += 1
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 6, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(parts) + chunk(b"IEND", b""))
    return path


# x, y, dispose (1: to nothing, 2: to what was there), blend (1: over)
STEPS = [
    (0, 0, 0, 0),
    (3, 2, 0, 1),
    (1, 1, 1, 1),
    (4, 3, 2, 1),
    (0, 4, 0, 0),
    (2, 0, 1, 0),
    (1, 2, 0, 1),
]


def partial_frames(dtype=np.uint8):
    small = noise(len(STEPS), 5, 6, 4).astype(dtype) * (257 if dtype == np.uint16 else 1)
    whole = noise(12, 14, 4).astype(dtype) * (257 if dtype == np.uint16 else 1)
    return [(whole if i == 0 else small[i], *step) for i, step in enumerate(STEPS)]


@needs_ffmpeg
@pytest.mark.parametrize("hidden", [None, noise(12, 14, 4)[::-1]])
def test_apng_of_partial_soft_frames(tmp_path, hidden):
    path = apng(tmp_path / "a.apng", partial_frames(), hidden)
    clip = read_image(path)
    theirs = ffmpeg("-i", path, "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgba", "-")
    difference = np.abs(
        np.frombuffer(theirs, np.uint8).reshape(clip.frames.shape).astype(int) - clip.frames
    )
    assert difference[..., 3].max() <= 1 and difference[clip.frames[..., 3] > 64].max() <= 3
    assert (clip.fps, clip.notes, describe_image(path).frames) == (20, (), len(STEPS))


def test_apng_of_sixteen_bits_is_rounded(tmp_path):
    eight = read_image(apng(tmp_path / "a.apng", partial_frames())).frames
    deep = read_image(apng(tmp_path / "b.apng", partial_frames(np.uint16)))
    assert np.array_equal(deep.frames, eight) and deep.notes == ("16 bits rounded to 8",)
    pictures = noise(2, 9, 7, 4, dtype=np.uint16)
    clip = read_image(apng(tmp_path / "c.apng", [(picture, 0, 0, 0, 0) for picture in pictures]))
    assert np.array_equal(clip.frames, rounded(pictures))


def test_apng_with_palette(tmp_path):
    images = [Image.fromarray(noise(9, 7, 4)).quantize(16) for _ in range(2)]
    images[1].paste(3, (2, 2, 5, 5))
    images[0].save(
        tmp_path / "a.png", format="PNG", save_all=True, append_images=images[1:], duration=50
    )
    expected = np.stack([np.asarray(image.convert("RGBA")) for image in images])
    assert np.array_equal(read_image(tmp_path / "a.png").frames, expected)


def test_damaged_apng(tmp_path):
    whole = noise(9, 7, 4)
    outside = apng(tmp_path / "a.apng", [(whole, 0, 0, 0, 0), (whole[:5, :5], 4, 2, 0, 0)])
    with pytest.raises(MediaError, match=r"a frame of 5x5 at 4, 2 in 7x9"):
        read_image(outside)
    data = apng(tmp_path / "b.apng", [(whole, 0, 0, 0, 0)] * 3).read_bytes()
    for broken, reason in (
        (data[:-12], "the file is cut off"),
        (data[:-40] + bytes((data[-40] ^ 1,)) + data[-39:], "checksum of chunk b'fdAT' is wrong"),
        (data.replace(chunk(b"acTL", struct.pack(">II", 3, 0)), chunk(b"acTL", struct.pack(">II", 5,
        0))),
         "announces 5 frames and holds 3"),
    ):  # fmt: skip
        (tmp_path / "b.apng").write_bytes(broken)
        with pytest.raises(MediaError, match=reason):
            read_image(tmp_path / "b.apng")


def test_bombs_are_refused_from_their_headers(tmp_path):
    for side, reason in (
        (9000, "9000x9000; a picture has at most max_pixels"),
        (60000, "DecompressionBombError"),
    ):
        (tmp_path / "a.png").write_bytes(png_of(side, side))
        with pytest.raises(MediaError, match=reason):
            read_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png_of(2000, 2000))
    with pytest.raises(MediaError, match=r"0\.01 GiB decoded; the limit is 0\.00 GiB"):
        read_image(tmp_path / "b.png", Limits(max_bytes=10**6))
    images = [Image.fromarray(noise(4, 4, 4)) for _ in range(2)]
    images[0].save(tmp_path / "c.apng", format="PNG", save_all=True, append_images=images[1:])
    data = bytearray((tmp_path / "c.apng").read_bytes())
    at = data.index(b"acTL")
    data[at + 4 : at + 8] = struct.pack(">I", 2**30)
    data[at + 12 : at + 16] = struct.pack(">I", zlib.crc32(data[at : at + 12]))
    (tmp_path / "c.apng").write_bytes(data)
    with pytest.raises(MediaError, match=rf"{2**30} frames of 4x4; a clip has at most max_frames"):
        read_image(tmp_path / "c.apng")


def test_content_decides_not_the_suffix(tmp_path):
    """A script that PIL would hand to Ghostscript stays unread."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_image(tmp_path / "a.png")
    Image.fromarray(noise(4, 4, 4)).save(
        tmp_path / "b.png", format="WEBP", lossless=True, exact=True
    )
    assert np.array_equal(read_image(tmp_path / "b.png").frames[0], noise(4, 4, 4))
