import json

import pytest

from data_prep.candidates import survey


@pytest.fixture
def source(tmp_path):
    return tmp_path


def put(source, *names, text=""):
    for name in names:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def found(source):
    """(name, files, whether colour is a whole picture) of each candidate."""
    folder = survey(source)
    return [
        (c.name, [str(file.relative_to(source)) for file in c.files], c.matte)
        for c in folder.candidates
    ]


@pytest.mark.parametrize("end", ["matte", "alpha", "mask", "pha"])
def test_a_picture_and_its_matte(source, end):
    put(source, "cat.jpg", f"cat_{end}.png", "dog_image.jpg", f"dog_{end}.jpg")
    assert found(source) == [
        ("cat", ["cat.jpg", f"cat_{end}.png"], True),
        ("dog", ["dog_image.jpg", f"dog_{end}.jpg"], True),
    ]


@pytest.mark.parametrize(
    ("color", "alpha", "whole"),
    [("fgr", "pha", False), ("image", "mask", True), ("images", "masks", True),
     ("rgb", "alpha", True),
     ("images", "mattes", True)],
)  # fmt: skip
def test_parallel_folders(source, color, alpha, whole):
    """Of stills with the same names; of films; with one file that lacks its partner."""
    put(
        source,
        f"set/{color}/ant.png",
        f"set/{alpha}/ant.png",
        f"set/{color}/bee.mp4",
        f"set/{alpha}/bee.mov",
    )
    put(source, f"set/{alpha}/orphan.png")
    assert sorted(found(source)) == [
        ("ant", [f"set/{color}/ant.png", f"set/{alpha}/ant.png"], whole),
        ("bee", [f"set/{color}/bee.mp4", f"set/{alpha}/bee.mov"], whole),
        ("orphan", [f"set/{alpha}/orphan.png"], False),
    ]


def test_color_without_matte_stands_alone(source):
    put(source, "a_fgr.mp4", "b.png", "c_matte.png")
    assert found(source) == [
        ("a", ["a_fgr.mp4"], False),
        ("b", ["b.png"], False),
        ("c", ["c_matte.png"], False),
    ]


def test_tables_of_the_released_code(source):
    """video_fgr, video_pha, prompt of the DiT stage; video_fgr, video_pha, status of the VAE
    stage."""
    put(source, "v/1.mp4", "v/1a.mp4", "v/2.png", "v/2a.png", "v/3.mp4", "v/3a.mp4", "other.png")
    put(source, "t2v.csv", text="video_fgr,video_pha,prompt,cache_path\nv/1.mp4,v/1a.mp4,a cat,x\n")
    put(
        source,
        "vae.csv",
        text="video_fgr,video_pha,status\nv/2.png,v/2a.png,static\nv/3.mp4,v/3a.mp4,dynamic\n",
    )
    folder = survey(source)
    assert [([file.name for file in c.files], c.matte) for c in folder.candidates] == [
        (["1.mp4", "1a.mp4"], False), (["2.png", "2a.png"], False), (["3.mp4", "3a.mp4"], False),
        (["other.png"], False)
    ]  # fmt: skip
    first, still, film, _ = folder.candidates
    assert first.row["prompt"] == "a cat" and "still" not in first.row
    assert still.row["still"] == "true" and "still" not in film.row
    assert folder.ignored == {"t2v.csv": "a table of clips", "vae.csv": "a table of clips"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "video_fgr,video_pha,status\na.mp4,b.mp4,moving\n",
            r"t\.csv, row 1: status=moving; it is static or dynamic",
        ),
        (
            "video_fgr,video_pha\na.mp4,b.mp4\nc.mp4,\n",
            r"t\.csv, row 2: no video_pha; a pair has colour and alpha",
        ),
    ],
)
def test_tables_that_cannot_be_used(source, text, reason):
    put(source, "t.csv", text=text)
    with pytest.raises(ValueError, match=reason):
        survey(source)


def test_every_other_file_is_ignored_with_a_reason(source):
    put(
        source,
        "a.png",
        ".hidden.png",
        ".git/b.png",
        "LICENSE.txt",
        "notes.md",
        "sound.wav",
        "rects.json",
    )
    (source / "rects.json").write_text(json.dumps({"a": {"source": "me", "path": "b.mov"}}))
    folder = survey(source)
    assert [c.origin for c in folder.candidates] == [{"source": "me", "path": "b.mov"}]
    assert {name: reason.split(":")[0] for name, reason in folder.ignored.items()} == {
        ".git/b.png": "hidden", ".hidden.png": "hidden", "LICENSE.txt": "a licence or a note",
        "notes.md": "text",
        "rects.json": "describes clips", "sound.wav": "no suffix that is read",
    }  # fmt: skip
