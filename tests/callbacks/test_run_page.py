"""The page of a run's validation clips."""

import base64
import json
import re
from io import BytesIO

import numpy as np
from PIL import Image

from acetate.callbacks.curves import draw
from acetate.pages.clips import shown
from acetate.pages.of_run import keep, write


def clip(level, frames=3):
    """Straight RGBA of one level, half transparent."""
    pixels = np.full((frames, 8, 10, 4), level, np.uint8)
    pixels[..., 3] = 128
    return shown(pixels, 8, "a disc", {"PSNR": level / 10}, lossless=True)


def systems(page):
    (found,) = re.findall(r'id="systems">(.*?)</script>', page.read_text())
    return json.loads(found)


def test_the_page_has_the_source_and_steps_from_the_first_to_the_last(tmp_path):
    keep(tmp_path, 0, [("cat", clip(0)), ("dog", clip(0))], source=True)
    for step in range(0, 4000, 400):
        keep(tmp_path, step, [("cat", clip(step // 40)), ("dog", clip(9))])
    names = systems(tmp_path / "clips.html")
    assert names[0] == "source" and names[1] == "step 0" and names[-1] == "step 3,600"
    assert len(names) == 7
    keep(tmp_path, 3600, [("cat", clip(77))])  # made again, by a run that goes on
    text = (tmp_path / "clips.html").read_text()
    assert text.count('class="card"') == 2
    sheets = re.findall(r'<template data-of="6">(.*?)</template>', text)
    assert len(sheets) == 1  # of the cat alone
    picture = np.asarray(Image.open(BytesIO(base64.b64decode(sheets[0]))))
    assert picture.shape == (16, 20, 4)  # three pictures in two rows of two
    assert (picture[:8, :20] == [77, 77, 77, 128]).all()


def test_the_page_has_the_curves_as_they_stand(tmp_path):
    draw({"train/loss": [(1, 2.0), (2, 1.0)]}, tmp_path / "curves.png", "run")
    write(tmp_path)
    assert not (tmp_path / "clips.html").exists()  # no clips yet
    keep(tmp_path, 0, [("cat", clip(1))])
    for last in (0.5, 0.1):
        draw({"train/loss": [(1, 2.0), (3, last)]}, tmp_path / "curves.png", "run")
        write(tmp_path)
        text = (tmp_path / "clips.html").read_text()
        (held,) = re.findall(r'src="data:image/png;base64,(.*?)"', text)
        assert base64.b64decode(held) == (tmp_path / "curves.png").read_bytes()
    assert text.count('class="card"') == 1


def test_figures_of_a_diverged_step_are_left_out(tmp_path):
    bad = clip(3)
    bad.figures["PSNR"] = float("nan")
    keep(tmp_path, 0, [("cat", bad)])
    assert "NaN" not in (tmp_path / "clips.html").read_text()


def test_a_page_that_cannot_be_written_stops_nothing(tmp_path, recwarn):
    (tmp_path / ".clips").write_text("in the way")
    keep(tmp_path, 0, [("cat", clip(1))])
    assert "clips.html is not written" in str(recwarn.pop().message)
