"""Files as they come out of encoders: what is seen of their transparency, and what is wrong."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from acetate.clips import Clip
from acetate.data.synthetic import render
from acetate.media.clip import LIMITS
from data_prep.check import check
from tests.media.films import by_ffmpeg, card, drawn, needs_ffmpeg, write

SOFT = drawn("shape", 3, frames=4, height=48)


def texts(verdict):
    return " | ".join(verdict.faults), " | ".join(verdict.notes)


def test_prores_4444_is_fine(tmp_path):
    path = write(tmp_path / "a.mov", SOFT, "prores_ks", "yuva444p10le", profile="4")
    verdict = check(path, LIMITS)
    assert not verdict.faults
    assert verdict.lines["file"].startswith("prores, yuva444p1") and "4 pictures" in str(verdict)
    assert "After Effects" in verdict.lines["shown by"] and "browsers" in verdict.lines["not by"]
    assert verdict.lines["alpha"].startswith("0 to 255;")


@needs_ffmpeg
def test_a_plane_without_its_tag(tmp_path):
    options = ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-lossless", "1")
    by_ffmpeg(SOFT, *options, tmp_path / "tagged.webm")
    untag = (
        "ffmpeg", "-loglevel", "error", "-i", tmp_path / "tagged.webm", "-c", "copy",
        "-metadata:s:v:0", "alpha_mode=", tmp_path / "untagged.webm",
    )  # fmt: skip
    subprocess.run(untag, check=True)
    assert not check(tmp_path / "tagged.webm", LIMITS).faults
    faults, _ = texts(check(tmp_path / "untagged.webm", LIMITS))
    assert "no alpha_mode tag" in faults


@needs_ffmpeg
def test_a_tag_without_its_plane(tmp_path):
    options = ("-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p", "-metadata:s:v:0", "alpha_mode=1")
    by_ffmpeg(SOFT, *options, tmp_path / "a.webm")
    faults, _ = texts(check(tmp_path / "a.webm", LIMITS))
    assert "announces alpha" in faults


def test_quicktime_that_says_24_bits(tmp_path):
    path = write(tmp_path / "a.mov", SOFT, "png", "rgba")
    data = bytearray(path.read_bytes())
    entry = data.index(b"png ", data.index(b"stsd"))  # a VisualSampleEntry: its depth is byte 78
    assert not check(path, LIMITS).faults and data[entry + 78 : entry + 80] == b"\0\x20"
    data[entry + 78 : entry + 80] = b"\0\x18"
    path.write_bytes(data)
    faults, _ = texts(check(path, LIMITS))
    assert "depth 24" in faults


def levels(low, high):
    clip = card()
    clip[..., 3] = low + clip[..., 3] * ((high - low) / 255)
    return clip


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        (levels(255, 255), "opaque throughout"),
        (levels(0, 0), "empty throughout"),
        (levels(16, 235), "from 16 to 235 in place of 0 to 255"),
        (SOFT[..., :3], "no alpha"),
    ],
)
def test_pictures_that_show_no_transparency(tmp_path, frames, fault):
    path = tmp_path / "a.mov"
    write(path, frames, "png", "rgba" if frames.shape[-1] == 4 else "rgb24")
    faults, _ = texts(check(path, LIMITS))
    assert fault in faults


def test_multiplied_colour_in_a_straight_format(tmp_path):
    frame = drawn("smoke", 5, frames=1, height=96)[0].astype(np.float32)
    frame[..., :3] *= frame[..., 3:] / 255
    Image.fromarray(frame.round().astype(np.uint8)).save(tmp_path / "a.png")
    faults, notes = texts(check(tmp_path / "a.png", LIMITS))
    assert "mixed with black" in faults + notes


@pytest.mark.parametrize("name", ["a.mov", "a.webm", "a.webp", "a.apng", "a_png"])
def test_what_acetate_writes_is_fine(tmp_path, name):
    drawn = render("smoke", 3, 5, 48, 48)
    verdict = check(Clip(drawn.rgb, drawn.alpha, 16).save(tmp_path / name), LIMITS)
    assert not verdict.faults and not verdict.notes
    assert verdict.lines["colour"].startswith("straight")


def test_colour_that_nobody_states(tmp_path):
    path = write(tmp_path / "a.mov", SOFT, "prores_ks", "yuva444p10le", profile="4")
    _, notes = texts(check(path, LIMITS))
    assert "are not stated" in notes


def test_one_screen_and_an_exit_code(tmp_path):
    """Names are taken to the letter, whatever they hold."""
    fine, odd = tmp_path / "fine, [1].png", tmp_path / "a=b ${x}.png"
    Image.fromarray(SOFT[0]).save(fine)
    Image.fromarray(SOFT[0][..., :3]).save(odd)

    def run(*files):
        command = [sys.executable, "-m", "acetate", "check", *map(str, files)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    good, both = run(fine), run(fine, odd)
    assert (good.returncode, good.stderr) == (0, "") and f"{fine}: fine" in good.stdout
    assert both.returncode == 1 and f"{odd}: faulty" in both.stdout
    assert f"{fine}: fine" in both.stdout and "Traceback" not in both.stderr
    assert max(map(len, good.stdout.splitlines())) < 200 and good.stdout.count("\n") < 12
