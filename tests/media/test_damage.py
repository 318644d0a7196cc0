"""Files that are cut off, wrong in their checksums, or hold their alpha where few look for it."""

import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from acetate.media.clip import MediaError
from acetate.media.containers import missing_bytes
from acetate.media.images import read_image
from acetate.media.videos import read_video
from tests.media.films import by_ffmpeg, card, needs_ffmpeg, write
from tests.media.stated import QUARTERS, picture, png_of


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


@needs_ffmpeg
def test_a_film_that_is_cut_within_a_picture_is_refused_as_cut(tmp_path):
    path = tmp_path / "a.mov"
    by_ffmpeg(
        card(8, 64, 64), "-c:v", "prores_ks", "-pix_fmt", "yuva444p10le", "-movflags", "faststart",
        path,
    )  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10])
    with pytest.raises(
        MediaError, match=r"a\.mov: cannot be decoded: the file ends \d+ bytes early"
    ):
        read_video(path)


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
