import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acetate.data.shards import ShardError, index_shards, read_clip, read_manifest, read_meta
from data_prep import render
from data_prep.blender import BlenderError, interpreter
from data_prep.scenes import KINDS
from tests.compose import called
from tests.paths import ROOT

STAND_IN = Path(__file__).with_name("blender_stand_in.py")


@pytest.fixture
def blender(tmp_path):
    """An interpreter whose Blender answers at once."""
    path = tmp_path / "with" / "python"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    path.chmod(0o755)
    return str(path)


def make(out, blender, **settings):
    return render.render_clips(
        **{
            "out": out, "clips": 12, "frames": 5, "sizes": [16], "seed": 0, "kinds": [],
            "samples": 1, "blender": blender, "val_fraction": 0.2, "max_clips": 5,
            "max_bytes": 10**9,
        }
        | settings
    )  # fmt: skip


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kinds_take_turns_and_clips_say_what_they_are(tmp_path, blender):
    assert make(tmp_path / "out", blender)["clips"] == 12
    refs = index_shards([tmp_path / "out"])
    assert sorted(ref.key.split("-")[0] for ref in refs) == sorted([*KINDS, KINDS[0]])
    clip = read_clip(refs[0])
    assert clip.frames.shape == (5, 16, 16, 4)
    meta = read_meta(refs[0])
    assert meta["licence"] == "CC0-1.0" and "3D render" in clip.prompt
    done = meta["done"]
    assert "Cycles of Blender 5.0.1, 1 samples, seed" in done["rendered"]
    assert done["stratum"] == "glass" and json.loads(done["scene"])["camera"]


def test_facts_do_not_depend_on_the_number_of_clips(tmp_path, blender):
    make(tmp_path / "few", blender, clips=3)
    make(tmp_path / "many", blender, clips=6)
    few, many = (
        {ref.key: read_clip(ref).prompt for ref in index_shards([tmp_path / name])}
        for name in ("few", "many")
    )
    assert few.items() <= many.items()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_processes_make_the_same_bytes(tmp_path, blender):
    make(tmp_path / "a", blender)
    make(tmp_path / "b", blender, workers=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_interrupted_run_goes_on(tmp_path, blender, monkeypatch):
    make(tmp_path / "whole", blender)
    monkeypatch.setenv("STUMBLE", KINDS[7])
    with pytest.raises(
        BlenderError, match=rf"failed at {KINDS[7]} of seed \d+: KeyError: 'no such"
    ):
        make(tmp_path / "cut", blender)
    assert sorted(files(tmp_path / "cut")) == ["clips-000000.part.json", "clips-000000.tar"]
    monkeypatch.delenv("STUMBLE")
    make(tmp_path / "cut", blender)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_a_blender_that_dies_and_other_settings(tmp_path, blender, monkeypatch):
    make(tmp_path / "out", blender, kinds=["wires"], clips=2)
    with pytest.raises(ShardError, match=r"made with other settings: samples: 1 there, 2 now"):
        make(tmp_path / "out", blender, kinds=["wires"], clips=2, samples=2)
    monkeypatch.setenv("STUMBLE", "dies")
    with pytest.raises(BlenderError, match=r"ended at glass of seed \d+ with exit code 7: out of"):
        make(tmp_path / "other", blender)
    assert not (tmp_path / "other").exists()


def test_a_disk_that_is_full_of_frames(tmp_path, blender, monkeypatch):
    monkeypatch.setenv("STUMBLE", "wires")
    full = type("Usage", (), {"free": 2**20})()
    monkeypatch.setattr("data_prep.blender.shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"has 1 MiB left, too few.*TMPDIR=FOLDER"):
        make(tmp_path / "out", blender, kinds=["wires"], clips=1)


def test_each_kind_is_named_once(tmp_path, blender):
    with pytest.raises(ValueError, match="each kind once"):
        make(tmp_path / "out", blender, kinds=["glass", "glass"])


def test_command_and_preview(tmp_path, blender, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ("frames=5", "size=[16,24]", f"blender={blender}")
    called("prep render", "out=shards", "clips=11", *settings, "preview=true")
    assert "11 clips: about" in capsys.readouterr().out and not Path("shards").exists()
    called("prep render", "out=shards", "clips=3", *settings)
    assert read_manifest(Path("shards"))["clips"] == 3
    assert "clips to train and" in capsys.readouterr().out


@pytest.mark.long
def test_real_renders_are_killed_and_go_on(tmp_path):
    """Blender itself: two small clips, their bytes the same after a kill, and no Blender that
    goes on without its parent."""
    try:
        python, _ = interpreter(os.environ.get("ACETATE_TEST_BLENDER"))
    except BlenderError as error:
        pytest.skip(f"no Blender: {error}")
    settings = ("clips=2", "frames=5", "size=32", "samples=1", "max_clips=1", f"blender={python}",
        "kinds=[objects,flames]")  # fmt: skip

    def begin(out):
        command = [sys.executable, "-m", "acetate", "prep", "render", f"out={out}", *settings]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    assert begin(tmp_path / "whole").wait(500) == 0
    run, limit = begin(tmp_path / "cut"), time.monotonic() + 500
    while not (tmp_path / "cut" / "clips-000000.part.json").exists():
        assert run.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "cut" / "manifest.json").exists() and children
    while any(alive(child) for child in children):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert begin(tmp_path / "cut").wait(500) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    alphas = [read_clip(ref).frames[..., 3] for ref in index_shards([tmp_path / "whole"])]
    assert all(alpha.max() > 100 and alpha.min() == 0 for alpha in alphas)


def alive(child):
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
