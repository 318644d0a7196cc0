from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from acetate.data.splits import assign_splits
from data_prep.candidates import Candidate
from data_prep.found import Found
from data_prep.groups import NO_LOOKS, grouped
from data_prep.looks import alike, look_of


def clip(path, frames=1, size=(8, 8), **said):
    """path: relative to the source; its content is its name, or `content`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = said.pop("content", str(path))
    if not path.exists():
        path.write_text(content)
    origin = {"path": said.pop("origin")} if "origin" in said else {}
    width, height = size
    found = Found(
        key=str(path), kind="still", files=[str(path.absolute())], frames=frames, width=width,
        height=height, fps=None, prompt="", licence="", source="", group="", lossy=False,
        premultiplied=None, color_rect=None, alpha_rect=None,
    )  # fmt: skip
    return Candidate((path.absolute(),), row=said, origin=origin), found


def groups(*clips, looks=NO_LOOKS):
    found, notes = grouped(Path.cwd(), clips, looks)
    return [one.group for one in found], notes


@pytest.fixture(autouse=True)
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("smoke.mov", "smoke_poster.png"),
        ("smoke.mov", "smoke-preview.mp4"),
        ("smoke_part1.mov", "smoke_part02.mov"),
        ("smoke_001.mov", "smoke_002.mov"),
        ("shot_01.mov", "shot_02.mov"),
        ("film.mov", "film-Scene-003.mp4"),
        ("cat.png", "cat (1).png"),
        ("cat.png", "Copy of cat.png"),
        ("a/globe_fgr.mp4", "b/globe_prores4444.mov"),
    ],
)
def test_parts_previews_and_forms_of_one_thing(one, other):
    said, _ = groups(clip(one, 1 + 8 * (".png" not in one)), clip("other.png"), clip(other, 9))
    assert said[0] == said[2] != said[1]


@pytest.mark.parametrize("name", ["{:04d}.png", "frame ({}).png", "IMG_{}.png", "{:03d}_rgba.png"])
def test_stills_that_count_up_never_stand_on_both_sides(name):
    mine = [clip(f"a/{name.format(i)}") for i in range(40)]
    others = [clip(f"b/{name.format(i)}") for i in range(40)]
    said, notes = groups(*mine, *others)
    assert len(set(said[:40])) == len(set(said[40:])) == 1 and said[0] != said[40]
    sides = assign_splits(dict(enumerate(said)), 0.5)
    assert len({sides[i] for i in range(40)}) == 1
    assert len(notes) == 2 and notes[0].startswith("40 numbered stills are one group")


def test_numbered_stills_of_different_sizes_are_different_things():
    said, _ = groups(*(clip(f"{i}.png", size=(8 + i, 8)) for i in range(6)))
    assert len(set(said)) == 6
    said, _ = groups(*(clip(f"x/{i}.png", size=(8 + (i == 3), 8)) for i in range(6)))
    assert len(set(said)) == 1  # one frame fell out


def disc(place, color=(220, 60, 40), size=96):
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).ellipse((place, 20, place + 40, 70), fill=color)
    return look_of(np.asarray(image))


def thing(seed):
    """Blobs of its own."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (5, 5, 4), dtype=np.uint8)
    return look_of(np.asarray(Image.fromarray(small).resize((96, 96))))


@pytest.mark.parametrize("name", ["img_{:03d}.png", "{}.png", "flower_{}.png"])
def test_numbered_stills_that_look_different_are_no_group(name):
    clips = [clip(name.format(i)) for i in range(20)]
    looks = {found.key: thing(i) for i, (_, found) in enumerate(clips)}
    said, notes = groups(*clips, looks=looks)
    assert len(set(said)) == 20 and "20 numbered stills look different" in notes[0]
    frames = {found.key: disc(2 * i) for i, (_, found) in enumerate(clips)}
    said, notes = groups(*clips, looks=frames)
    assert len(set(said)) == 1 and notes[0].startswith("20 numbered stills are one group")


def test_of_numbered_stills_neighbours_that_look_alike_are_one_group():
    """Frames 3 to 5 of a set of pictures, in the order of their numbers."""
    clips = [clip(f"{i}.png") for i in range(12)]
    looks = {found.key: thing(i) for i, (_, found) in enumerate(clips)}
    looks |= {f"{i}.png": disc(2 * i) for i in (3, 4, 5)}
    said, _ = groups(*clips, looks=looks)
    assert said[3] == said[4] == said[5] and len(set(said)) == 10


def test_colors_and_shapes_tell_things_apart():
    assert alike(disc(10), disc(13)) and not alike(disc(10), disc(50))
    assert not alike(disc(10), disc(10, color=(40, 60, 220)))


def test_hashes_are_no_numbers():
    said, _ = groups(*(clip(f"{name}.png") for name in ("a1b2c3d4", "9f8e7d6c", "p_00b9a3e5")))
    assert len(set(said)) == 3


def test_copies():
    said, _ = groups(clip("a.png", content="x"), clip("b/c.png", content="x"), clip("d.png"))
    assert said[0] == said[1] != said[2]


def test_what_a_person_says_counts_more_than_names():
    said, notes = groups(*(clip(f"{i}.png", group=f"g{i % 2}") for i in range(4)), clip("z.png"))
    assert said == ["g0", "g1", "g0", "g1", "z"] and not notes
    said, _ = groups(clip("a.png", origin="f.mov"), clip("b.png", origin="f.mov"))
    assert said == ["/f.mov"] * 2


def test_nothing_left_to_validate_is_said():
    _, notes = groups(*(clip(f"{i}.png") for i in range(3)))
    assert "all 3 clips are of one group" in notes[-1]
