"""What a file states of its placement: windows, crops, the shape of pixels, turns and mirrors."""

import struct

import numpy as np
import pytest
from PIL import Image

from acetate.media.clip import MediaError
from acetate.media.containers import crop_of
from acetate.media.images import describe_image, read_image
from acetate.media.placement import Placement, oriented, turned_by
from acetate.media.videos import describe_video, read_video
from tests.media.films import card, ffmpeg, needs_ffmpeg, write
from tests.media.stated import exr, light, picture, with_chunks


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
