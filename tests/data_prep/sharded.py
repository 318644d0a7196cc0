"""A folder of soft media, and the shards that are made of it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from acetate.data.shards import MANIFEST
from acetate.video_io import encode_ffv1
from data_prep.cleaning import Settings
from data_prep.ingest import ingest
from data_prep.shard import DECISIONS, shard
from tests.paths import ROOT

SETTINGS = Settings(
    choices={}, min_alpha=8, trim=False, max_side=None, bleed=0, fps=None, default_fps=24,
    max_frames=100,
    empty="refuse", full="refuse", flickers="keep",
)  # fmt: skip


def soft(frames=8, size=32, color=(240, 120, 60), alpha=None):
    """Straight colour, each frame a little bluer, with an alpha ramp, or the given alpha."""
    clip = np.empty((frames, size, size, 4), np.uint8)
    clip[..., :3] = color
    clip[..., 2] += np.arange(frames, dtype=np.uint8)[:, None, None]
    clip[..., 3] = np.linspace(0, 255, size) if alpha is None else alpha
    return clip


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for i in range(4):
        (folder / f"film{i}.mkv").write_bytes(encode_ffv1(soft(frames=3 + i), 12))
        Image.fromarray(soft(1)[0]).save(folder / f"still{i}.png")
    return folder


def make(source, out, settings=SETTINGS, **changes):
    manifest = source.parent / "found.jsonl"
    if not manifest.exists():
        ingest(source=source, out=manifest, bad_clip_budget=0)
    defaults = {"val_fraction": 0.2, "max_clips": 3, "max_bytes": 10**9, "bad_clip_budget": 0}
    where = {"executor": "local", "workers": 0}
    return shard(manifest=manifest, out=out, settings=settings, **(defaults | where | changes))


def with_decisions(source, lines_of_clips):
    """Puts decisions, key -> JSON, into the manifest's lines."""
    found = source.parent / "found.jsonl"
    lines = [json.loads(text) for text in found.read_text().splitlines()]
    for line in lines:
        line["decisions"] = lines_of_clips[line["key"]]["decisions"]
    found.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def with_a_slow_film(source):
    """Makes the last film one that takes seconds, so that a kill comes before its end."""
    noise = np.random.default_rng(0).integers(0, 256, (121, 256, 256, 4), np.uint8)
    (source / "film3.mkv").write_bytes(encode_ffv1(noise, 12))


def kill_in_the_middle(source, out, executor, env):
    """The command on 2 processes of `executor`, killed as soon as it has written a shard."""
    settings = [
        f"manifest={source.parent / 'found.jsonl'}",
        f"out={out}",
        "max_clips=2",
        "val_fraction=0.2",
    ]
    where = [f"executor={executor}", "workers=2"]
    program = subprocess.Popen(
        [sys.executable, "-m", "data_prep.shard", *settings, *where],
        cwd=ROOT,
        env=env,
        start_new_session=True,
    )
    while program.poll() is None and not (out / "clips-000000.part.json").exists():
        time.sleep(0.005)
    assert program.poll() is None
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    assert not (out / MANIFEST).exists()


def lines_of(out):
    return {
        line["key"]: line for line in map(json.loads, (out / DECISIONS).read_text().splitlines())
    }
