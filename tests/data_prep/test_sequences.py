import os

import numpy as np
import pytest
from PIL import Image

from acetate.video_io import MediaError, read_rgba
from data_prep.candidates import survey


def still(path, number=0, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, (20 * number % 256, 9, 9, 128)).save(path)


def frames(folder, name="{:04d}.png", numbers=range(1, 7), *size):
    for number in numbers:
        still(folder / name.format(number), number, *size)


def found(source):
    """name -> frames, of each candidate; and the notes."""
    folder = survey(source)
    named = {}
    for candidate in folder.candidates:
        file = candidate.files[0]
        sequence = candidate.called or file.is_dir()
        named[candidate.name] = len(read_rgba(file).frames) if sequence else 1
    return named, folder


@pytest.mark.parametrize(
    "name",
    ["frame ({}).png", "{:04d}_rgba.png", "ComfyUI_{:05d}_.png", "x.{:04d}.v2_1080p.png", "{}.PNG"],
)
def test_names_of_frames(tmp_path, name):
    frames(tmp_path / "walk", name, range(8, 12))
    assert found(tmp_path)[0] == {"walk": 4}


def test_what_stands_beside_a_sequence_is_named(tmp_path):
    frames(tmp_path / "walk")
    still(tmp_path / "walk/poster.png", 9)
    still(tmp_path / "walk/title.png", 10)
    for number in range(1, 7):
        Image.new("RGB", (10, 8)).save(tmp_path / f"walk/{number:04d}.jpg")
        (tmp_path / f"walk/._{number:04d}.png").write_bytes(b"\0\5\x16\7")
    named, folder = found(tmp_path)
    assert named == {"walk": 6, "title": 1}
    said = folder.ignored
    assert said["walk/poster.png"] == "a preview of the sequence"
    assert "shows a frame again" in said["walk/0003.jpg"]
    assert "AppleDouble" in said["walk/._0003.png"] and len(said) == 13
    assert [note.split(": ", 2)[2] for note in folder.notes] == [
        "poster.png, 0001.jpg, 0002.jpg, ... (7 left out)", "title.png (1 of the same group)"
    ]  # fmt: skip
    pattern = next(c.files[0] for c in folder.candidates if c.called)
    assert (read_rgba(pattern).frames[:, 0, 0, 0] == [20, 40, 60, 80, 100, 120]).all()


def test_an_empty_frame_is_the_sequences_fault(tmp_path):
    frames(tmp_path / "walk")
    (tmp_path / "walk/0004.png").write_bytes(b"")
    (candidate,) = survey(tmp_path).candidates
    with pytest.raises(MediaError, match=r"its frame 0004\.png is empty"):
        read_rgba(candidate.files[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: (f / "0003.png").unlink(), "number 3 is missing, so its 5 images are stills"),
        (lambda f: still(f / "0003.png", 3, (4, 4)), "0003.png is 4x4 and others 10x8"),
        (lambda f: frames(f, "{:04d}.png", range(4, 7), (4, 4)), "0004.png is 4x4 and others"),
        (lambda f: still(f / "03.png", 3), "number 3 is there twice"),
        (lambda f: frames(f, "run{}.png", range(5)), "2 runs of numbered images"),
    ],
)
def test_why_images_are_stills(tmp_path, make, said):
    frames(tmp_path / "walk")
    make(tmp_path / "walk")
    named, folder = found(tmp_path)
    assert len(folder.notes) == 1 and said in folder.notes[0]
    assert len(named) >= 5 and set(named.values()) == {1}


def test_passes_of_one_render(tmp_path):
    """And a pair of two sequences that share a folder."""
    frames(tmp_path / "render", "beauty_{:04d}.png")
    frames(tmp_path / "render", "shadow_{:04d}.png")
    frames(tmp_path / "pair", "x_fgr_{:04d}.png")
    frames(tmp_path / "pair", "x_pha_{:04d}.png")
    folder = survey(tmp_path)
    assert [[file.name for file in c.files] for c in folder.candidates] == [
        ["x_fgr_*.png", "x_pha_*.png"], ["beauty_*.png"], ["shadow_*.png"]
    ]  # fmt: skip


def test_links(tmp_path):
    source, outside = tmp_path / "source", tmp_path / "outside"
    still(source / "real/a.png")
    still(outside / "one/b.png")
    still(outside / "two/c.png")
    (outside / "one/more").symlink_to(outside / "two")  # two levels deep
    (outside / "one/back").symlink_to(source)
    for name, target in (("l1", "../outside/one"), ("l2", "../outside/one"), ("up", ".."),
                         ("self", "."), ("loop", "loop"), ("gone.png", "nothing.png"),
                         ("again.png", "real/a.png")):  # fmt: skip
        (source / name).symlink_to(target)
    os.mkfifo(source / "pipe.png")
    folder = survey(source)
    names = [str(c.files[0].relative_to(source)) for c in folder.candidates]
    assert names == ["l1/b.png", "l1/more/c.png", "real/a.png"]
    assert folder.ignored == {
        "l1/back": "leads to what is found already: .",
        "l2": "leads to what is found already: l1",
        "up": "a link to a folder that the source lies in",
        "self": "leads to what is found already: .",
        "loop": "a link that leads nowhere: loop",
        "gone.png": "a link that leads nowhere: nothing.png",
        "again.png": "leads to what is found already: real/a.png",
        "pipe.png": "neither a file nor a folder",
    }
    assert sum("leads nowhere" in note for note in folder.notes) == 2


def test_frames_are_opened_by_their_pattern(tmp_path):
    """A bracket or a star in a name means itself."""
    frames(tmp_path / "a[1]", "f+({}).png")
    still(tmp_path / "a[1]/star*.png")
    named, _ = found(tmp_path)
    assert named == {"a[1]": 6, "star*": 1}
    assert np.unique(read_rgba(tmp_path / "a[1]/star*.png").frames[..., 3]) == [128]
