"""What a file states of its colour and placement is honoured, whichever decoder reads it, or
refused."""

import struct
import zlib
from itertools import pairwise

import av
import numpy as np
import OpenEXR
import pytest
import tifffile
from av.video.reformatter import ColorPrimaries, ColorTrc
from PIL import Image

from acetate.media.clip import Asked, MediaError
from acetate.media.color import AP0, PRIMARIES, Stated, conversion, decode_srgb, to_bt709
from acetate.media.containers import crop_of, missing_bytes
from acetate.media.images import describe_image, image_halves, read_image
from acetate.media.placement import Placement, oriented, turned_by
from acetate.media.png import SIGNATURE, chunks
from acetate.media.videos import describe_video, read_video
from acetate.video_io import read_rgba
from tests.media.films import card, ffmpeg, needs_ffmpeg, write

QUARTERS = np.array([[(200, 40, 30), (40, 180, 60)], [(30, 60, 200), (220, 200, 40)]])
P3, BT2020 = PRIMARIES[12], PRIMARIES[9]


def picture(size=16):
    """sRGB (H, W, 4): four colours, and alpha that rises to the right."""
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[..., :3] = QUARTERS.repeat(size // 2, axis=0).repeat(size // 2, axis=1)
    rgba[..., 3] = np.linspace(0, 255, size).astype(np.uint8)
    return rgba


def in_other_primaries(rgba, places, top=255):
    """The same picture as a file holds it whose primaries are others; 0..top."""
    light = decode_srgb(rgba[..., :3].astype(np.float32) / 255) @ np.linalg.inv(to_bt709(places)).T
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)
    values = np.concatenate((coded * top, rgba[..., 3:] / 255 * top), axis=-1)
    return np.rint(values).clip(0, top).astype(np.uint8 if top == 255 else np.uint16)


def icc(places):
    """A matrix profile of version 2 with sRGB's curve, adapted to D50 (ICC.1:2001-04)."""
    srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    columns = (srgb @ to_bt709(places)).T

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    levels = np.rint(decode_srgb(np.linspace(0, 1, 1024).astype(np.float32)) * 65535)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + levels.astype(">u2").tobytes()
    text = b"P3 of a test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": xyz((0.9642, 1, 0.8249)), b"cprt": b"text\0\0\0\0none\0",
        **dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, columns), strict=True)),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }  # fmt: skip
    body, table, at = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 0, b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    profile = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(profile)) + profile[4:]


def png_of(parts):
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def with_chunks(path, **more):
    """A PNG with further chunks before its pixels."""
    parts = [*chunks(path.read_bytes())]
    at = next(i for i, (kind, _) in enumerate(parts) if kind == b"IDAT")
    parts[at:at] = [(kind.encode(), data) for kind, data in more.items()]
    path.write_bytes(png_of(parts))
    return path


def near(path, tolerance=2, **asked):
    """Whether the four colours are what they are in sRGB, where alpha lets them be seen."""
    clip = read_rgba(path, asked=Asked(**asked))
    wanted, frame = picture(clip.frames.shape[1]), clip.frames[0]
    seen = wanted[..., 3] > 64
    assert np.abs(frame.astype(int) - wanted)[seen].max() <= tolerance, clip.notes
    return clip.notes


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.avif"])
def test_icc_profiles(tmp_path, name):
    stored = Image.fromarray(in_other_primaries(picture(), P3))
    more = {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": "4:4:4"}
    stored.save(tmp_path / name, icc_profile=icc(P3), **(more if name[2] in "wa" else {}))
    notes = near(tmp_path / name, tolerance=5 if name == "a.avif" else 2)
    assert "ICC profile P3 of a test converted to sRGB" in notes


def test_icc_profile_of_deep_stills(tmp_path):
    stored = in_other_primaries(picture(), P3, 65535)
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["unassalpha"],
        iccprofile=icc(P3), tile=(16, 16), compression="lzw",
    )  # fmt: skip
    assert near(tmp_path / "a.tif")


def test_icc_profile_of_an_animation_and_of_a_pair(tmp_path):
    frames = [Image.fromarray(in_other_primaries(picture(), P3)) for _ in range(2)]
    frames[1].putpixel((0, 0), (1, 2, 3, 255))
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True,
        icc_profile=icc(P3), duration=100,
    )  # fmt: skip
    near(tmp_path / "a.webp")
    frames[0].convert("RGB").save(tmp_path / "b.jpg", icc_profile=icc(P3), quality=100)
    color = image_halves(tmp_path / "b.jpg")[0].astype(int)
    assert np.abs(color[2, 2] - QUARTERS[0, 0]).max() <= 12


def test_a_profile_that_is_none_is_said(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png", icc_profile=b"no profile")
    assert near(tmp_path / "a.png") == ("its ICC profile cannot be read: taken as sRGB",)


def test_png_states_code_points_or_chromaticities(tmp_path):
    def plain(name, rgba):
        Image.fromarray(rgba).save(tmp_path / name)
        return tmp_path / name

    other = in_other_primaries(picture(), P3)
    assert near(with_chunks(plain("a.png", other), cICP=bytes((12, 13, 0, 1))))
    order = (*P3[6:8], *P3[:6])
    places = struct.pack(">8I", *(round(100_000 * place) for place in order))
    gamma = struct.pack(">I", 45455)
    assert near(with_chunks(plain("b.png", other), cHRM=places, gAMA=gamma))
    assert near(with_chunks(plain("c.png", picture()), sRGB=b"\0", gAMA=gamma)) == ()
    linear = np.rint(decode_srgb(picture()[..., :3].astype(np.float32) / 255) * 255)
    rgba = np.dstack((linear, picture()[..., 3])).astype(np.uint8)
    notes = near(with_chunks(plain("d.png", rgba), gAMA=struct.pack(">I", 100_000)), tolerance=9)
    assert notes == ("linear light encoded as sRGB",)
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        hdr = with_chunks(plain("e.png", other), cICP=bytes((9, transfer, 0, 1)))
        with pytest.raises(MediaError, match=rf"e\.png: its transfer is {name} .*tone-map"):
            read_image(hdr)


def test_avif_code_points(tmp_path):
    stored = Image.fromarray(in_other_primaries(picture(), P3))
    stored.save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    data = (tmp_path / "a.avif").read_bytes()
    at = data.index(b"colrnclx") + 8
    for primaries, transfer in ((12, 13), (9, 16)):
        stated = struct.pack(">HH", primaries, transfer)
        (tmp_path / "a.avif").write_bytes(data[:at] + stated + data[at + 4 :])
        if transfer == 13:
            assert near(tmp_path / "a.avif", tolerance=5) == ("Display P3 brought into BT.709's",)
    with pytest.raises(MediaError, match="PQ"):
        read_image(tmp_path / "a.avif")


def exr(path, layers, **header):
    """layers: prefix -> (H, W, C) of linear light; alpha is the fourth."""
    channels = {
        f"{prefix}{name}": np.ascontiguousarray(values[..., i], np.float32)
        for prefix, values in layers.items()
        for i, name in enumerate("RGBA"[: values.shape[-1]])
    }
    with OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, **header}, channels) as file:
        file.write(str(path))
    return path


def light(places=None):
    """Premultiplied linear light of the picture."""
    rgba = picture().astype(np.float32) / 255
    color = decode_srgb(rgba[..., :3])
    if places is not None:
        color = color @ np.linalg.inv(to_bt709(places)).T
    return np.concatenate((color * rgba[..., 3:], rgba[..., 3:]), axis=-1)


def test_exr_chromaticities(tmp_path):
    assert near(exr(tmp_path / "a.exr", {"": light(AP0)}, chromaticities=AP0))
    assert near(exr(tmp_path / "b.exr", {"": light(P3)}, chromaticities=P3))
    assert near(exr(tmp_path / "c.exr", {"": light()}))


def test_exr_layers(tmp_path):
    depth = np.ones((16, 16, 1), np.float32)
    one = {"ViewLayer.Combined.": light(), "ViewLayer.Depth.": depth, "Crypto00.": light() * 0}
    assert near(exr(tmp_path / "a.exr", one))[0] == "layer ViewLayer.Combined"
    lower = {
        f"rgba.{name.lower()}": np.ascontiguousarray(light()[..., i])
        for i, name in enumerate("RGBA")
    }
    with OpenEXR.File({}, lower) as file:
        file.write(str(tmp_path / "b.exr"))
    assert near(tmp_path / "b.exr")[0] == "layer rgba"
    two = exr(tmp_path / "c.exr", {"front.": light(), "back.": light() * 0})
    with pytest.raises(MediaError, match=r"c\.exr: several layers .*back, front.*layer=NAME"):
        read_image(two)
    assert near(two, layer="front")
    with pytest.raises(MediaError, match=r"layer=side is not among its layers"):
        read_image(two, asked=Asked(layer="side"))
    main = exr(tmp_path / "d.exr", {"": light(), "back.": light() * 0})
    assert near(main) == ("linear light encoded as sRGB", "divided by alpha")


def test_exr_windows_and_pixel_shape(tmp_path):
    window = (np.array([0, 0], np.int32), np.array([15, 15], np.int32))
    part = (np.array([4, 2], np.int32), np.array([11, 9], np.int32))
    path = exr(tmp_path / "a.exr", {"": light()[2:10, 4:12]}, dataWindow=part, displayWindow=window)
    frame = read_image(path).frames[0]
    assert frame.shape == (16, 16, 4)
    assert np.array_equal(frame[2:10, 4:12, 3], picture()[2:10, 4:12, 3])
    assert frame[..., 3].sum() == frame[2:10, 4:12, 3].sum()
    wide = exr(tmp_path / "b.exr", {"": light()}, pixelAspectRatio=2.0)
    assert read_image(wide).frames.shape[1:3] == (16, 32)
    assert (describe_image(wide).width, describe_image(wide).height) == (32, 16)


def test_a_persons_word_about_linear_light(tmp_path):
    straight = light()
    alpha = straight[..., 3:]
    straight[..., :3] /= np.where(alpha > 0, alpha, 1)
    path = exr(tmp_path / "a.exr", {"": straight})
    assert "colour taken as straight, as was said" in near(path, premultiplied=False)
    assert describe_image(path).divided is True
    assert describe_image(path, asked=Asked(premultiplied=False)).divided is False


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_with_a_transparent_level_below_eight_bits(tmp_path, bits):
    levels = 2**bits
    rows = [bytes([0]) + bytes([y % 256]) * (16 * bits // 8) for y in range(16)]
    header = struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)
    path = tmp_path / "a.png"
    parts = ((b"IHDR", header), (b"tRNS", struct.pack(">H", levels - 1)),
        (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))  # fmt: skip
    path.write_bytes(png_of(parts))
    values = np.array([
        [(y >> shift) & (levels - 1) for shift in range(8 - bits, -1, -bits)] * (2 * bits)
        for y in range(16)
    ])  # fmt: skip
    frame = read_image(path).frames[0]
    assert np.array_equal(frame[..., 3] == 0, values == levels - 1)
    assert np.array_equal(frame[..., 0], values * 255 // (levels - 1))


def test_transparency_behind_a_long_text(tmp_path):
    rgb = (picture()[..., :3].astype(">u2") * 257).tobytes()
    rows = b"".join(b"\0" + rgb[i : i + 96] for i in range(0, len(rgb), 96))
    key = struct.pack(">3H", *(int(value) * 257 for value in QUARTERS[0, 0]))
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
        (b"tEXt", b"a\0" + b"x" * 70_000), (b"tRNS", key), (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""))  # fmt: skip
    (tmp_path / "a.png").write_bytes(png_of(parts))
    frame = read_image(tmp_path / "a.png").frames[0]
    assert (frame[:8, :8, 3] == 0).all() and (frame[8:, :, 3] == 255).all()


def test_a_wrong_checksum_is_damage(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    at = data.index(b"IDAT")
    length = struct.unpack(">I", data[at - 4 : at])[0]
    data[at + 4 + length] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.png: .*checksum of chunk b'IDAT' is wrong"):
        read_image(tmp_path / "a.png")


def test_density_of_pixels(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    path = with_chunks(tmp_path / "a.png", pHYs=struct.pack(">IIB", 1, 2, 0))
    assert read_image(path).frames.shape[1:3] == (16, 32)
    Image.fromarray(picture()).save(tmp_path / "c.png", dpi=(72, 72.009))
    assert read_image(tmp_path / "c.png").frames.shape[1:3] == (16, 16)


def test_all_eight_placements():
    numbered = np.arange(6).reshape(2, 3).astype(np.uint8)
    seen = {oriented(number).apply(numbered).tobytes() for number in range(1, 9)}
    assert len(seen) == 8
    crop = Placement((1, 0, 2, 2), 2.0, True, 1)
    assert crop.apply(numbered).shape == (4, 2) and crop.size(3, 2) == (2, 4)


@pytest.mark.parametrize("signs", [
    (1, 0, 0, 1), (-1, 0, 0, -1), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0),
    (0, 1, 1, 0), (0, -1, -1, 0),
])  # fmt: skip
def test_display_matrices_move_pixels_where_they_say(signs):
    """x' = a x + c y, y' = b x + d y, moved into the picture (ISO 14496-12, 6.2.2)."""
    a, b, c, d = signs
    one = 65536
    matrix = struct.pack("<9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    turns, mirrored = turned_by(matrix)
    stored = np.arange(12).reshape(3, 4).astype(np.uint8)
    places = [(a * x + c * y, b * x + d * y) for y in range(3) for x in range(4)]
    left, top = (min(place[i] for place in places) for i in (0, 1))
    shown = Placement(mirrored=mirrored, turns=turns).apply(stored)
    for (x, y), value in zip(places, stored.ravel(), strict=True):
        assert shown[y - top, x - left] == value


def test_other_turns_are_refused():
    sine, cosine = round(0.5 * 65536), round(0.866 * 65536)
    with pytest.raises(MediaError, match="turned by 30 degrees; only quarter turns"):
        turned_by(struct.pack("<9i", cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30))


def test_a_mirrored_film(tmp_path):
    frames = card()
    frames[:, 2:6, 2:6] = (0, 255, 0, 255)
    data = bytearray(write(tmp_path / "a.mov", frames, "qtrle", "argb").read_bytes())
    one = 65536
    at = data.index(b"tkhd") + 44  # the matrix
    data[at : at + 36] = struct.pack(">9i", -one, 0, 0, 0, one, 0, 48 * one, 0, 1 << 30)
    (tmp_path / "b.mov").write_bytes(data)
    clip = read_video(tmp_path / "b.mov")
    assert clip.notes == ("mirrored, as the file says",)
    assert np.array_equal(clip.frames, frames[:, :, ::-1])


@pytest.mark.parametrize("codec", ["prores_ks", "libvpx-vp9"])
def test_primaries_and_transfer_whatever_decodes(tmp_path, codec):
    """libvpx hands out neither: the container's word counts."""
    pixels, name = ("yuva444p10le", "a.mov") if codec == "prores_ks" else ("yuva420p", "a.webm")
    flat = np.zeros((3, 64, 64, 4), np.uint8)
    flat[...] = (*in_other_primaries(np.array([[[40, 180, 60, 255]]], np.uint8), BT2020)[0, 0],)
    path = write(
        tmp_path / name, flat, codec, pixels, trc=ColorTrc.BT709, primaries=ColorPrimaries.BT2020
    )
    clip = read_video(path)
    assert "BT.2020 brought into BT.709's" in clip.notes
    assert np.abs(clip.frames[0, 32, 32].astype(int) - (40, 180, 60, 255)).max() <= 6
    hdr = write(
        tmp_path / f"b{name}", flat, codec, pixels, trc=ColorTrc.SMPTE2084,
        primaries=ColorPrimaries.BT2020,
    )  # fmt: skip
    with pytest.raises(MediaError, match=r"PQ \(HDR\)"):
        read_video(hdr)


def webm(path, frames=24):
    """VP9 with alpha."""
    moving = np.stack([np.roll(card(1, 64, 64)[0], 2 * i, axis=1) for i in range(frames)])
    return write(path, moving, "libvpx-vp9", "yuva420p", fps=24)


def test_a_cut_film_is_said(tmp_path):
    data = webm(tmp_path / "a.webm").read_bytes()
    assert missing_bytes(tmp_path / "a.webm") == 0 and not read_video(tmp_path / "a.webm").notes
    (tmp_path / "b.webm").write_bytes(data[: len(data) * 6 // 10])
    clip = read_video(tmp_path / "b.webm")
    assert len(clip.frames) < 24
    live = bytearray(data)  # its segment is of unknown size, as a live stream's
    at = data.index(b"\x18\x53\x80\x67") + 4
    live[at : at + 8] = b"\x01" + b"\xff" * 7
    (tmp_path / "c.webm").write_bytes(live[: len(live) * 6 // 10])
    assert missing_bytes(tmp_path / "c.webm") == 0
    assert "says it lasts 1.00 s" in read_video(tmp_path / "c.webm").notes[0]
    assert f"ends {missing_bytes(tmp_path / 'b.webm')} bytes early: it is cut off" in clip.notes[0]


def test_alpha_in_some_of_the_pictures_only(tmp_path):
    data = bytearray(webm(tmp_path / "a.webm").read_bytes())
    # BlockAdditional, in BlockMore behind BlockAddID 1; Void in its place is no alpha
    marks = [i for i in range(len(data) - 4) if data[i] == 0xEE and data[i + 2] == 1]
    found = [data.index(0xA5, at) for at in marks if 0xA5 in data[at : at + 8]]
    assert len(found) >= 24
    for at in found[12:]:
        data[at] = 0xEC
    (tmp_path / "b.webm").write_bytes(data)
    with pytest.raises(MediaError, match=r"b\.webm: alpha in 1\d of its 24 pictures"):
        read_video(tmp_path / "b.webm")


@needs_ffmpeg
def test_pixel_crop_of_matroska(tmp_path):
    """Its muxer writes no crop: DisplayWidth and DisplayHeight, of the same form, become one."""
    plain = write(tmp_path / "a.mkv", card(), "ffv1", "bgra")
    ffmpeg("-i", plain, "-c", "copy", "-aspect", "2:1", tmp_path / "b.mkv")
    data = (tmp_path / "b.mkv").read_bytes()
    wide, high = data.index(b"\x54\xb0"), data.index(b"\x54\xba")
    size = data[wide + 2] & 0x7F
    data = bytearray(data)
    for at, name, value in ((wide, b"\x54\xcc", 8), (high, b"\x54\xbb", 4)):
        data[at : at + 2] = name
        data[at + 3 : at + 3 + size] = value.to_bytes(size, "big")
    (tmp_path / "c.mkv").write_bytes(data)
    clip = read_video(tmp_path / "c.mkv")
    assert np.array_equal(clip.frames, card()[:, 4:, 8:])
    assert clip.notes == ("cropped to 40x28 at 8, 4, as the file says",)
    header = describe_video(tmp_path / "c.mkv")
    assert (header.width, header.height) == (40, 28)


def test_clean_aperture(tmp_path):
    """Of the middle 40 x 28 of 48 x 32 pixels, 2 to the right of it."""
    aperture = struct.pack(">I4s8i", 40, b"clap", 40, 1, 28, 1, 2, 1, 0, 1)
    moov = struct.pack(">I4s", 8 + len(aperture), b"moov") + aperture
    (tmp_path / "a.mov").write_bytes(struct.pack(">I4s4s4x", 16, b"ftyp", b"qt  ") + moov)
    assert crop_of(tmp_path / "a.mov", 48, 32) == (6, 2, 40, 28)


def test_a_tag_without_a_plane_is_said_in_any_case(tmp_path):
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.metadata["ALPHA_MODE"] = "1"
        for frame in card(3, 64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="announces alpha"):
        read_video(path)


def test_every_primaries_number_keeps_white():
    for number in PRIMARIES:
        change = conversion(Stated(primaries=number))
        white = np.full((1, 1, 3), 255, np.uint8)
        assert change is None or np.abs(change.apply(white).astype(int) - 255).max() <= 1
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    grey = conversion(Stated(primaries=9)).apply(ramp)
    assert all(after >= before for before, after in pairwise(grey[0, :, 0].tolist()))
    assert np.abs(grey.astype(int) - ramp).max() <= 1
