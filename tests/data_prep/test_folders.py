import json
from pathlib import Path

import pytest

from acetate.data.shards import MANIFEST, ShardError
from acetate.replacing import check_out, written
from data_prep import filter as filtering_program
from data_prep import synthesize as synthesizing
from data_prep.filter import Duplicates, Rule, filter_clips
from data_prep.folders import check_folder, differences, place
from data_prep.synthesize import synthesize


def draw(out, clips=3, replace=False, **changes):
    settings = {
        "frames": 1,
        "sizes": [16],
        "seed": 0,
        "val_fraction": 0.0,
        "max_clips": 1,
        "max_bytes": 10**9,
    }
    return synthesize(out=out, clips=clips, replace=replace, **(settings | changes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_refusal_names_what_differs_and_the_ways_out(tmp_path):
    draw(tmp_path / "s")
    whole = contents(tmp_path / "s")
    with pytest.raises(
        ShardError, match=r"clips: 3 there, 2 now; frames: 1 there, 5 now\. .*out=.*replace=true"
    ):
        draw(tmp_path / "s", clips=2, frames=5)
    assert contents(tmp_path / "s") == whole
    draw(tmp_path / "s", clips=2, frames=5, replace=True)
    draw(tmp_path / "fresh", clips=2, frames=5)
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")
    draw(tmp_path / "s", clips=2, frames=5, replace=True)  # nothing to do
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "s"]


def test_a_replacement_that_is_killed_leaves_the_old_one_and_goes_on(tmp_path, monkeypatch):
    draw(tmp_path / "s")
    whole = contents(tmp_path / "s")
    made, real = [], synthesizing.draw

    def interrupted(plan, index):
        made.append(index)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(plan, index)

    monkeypatch.setattr("data_prep.synthesize.draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "s", seed=1, replace=True)
    assert contents(tmp_path / "s") == whole
    draw(tmp_path / "s", seed=1, replace=True)
    assert made == [0, 1, 2, 2]  # tars that are finished stay
    assert [path.name for path in tmp_path.iterdir()] == ["s"] and contents(tmp_path / "s") != whole


def test_a_kill_between_the_two_renames(tmp_path):
    draw(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / ".old-s")
    with pytest.raises(ShardError, match="clips: 3 there, 2 now"):
        draw(tmp_path / "s", clips=2)
    draw(tmp_path / "s", clips=2, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    draw(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(ShardError, match=r"notes\.txt in it was not made by data_prep\.synthesize"):
        draw(tmp_path / "s", clips=2, replace=True)
    (tmp_path / "s" / "notes.txt").unlink()
    filtering = {
        "rules": {"coverage": Rule(max=1.0)}, "duplicates": None, "scores": None, "max_clips": 9,
        "max_bytes": 10**9,
        "bad_clip_budget": 0, "executor": "local", "workers": 0, "replace": True,
    }  # fmt: skip
    with pytest.raises(ShardError, match="is also what shards names"):
        filter_clips(shards=[tmp_path / "s"], out=tmp_path / "s", **filtering)
    draw(tmp_path / "t")
    with pytest.raises(ShardError, match=r"t holds what data_prep\.synthesize made"):
        filter_clips(shards=[tmp_path / "s"], out=tmp_path / "t", **filtering)
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / MANIFEST).write_text("[]")
    with pytest.raises(ShardError, match="is no manifest of shards"):
        draw(tmp_path / "u", replace=True)


def test_other_rules_measure_nothing_again(tmp_path, monkeypatch):
    draw(tmp_path / "s")
    measured = []
    real = filtering_program.score_clip
    monkeypatch.setattr(
        "data_prep.filter.score_clip", lambda ref: measured.append(ref.key) or real(ref)
    )
    for rule in (Rule(max=0.99), Rule(max=0.98)):
        filter_clips(
            shards=[tmp_path / "s"], out=tmp_path / "f", rules={"coverage": rule},
            duplicates=Duplicates(6, 32, "best"),
            scores=None, max_clips=9, max_bytes=10**9, bad_clip_budget=0, executor="local",
            workers=0, replace=True,
        )  # fmt: skip
    assert len(measured) == 3
    assert (
        json.loads((tmp_path / "f" / MANIFEST).read_text())["made_by"]["settings"]["rules"][
            "coverage"
        ]
        == "<= 0.98"
    )


def test_differences_are_said_as_the_settings_are_called():
    old = {
        "settings": {
            "choices": {"color": "black"},
            "ellipse": {"threshold": 0.1},
            "vae_sha256": "a" * 64,
        }
    }
    new = {"settings": {"choices": {}, "ellipse": {"threshold": 0.2}, "vae_sha256": "b" * 64}}
    assert differences(old, new) == [
        'color: "black" there, none now', "ellipse.threshold: 0.1 there, 0.2 now",
        "weights of rgba_vae: aaaaaaaa there, bbbbbbbb now",
    ]  # fmt: skip


def test_where_nothing_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"out=.*file is a file; name a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(
        NotADirectoryError, match=r"file is a file, so that nothing can be made in it"
    ):
        check_folder(tmp_path / "file" / "s")
    with pytest.raises(IsADirectoryError, match=r"page=.* is a folder; name a file"):
        check_out(tmp_path, name="page")
    with pytest.raises(PermissionError, match=r"out=/proc/1/x: /proc/1 cannot be written to"):
        check_folder(Path("/proc/1/x"))
    check_folder(tmp_path / "new" / "s")
    assert (
        place(tmp_path / "new", {"command": "c", "settings": {}}, replace=False) == tmp_path / "new"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_whole_or_not_there(tmp_path, small_disk):
    with written(tmp_path / "deep" / "a.json") as file:
        file.write("old")
    full = r"a\.json could not be written \(.*\); [\d,]+ MiB are free there\. Make room"
    with pytest.raises(OSError, match=full), written(tmp_path / "deep" / "a.json") as file:
        file.write("x" * 10**6)
    assert {path.name: path.read_text() for path in (tmp_path / "deep").iterdir()} == {
        "a.json": "old"
    }
