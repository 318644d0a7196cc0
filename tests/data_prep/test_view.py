"""The page that plays transparent clips, opened in a browser."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from data_prep.finished import clips_of
from tests.browser import chromium, needs_chromium, screenshot
from tests.compose import called

FRAMES, SIDE = 6, 40


def clip(strength):
    """A white square, opaque at the left and half transparent at the right, that goes down."""
    frames = np.zeros((FRAMES, SIDE, SIDE, 4), np.uint8)
    for t in range(FRAMES):
        frames[t, 5 * t : 5 * t + 10, 5:20] = (255, 255, 255, 255)
        frames[t, 5 * t : 5 * t + 10, 20:35] = (255, 255, 255, strength)
    return frames


def save(frames, path):
    first, *rest = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=rest, duration=100, lossless=True)


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    root = tmp_path_factory.mktemp("viewed")
    for name, strength in (("mine", 128), ("theirs", 64)):
        (root / name).mkdir()
        save(clip(strength), root / name / "square.webp")
        save(clip(strength)[:, ::-1], root / name / "up.webp")
    (root / "mine" / "square.json").write_text(json.dumps({"prompt": "a <b>square</b>, falling"}))
    (root / "theirs" / "up.webp").write_bytes(b"RIFF")
    Image.fromarray(clip(1)[0][..., :3]).save(root / "theirs" / "opaque.png")
    return root


@pytest.fixture(scope="module")
def page(systems):
    out = systems / "page.html"
    called("view", f"folders=[{systems}/mine,{systems}/theirs]", f"reference={systems}/mine",
           f"out={out}", "lossless=true")  # fmt: skip
    return out


def test_what_is_shown_and_what_is_not(page, systems, capsys):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'data-name="(\w+)"', text) == ["square", "up"]
    assert "a &lt;b&gt;square&lt;/b&gt;, falling" in text and "<b>square" not in text
    facts = [json.loads(found.replace("&quot;", '"')) for found in
             re.findall(r'data-facts="([^"]*)"', text)]  # fmt: skip
    square, up = facts
    assert [one["held"] for one in square] == [FRAMES, FRAMES] and "why" in up[1]
    assert square[0]["figures"]["mad"] == 0
    # a fourth of 150 of 1,600 pixels
    expected = 1e3 * 150 * 64 / 255 / SIDE**2
    assert square[1]["figures"]["mad"] == pytest.approx(expected, rel=1e-3)


def test_of_several_formats_the_truest(systems, tmp_path):
    for name in ("a.webp", "a.webm", "a_preview.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a_png").mkdir()
    for t in range(3):
        Image.fromarray(clip(9)[t]).save(tmp_path / "a_png" / f"{t:04d}.png")
    found = clips_of(tmp_path)
    assert {name: one.path.name for name, one in found.items()} == {"a": "a_png"}


def test_nothing_to_show_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SystemExit):
        called("view", f"folders=[{tmp_path}]", f"out={tmp_path}/page.html")
    assert "no clip was found there" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def regions(picture, color):
    return int((np.abs(picture.astype(int) - color).max(-1) <= 3).sum())


@needs_chromium
@pytest.mark.slow
def test_a_background_is_seen_through(page, tmp_path):
    picture, said = screenshot(page, tmp_path, "at=0&zoom=0&ground=red&q=square")
    assert said == []
    # of 128 of 255 white over red the half is red; of 64 a fourth: pixels of each system
    assert regions(picture, (255, 128, 128)) == 150 and regions(picture, (255, 64, 64)) == 150
    reds = regions(picture, (255, 0, 0))
    assert reds > 2 * (SIDE**2 - 300)
    alpha, _ = screenshot(page, tmp_path, "at=0&zoom=0&see=alpha&q=square")
    alpha = alpha[260 : 260 + 2 * SIDE, :200]  # without the page's own greys
    assert 150 <= regions(alpha, (128, 128, 128)) < 155 > regions(alpha, (64, 64, 64)) >= 150


@needs_chromium
@pytest.mark.slow
def test_frames_step_and_the_wipe_shows_both(page, tmp_path):
    dom, said = chromium(page, tmp_path / "profile", "at=0.2&q=square&layout=wipe&sort=mad")
    assert said == [] and "frame 3 of 6" in dom and "1 of 2" in dom
    assert "mad of theirs" in dom and "mine | theirs" in dom
    picture, _ = screenshot(page, tmp_path, "at=0&zoom=0&ground=red&q=square&layout=wipe")
    # the opaque left half is mine, the soft right one theirs
    assert regions(picture, (255, 128, 128)) == 0
    assert regions(picture, (255, 64, 64)) == 150 - 10  # a column lies under the wipe's line


@needs_chromium
@pytest.mark.slow
def test_many_clips_are_drawn_as_they_come_into_view(tmp_path):
    (tmp_path / "many").mkdir()
    frames = clip(128)
    for i in range(500):
        frames[..., 0] = i % 256
        Image.fromarray(frames[i % FRAMES]).save(tmp_path / "many" / f"clip {i}.png")
    for i in range(500):  # stills that count up are frames: names of their own keep them apart
        (tmp_path / "many" / f"clip {i}.png").rename(tmp_path / "many" / f"{i:03d} of.png")
    called("view", f"folders=[{tmp_path}/many]", f"out={tmp_path}/page.html")
    dom, said = chromium(tmp_path / "page.html", tmp_path / "profile", "at=0")
    drawn = dom.count("<canvas")
    assert said == [] and "500 of 500" in dom and 5 < drawn < 250
