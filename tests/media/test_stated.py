"""What a file states of its colour and placement is honoured, whichever decoder reads it, or
refused."""

import struct
from itertools import pairwise

import numpy as np
import OpenEXR
import pytest
import tifffile
from av.video.reformatter import ColorPrimaries, ColorTrc
from PIL import Image

from acetate.media.clip import Asked, MediaError
from acetate.media.color import AP0, PRIMARIES, Stated, conversion, decode_srgb, to_bt709
from acetate.media.images import describe_image, image_halves, read_image
from acetate.media.videos import read_video
from acetate.video_io import read_rgba
from tests.media.films import write
from tests.media.stated import QUARTERS, exr, light, picture, with_chunks

P3, BT2020 = PRIMARIES[12], PRIMARIES[9]


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


def test_png_of_narrow_range(tmp_path):
    stored = picture()
    stored[..., :3] = np.rint(16 + stored[..., :3] * (219 / 255))
    Image.fromarray(stored).save(tmp_path / "a.png")
    with_chunks(tmp_path / "a.png", cICP=bytes((1, 13, 0, 0)))
    assert "16 to 235 stretched" in near(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_further_pages_of_a_tiff_are_said(tmp_path, dtype):
    pages = picture().astype(dtype) * (257 if dtype == np.uint16 else 1)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for _ in range(2):
            file.write(pages, photometric="rgb", extrasamples=["unassalpha"])
    assert "the first of its 2 pages" in near(tmp_path / "a.tif")


def test_a_deep_matte_is_taken_as_it_is_stored(tmp_path):
    """A share of one half is no light that sRGB's curve were for."""
    exr(tmp_path / "a.exr", {"": np.full((4, 4, 3), 0.5)})
    assert set(image_halves(tmp_path / "a.exr")[1].ravel()) == {128}


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


def test_exr_of_whole_numbers_is_refused(tmp_path):
    channels = dict.fromkeys("RGB", np.ones((4, 4), np.float32)) | {"A": np.ones((4, 4), np.uint32)}
    with OpenEXR.File({}, channels) as file:
        file.write(str(tmp_path / "a.exr"))
    with pytest.raises(MediaError, match=r"a\.exr: channel A holds whole numbers"):
        read_rgba(tmp_path / "a.exr")


def test_a_persons_word_about_linear_light(tmp_path):
    straight = light()
    alpha = straight[..., 3:]
    straight[..., :3] /= np.where(alpha > 0, alpha, 1)
    path = exr(tmp_path / "a.exr", {"": straight})
    assert "colour taken as straight, as was said" in near(path, premultiplied=False)
    assert describe_image(path).divided is True
    assert describe_image(path, asked=Asked(premultiplied=False)).divided is False


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


def test_every_primaries_number_keeps_white():
    for number in PRIMARIES:
        change = conversion(Stated(primaries=number))
        white = np.full((1, 1, 3), 255, np.uint8)
        assert change is None or np.abs(change.apply(white).astype(int) - 255).max() <= 1
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    grey = conversion(Stated(primaries=9)).apply(ramp)
    assert all(after >= before for before, after in pairwise(grey[0, :, 0].tolist()))
    assert np.abs(grey.astype(int) - ramp).max() <= 1
