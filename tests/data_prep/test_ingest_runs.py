"""How ingest runs: within limits, once at a time, on after a kill; and what it prints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from acetate.video_io import encode_ffv1
from data_prep import examine as examining
from data_prep import ingest as program
from data_prep.bad_clips import print_bad
from data_prep.decisions import OVERRIDES
from data_prep.examine import Settings
from data_prep.ingest import ingest
from data_prep.journal import only_writer
from tests.data_prep.material import (
    film,
    noise,
    notes,
    run,
    source,  # noqa: F401
    still,
)
from tests.media.test_images import encode
from tests.paths import ROOT


def test_preview_writes_nothing_and_says_the_same(source, tmp_path):
    still(source / "a.png")
    before = sorted(tmp_path.rglob("*"))
    seen, _ = run(source, preview=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(source)[0] == seen


def listed_pairs(source, names):
    """Named in a table, where a file may be one that makes its reader wait."""
    rows = [f"{name}_fgr.mp4,{name}_pha.mp4" for name in names]
    for name in names:
        film(source / f"{name}_fgr.mp4")
        film(source / f"{name}_pha.mp4")
    (source / "t.csv").write_text("\n".join(("video_fgr,video_pha", *rows)))


@pytest.mark.long
@pytest.mark.slow
def test_a_reader_that_waits_for_ever_is_ended(source):
    listed_pairs(source, "abc")
    (source / "b_pha.mp4").unlink()
    os.mkfifo(source / "b_pha.mp4")  # whoever opens it waits
    clips, bad = run(source, budget=1, workers=1, settings=Settings(seconds=0.3))
    assert list(clips) == ["a", "c"] and list(bad) == ["b"]
    assert bad["b"].startswith(
        "took more than its time, seconds=0.3 and 1 more for every 4 megapixels"
    )


def test_small_pictures_are_given_the_time_that_a_picture_takes(source, monkeypatch):
    """Two hours of them took longer than 1 s for 4 megapixels."""
    source.mkdir()
    (source / "a.mkv").write_bytes(encode_ffv1(np.zeros((200, 8, 8, 4), np.uint8), 24))
    asked = []
    monkeypatch.setattr(examining.signal, "setitimer", lambda _, seconds: asked.append(seconds))
    (task,) = program._tasks(source, program.survey(source, set()), Settings(), guarded=True)
    examining.examine(None, task)
    assert max(asked[::2]) >= 10 + 200 * 0.015


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(seconds=0.1, megapixels_per_second=1e9), "took more than its time, seconds=0.1"),
        (Settings(memory_gb=0.1), "d.png: does not fit into memory"),
    ],
)
def test_what_only_decoding_shows_to_be_too_large_is_refused(source, settings, reason):
    """A valid picture, which is read as floats; the rest goes on."""
    still(source / "a.png")
    encode(source / "d.png", noise(2500, 2500, 8).view(">u2"), "png", "rgba64be")
    still(source / "e.png")
    clips, bad = run(source, budget=1, workers=1, settings=settings)
    assert list(clips) == ["a", "e"] and reason in bad["d"]


@pytest.mark.slow
def test_a_killed_run_goes_on(source, tmp_path):
    """The same bytes, and nothing is decoded twice."""
    listed_pairs(source, "abc")
    slow, journal = source / "c_pha.mp4", tmp_path / "found.journal.jsonl"
    whole = slow.read_bytes()
    slow.unlink()
    os.mkfifo(slow)
    command = [
        sys.executable,
        "-m",
        "data_prep.ingest",
        f"source={source}",
        f"out={tmp_path / 'found.jsonl'}",
    ]
    program = subprocess.Popen([*command, "workers=1"], cwd=ROOT, start_new_session=True)
    while program.poll() is None and not (
        journal.exists() and journal.read_text().count("\n") == 2
    ):
        time.sleep(0.05)
    os.killpg(program.pid, signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL and not (tmp_path / "found.jsonl").exists()
    slow.unlink()
    slow.write_bytes(whole)
    known = [json.loads(line) for line in journal.read_text().splitlines()]
    known[0]["outcome"]["found"]["prompt"] = "from the journal"
    journal.write_text("".join(json.dumps(line) + "\n" for line in known))
    # the command's
    same = {"workers": 1, "settings": Settings(choices=dict.fromkeys(OVERRIDES, "auto"))}
    assert run(source, **same)[0]["a"].prompt == "from the journal" and not journal.exists()
    lines = (tmp_path / "found.jsonl").read_text()
    run(source)
    uninterrupted = (tmp_path / "found.jsonl").read_text()
    assert lines == uninterrupted.replace('Transparent background: a"', 'from the journal"')


def test_a_file_that_changes_during_the_run_is_decoded_again_by_the_next(source, monkeypatch):
    still(source / "a.png")
    still(source / "b.png")
    examine = program.examine

    def change(state, task, stop):
        outcome = examine(state, task)
        still(source / "a.png", height=9)  # after it was decoded
        if stop and task.key == "b":
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(program, "examine", lambda state, task: change(state, task, True))
    with pytest.raises(KeyboardInterrupt):
        run(source)
    monkeypatch.setattr(program, "examine", lambda state, task: change(state, task, False))
    clips, _ = run(source)
    assert (clips["a"].height, clips["b"].height) == (9, 8)


def test_one_run_at_a_time(source):
    still(source / "a.png")
    out = source / "found.jsonl"  # among the material
    with (
        only_writer(out),
        pytest.raises(RuntimeError, match="jsonl is being written by another process"),
    ):
        ingest(source=source, out=out, bad_clip_budget=0)
    assert [file["file"] for file in ingest(source=source, out=out, bad_clip_budget=0).files] == [
        "a.png"
    ]


def test_a_folder_named_by_a_dot(source, monkeypatch):
    still(source / "a.png")
    for i in range(2):
        still(source / "walk" / f"{i}.png")
    monkeypatch.chdir(source)
    assert {key: clip.kind for key, clip in run(Path("."))[0].items()} == {
        "a": "still",
        "walk": "sequence",
    }
    monkeypatch.chdir(source / "walk")
    assert {key: clip.kind for key, clip in run(Path("."))[0].items()} == {
        "0": "still",
        "1": "still",
    }
    assert "walk: its numbered images are read as stills" in notes(Path("walk").resolve())[0]
    (source / "walk/index.csv").write_text("file\n.\n")
    assert {key: clip.kind for key, clip in run(Path("."))[0].items()} == {"walk": "sequence"}


def test_what_ingest_wrote_is_no_material(source):
    still(source / "a.png")
    Image.new("RGB", (8, 8)).save(source / "photo.jpg")
    out = source / "m.jsonl"
    first = ingest(source=source, out=out, bad_clip_budget=0)
    written = out.read_bytes()
    (source / "m.journal.jsonl").write_text("half a li")
    again = ingest(source=source, out=out, bad_clip_budget=0)
    assert again.files == first.files and out.read_bytes() == written
    assert {file["file"]: file.get("ignored") for file in first.files} == {
        "a.png": None, "photo.jpg": "an opaque picture without a matte"
    }  # fmt: skip


def test_nothing_found_is_an_error_and_leaves_nothing(source):
    source.mkdir()
    with pytest.raises(
        ValueError, match=r"media holds no files; looked for \.png.*NAME_fgr \+ NAME_pha"
    ):
        run(source)
    assert [path.name for path in source.parent.iterdir()] == ["media"]
    still(source / "opaque.png", channels=3)
    (source / "notes.xyz").write_text("")
    with pytest.raises(
        ValueError,
        match=r"none of its 2 files became a clip \(opaque: .*no alpha.*report\.json has all",
    ):
        run(source, budget=5)
    assert not (source.parent / "found.jsonl").exists()


def test_out_is_checked_before_anything_is_decoded(source, monkeypatch):
    still(source / "a.png")
    monkeypatch.setattr("data_prep.ingest.survey", None)
    with pytest.raises(IsADirectoryError, match=r"out=.*media is a folder; name a file"):
        ingest(source=source, out=source, bad_clip_budget=0)
    with pytest.raises(
        NotADirectoryError, match=r"a\.png is a file, so that nothing can be made in it"
    ):
        ingest(source=source, out=source / "a.png" / "x.jsonl", bad_clip_budget=0)
    assert [path.name for path in source.parent.rglob("*")] == ["media", "a.png"]


def test_bad_clips_are_printed_by_reason(capsys):
    bad = {f"k{i}": f"/x/k{i}.png: cannot be decoded (E{i})" for i in range(30)}
    print_bad(Console(width=200), {"z": "z.png has no alpha"} | bad, Path("r.json"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30 skipped: cannot be decoded" and lines[21] == "1 skipped: has no alpha"
    assert len(lines) == 23 and lines[22] == "11 more are in r.json"


def test_source_must_be_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="name the folder"):
        run(tmp_path / "none")


def test_the_process_that_hands_out_files_does_without_torch():
    code = "import sys, data_prep.ingest\nassert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
