"""Drawn clips through every format that is read, as acetate and as the ffmpeg program write it, and
back.

Alpha comes back to the bit from formats that keep it. From others it is, within a step of 255, what
a decoder that is not ours makes of the file, and no further from the source than was measured with
Debian 12's FFmpeg 5.1, by a third. HEVC with alpha is in test_hevc_alpha.py, for this ffmpeg writes
none.
"""

import subprocess
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch

from acetate.video_io import describe, encode_ffv1, read_packed, read_pair, read_rgba
from acetate.video_out import SUFFIXES, write_clip
from tests.media.films import by_ffmpeg, drawn, ffmpeg, needs_ffmpeg

SIZE = 5, 48, 64
STILL = "-frames:v 1"
H264 = "-c:v libx264 -qp 0 -pix_fmt yuv420p"  # lossless: of alpha remain luma's 220 levels
AVIF = "-c:v libaom-av1 -cpu-used 8 -pix_fmt:0 yuv444p -pix_fmt:1 gray -color_range:1 pc"


class Format(NamedTuple):
    """file and options: of the ffmpeg program. plane: the codec's pixels, where the program's
    scaler would take a step off alpha on the way to them. loss: steps of 255 that alpha is off at
    most; 0: the format keeps it. colour: mean error of what is seen, in steps; None: it means
    another colour, or its own is 4:2:0."""

    file: str
    options: str
    plane: str | None = None
    loss: int = 0
    lossy: bool = False
    color: float | None = 0
    decoder: str | None = None


FORMATS = {
    "png, 8 bit": Format("a.png", f"{STILL} -pix_fmt rgba"),
    "png, 16 bit": Format("a.png", f"{STILL} -pix_fmt rgba64be", color=1),
    "webp, lossless": Format("a.webp", f"{STILL} -c:v libwebp -lossless 1"),
    "webp, lossy": Format("a.webp", f"{STILL} -c:v libwebp -quality 90", lossy=True, color=6),
    "tiff, 8 bit": Format("a.tif", f"{STILL} -pix_fmt rgba"),
    "tiff, 16 bit": Format("a.tiff", f"{STILL} -pix_fmt rgba64le", color=1),
    "targa": Format("a.tga", f"{STILL} -c:v targa -pix_fmt bgra"),
    "exr": Format("a.exr", f"{STILL} -pix_fmt gbrapf32le", color=None),
    "apng": Format("a.apng", "-plays 0"),
    "apng, 16 bit": Format("a.apng", "-plays 0 -pix_fmt rgba64be", color=1),
    "animated webp, lossless": Format("a.webp", "-c:v libwebp_anim -lossless 1"),
    "animated webp, lossy": Format("a.webp", "-c:v libwebp_anim -quality 90", lossy=True, color=6),
    "vp8": Format(
        "a.webm", "-c:v libvpx -crf 4 -b:v 2M -auto-alt-ref 0", "yuva420p", 12, True, None, "libvpx"
    ),
    "vp9": Format(
        "a.webm", "-c:v libvpx-vp9 -crf 10 -b:v 0", "yuva420p", 12, True, None, "libvpx-vp9"
    ),
    "vp9, lossless": Format(
        "a.mkv", "-c:v libvpx-vp9 -lossless 1", "yuva420p", lossy=True, color=None
    ),
    "prores 4444": Format(
        "a.mov", "-c:v prores_ks -profile:v 4444 -alpha_bits 16", "yuva444p10le", 0, True, 1.5
    ),
    "prores 4444, 8-bit alpha": Format(
        "a.mov", "-c:v prores_ks -alpha_bits 8", "yuva444p10le", 1, True, 1.5
    ),
    "cineform": Format("a.mov", "-c:v cfhd", "gbrap12le", 3, True, 1.5),
    "hap alpha": Format("a.mov", "-c:v hap -format hap_alpha", loss=24, lossy=True, color=8),
    "quicktime animation": Format("a.mov", "-c:v qtrle -pix_fmt argb"),
    "png in mov": Format("a.mov", "-c:v png -pix_fmt rgba"),
    "16-bit png in mov": Format("a.mov", "-c:v png -pix_fmt rgba64be", color=1),
    "ffv1": Format("a.mkv", "-c:v ffv1 -pix_fmt bgra"),
    "ffv1, 4:2:0": Format("a.mkv", "-c:v ffv1", "yuva420p", color=None),
    "ffv1, 10 bit": Format("a.mkv", "-c:v ffv1", "yuva444p10le", color=1.5),
    "ffv1, 16 bit": Format("a.mkv", "-c:v ffv1", "gbrap16le", color=0.5),
    "ut video": Format("a.avi", "-c:v utvideo", "gbrap"),
    "magicyuv": Format("a.mkv", "-c:v magicyuv", "gbrap"),
    "huffyuv": Format("a.avi", "-c:v huffyuv -pix_fmt bgra"),
    "raw": Format("a.avi", "-c:v rawvideo -pix_fmt bgra"),
}


@pytest.fixture(params=["hair", "smoke"], scope="module")
def frames(request):
    return drawn(request.param, 7, *SIZE)


def encoders():
    listed = subprocess.run(
        ["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True
    ).stdout
    return {line.split()[1] for line in listed.splitlines() if line.startswith(" V")}


def need(*names):
    lacking = sorted(set(names) - encoders())
    if lacking:
        pytest.skip(f"this ffmpeg has no encoder {', '.join(lacking)}")


def difference(a, b):
    return np.abs(a.astype(int) - b).max()


def alpha_of(path, filters, decoder=None):
    """(T, H, W) by the ffmpeg program."""
    chosen = ("-c:v", decoder) if decoder else ()
    grey = ffmpeg(*chosen, "-i", path, "-vf", filters, "-f", "rawvideo", "-pix_fmt", "gray", "-")
    return np.frombuffer(grey, np.uint8).reshape(-1, *SIZE[1:])


def check(clip, header, expected, loss, lossy, color):
    """Of a read clip and its description, but for what another decoder says."""
    assert clip.frames.shape == expected.shape == (header.frames, header.height, header.width, 4)
    assert (clip.lossy, header.lossy, header.alpha) == (lossy, lossy, True)
    assert difference(clip.frames[..., 3], expected[..., 3]) <= loss
    if color is not None:
        weight = np.broadcast_to(expected[..., 3:].astype(float), (*expected.shape[:3], 3))
        error = np.abs(clip.frames[..., :3].astype(int) - expected[..., :3])
        assert np.average(error, weights=weight) <= color


@needs_ffmpeg
@pytest.mark.parametrize("name", FORMATS)
def test_written_by_the_program(tmp_path, frames, name):
    file, options, plane, loss, lossy, color, decoder = FORMATS[name]
    if "-c:v" in options:
        need(options.split("-c:v ")[1].split()[0])
    # alphamerge copies the plane
    planes = f"split[c][a];[a]alphaextract[m];[c]format={plane}[p];[p][m]alphamerge"
    path = tmp_path / file
    by_ffmpeg(frames, *(("-filter_complex", planes) if plane else ()), *options.split(), path)
    clip, still = read_rgba(path), STILL in options
    check(clip, describe(path), frames[:1] if still else frames, loss, lossy, color)
    assert clip.fps == (None if still else 10)
    defined = path.suffix in (".mov", ".avi", ".mkv", ".webm")
    assert clip.premultiplied is (None if defined else False)
    if loss:
        assert difference(clip.frames[..., 3], alpha_of(path, "alphaextract", decoder)) <= 1


@needs_ffmpeg
@pytest.mark.parametrize(
    ("suffix", "pixels"), [("png", "rgba"), ("png", "rgba64be"), ("exr", "gbrapf32le")]
)
def test_sequence_by_the_program(tmp_path, frames, suffix, pixels):
    by_ffmpeg(frames, "-pix_fmt", pixels, tmp_path / f"%04d.{suffix}")
    check(read_rgba(tmp_path), describe(tmp_path), frames, 0, False, None if suffix == "exr" else 1)


@needs_ffmpeg
def test_gif_by_the_program(tmp_path, frames):
    """Whose alpha is one bit."""
    palette = "split[c][b];[b]palettegen[p];[c][p]paletteuse=alpha_threshold=128"
    by_ffmpeg(frames, "-filter_complex", palette, tmp_path / "a.gif")
    expected = np.concatenate((frames[..., :3], np.where(frames[..., 3:] >= 128, 255, 0)), axis=-1)
    if not expected[..., 3].any():
        pytest.skip("nothing of this clip is half opaque")
    check(read_rgba(tmp_path / "a.gif"), describe(tmp_path / "a.gif"), expected, 0, False, 12)


@needs_ffmpeg
@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize(("quality", "loss"), [("-aom-params lossless=1", 0), ("-crf 12", 24)])
def test_avif_by_the_program(tmp_path, frames, still, quality, loss):
    need("libaom-av1")
    path, split = tmp_path / "a.avif", "split[c][b];[b]alphaextract[m]"
    options = f"{AVIF} {quality} {STILL if still else ''}".split()
    by_ffmpeg(frames, "-filter_complex", split, "-map", "[c]", "-map", "[m]", *options, path)
    clip = read_rgba(path)
    check(clip, describe(path), frames[:1] if still else frames, loss, True, 8)
    # another demuxer, another decoder; alpha is the last track
    with av.open(str(path)) as container:
        grey = [
            frame.to_ndarray(format="gray")
            for frame in container.decode(container.streams.video[-1])
        ]
    assert difference(clip.frames[..., 3], np.stack(grey)) <= 1


@needs_ffmpeg
def test_pair_by_the_program(tmp_path, frames):
    need("libx264")
    fgr, pha = tmp_path / "a_fgr.mp4", tmp_path / "a_pha.mp4"
    halves = ("-filter_complex", "split[c][b];[b]alphaextract[m]")
    by_ffmpeg(frames, *halves, "-map", "[c]", *H264.split(), fgr, "-map", "[m]", *H264.split(), pha)
    clip = read_pair(fgr, pha)
    assert difference(clip.frames[..., 3], alpha_of(pha, "null")) <= 1
    assert difference(clip.frames[..., 3], frames[..., 3]) <= 1 and (clip.fps, clip.lossy) == (
        10,
        True,
    )


@needs_ffmpeg
@pytest.mark.parametrize("layout", ["hstack", "vstack"])
def test_packed_by_the_program(tmp_path, frames, layout):
    need("libx264")
    both = f"split[c][b];[b]alphaextract,format=rgb24[m];[c]format=rgb24[k];[k][m]{layout}"
    path = tmp_path / "a.mp4"
    by_ffmpeg(frames, "-filter_complex", both, *H264.split(), path)
    _, height, width = SIZE
    x, y = (width, 0) if layout == "hstack" else (0, height)
    clip = read_packed(path, (0, 0, width, height), (x, y, width, height))
    assert difference(clip.frames[..., 3], alpha_of(path, f"crop={width}:{height}:{x}:{y}")) <= 1
    assert difference(clip.frames[..., 3], frames[..., 3]) <= 1 and (clip.fps, clip.lossy) == (
        10,
        True,
    )


@pytest.mark.parametrize(
    ("name", "loss", "lossy"),
    [
        ("png", 0, False), ("apng", 0, False), ("webp", 0, False), ("prores", 0, True),
        ("webm", 12, True),
        ("pair", 12, True), ("ffv1", 0, False),
    ],
)  # fmt: skip
def test_written_by_acetate(tmp_path, frames, name, loss, lossy):
    if name == "ffv1":
        paths = [tmp_path / "a.mkv"]
        paths[0].write_bytes(encode_ffv1(frames, 10))
    else:
        unit = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255
        paths = write_clip(tmp_path / "a", unit[:3] * 2 - 1, unit[3:], 10, [name])
        assert [path.name for path in paths] == [f"a{suffix}" for suffix in SUFFIXES[name]]
    clip = read_pair(*paths) if name == "pair" else read_rgba(paths[0])
    assert clip.frames.shape == frames.shape and clip.lossy == lossy
    assert difference(clip.frames[..., 3], frames[..., 3]) <= loss
    assert clip.fps == (None if name == "png" else 10)
