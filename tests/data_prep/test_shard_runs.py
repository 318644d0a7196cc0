"""How shards are made: in processes, on after a kill, within memory."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from acetate.data.shards import ShardError
from acetate.video_io import MediaError, encode_ffv1
from data_prep import shard as program
from data_prep.folders import MEASURED
from data_prep.journal import only_writer, read_journal
from data_prep.plans import decide, measure, open_line, read_lines
from data_prep.shard import DECISIONS, prepare
from tests.data_prep.sharded import (
    SETTINGS,
    kill_in_the_middle,
    lines_of,
    make,
    soft,
    source,  # noqa: F401
    with_a_slow_film,
    with_decisions,
)
from tests.media.films import drawn
from tests.paths import ROOT


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_workers_make_the_same_bytes(source, tmp_path):
    assert make(source, tmp_path / "a") == make(source, tmp_path / "b", workers=2)
    assert (tmp_path / "a" / DECISIONS).read_bytes() == (tmp_path / "b" / DECISIONS).read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_command_goes_on(source, tmp_path):
    settings = replace(SETTINGS, max_frames=121, bleed=None)  # the command's
    with_a_slow_film(source)
    make(source, tmp_path / "first", settings)
    with_decisions(source, lines_of(tmp_path / "first"))
    whole = make(source, tmp_path / "whole", settings, max_clips=2, max_bytes=2**30)
    kill_in_the_middle(source, tmp_path / "cut", "local", os.environ)
    assert (
        make(source, tmp_path / "cut", settings, max_clips=2, max_bytes=2**30, workers=1) == whole
    )


def test_restart_goes_on(source, tmp_path, monkeypatch):
    whole = make(source, tmp_path / "whole")
    calls = []

    def stumble(plan, settings, spill):
        calls.append(plan.line.key)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return prepare(plan, settings, spill)

    monkeypatch.setattr(program, "prepare", stumble)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "cut")
    assert make(source, tmp_path / "cut") == whole
    assert len(calls) == 5 + 8 - 3  # the first tar's three clips were kept


def test_finished_work_is_left_alone(source, tmp_path):
    manifest = make(source, tmp_path / "out")
    assert make(source, tmp_path / "out") == manifest
    with pytest.raises(ShardError, match="made with other settings"):
        make(source, tmp_path / "out", val_fraction=0.5)


def test_what_a_kill_left_beside_the_manifest_goes(source, tmp_path):
    make(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for name in (MEASURED, "clips-000001.part.json"):
        (tmp_path / "out" / name).write_text("{}\n")
    make(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_one_run_at_a_time(source, tmp_path):
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(RuntimeError, match="out is being written by another process"),
    ):
        make(source, tmp_path / "out")


def test_pieces_beyond_memory_wait_in_files(source, tmp_path, monkeypatch):
    whole = make(source, tmp_path / "out", replace(SETTINGS, max_frames=2))
    monkeypatch.setattr(program, "IN_MEMORY", 1)
    assert make(source, tmp_path / "spilled", replace(SETTINGS, max_frames=2)) == whole
    for tar in (tmp_path / "out").glob("*.tar"):
        assert (tmp_path / "spilled" / tar.name).read_bytes() == tar.read_bytes()
    assert not (tmp_path / "spilled" / program.SPILL).exists()


LONG = """
import resource, sys
from pathlib import Path
from data_prep import shard
from tests.data_prep.sharded import make
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
shard.IN_MEMORY = 2**20
for name in ("warm", "short", "long"):
    folder = Path(sys.argv[1]) / name
    make(folder / "media", folder / "out")
    print(peak())
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("side", "noise", "short", "long", "allowed"),
    [
        (320, 255, 12, 160, 40),  # 62 MiB decoded, and not much less as FFV1
        (24, 0, 300, 2300, 2),  # a KiB a frame, half of what it is decoded
    ],
)
def test_a_long_film_takes_no_more_memory_than_a_short_one(
    tmp_path, side, noise, short, long, allowed
):
    frame, draw = drawn("smoke", 0, 1, side)[0], np.random.default_rng(0)
    for name, count in (("warm", short), ("short", short), ("long", long)):
        (tmp_path / name / "media").mkdir(parents=True)
        frames = (
            np.roll(frame, 2 * i, axis=0) + draw.integers(0, noise + 1, frame.shape, np.uint8)
            for i in range(count)
        )
        (tmp_path / name / "media/film.mkv").write_bytes(encode_ffv1(frames, 24))
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    _, least, most = map(float, done.stdout.split())
    assert most < least + allowed, (least, most)


def test_what_was_measured_survives_an_interruption(source, tmp_path, monkeypatch):
    make(source, tmp_path / "whole")  # ingests
    lines = [replace(line, decisions=None) for line in read_lines(source.parent / "found.jsonl")]
    journal = tmp_path / "measured.jsonl"
    calls = []

    def stumble(line):
        calls.append(line.key)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(line)

    monkeypatch.setattr("data_prep.plans.measure", stumble)
    with pytest.raises(KeyboardInterrupt):
        decide(lines, SETTINGS, journal, executor="local", workers=0)
    plans, bad = decide(lines, SETTINGS, journal, executor="local", workers=0)
    assert len(calls) == 4 + len(lines) - 3 and not bad
    assert [plan.line.key for plan in plans] == [line.key for line in lines]


def test_what_was_measured_of_another_file_does_not_count(source, tmp_path):
    make(source, tmp_path / "whole")  # ingests
    lines = [replace(line, decisions=None) for line in read_lines(source.parent / "found.jsonl")]
    journal = tmp_path / "measured.jsonl"
    decide(lines, SETTINGS, journal, executor="local", workers=0)
    Image.fromarray(soft(1, alpha=255)[0]).save(source / "still0.png")
    # another line under the old key
    lines[2] = replace(lines[2], files=lines[1].files, kind=lines[1].kind)
    plans, _ = decide(lines, SETTINGS, journal, executor="local", workers=0)
    again = [entry["key"] for entry in read_journal(journal)[len(lines) :]]
    assert again == [lines[2].key, "still0"]
    assert next(plan for plan in plans if plan.line.key == "still0").refusal


def test_a_pipe_in_a_manifest_is_not_waited_for(source):
    make(source, source.parent / "out")
    (line, *_) = read_lines(source.parent / "found.jsonl")
    os.mkfifo(source / "pipe.mov")
    waits = replace(line, files=[str(source / "pipe.mov")])
    with pytest.raises(MediaError, match=r"pipe\.mov: no plain file"):
        open_line(waits)
