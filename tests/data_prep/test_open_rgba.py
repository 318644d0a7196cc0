"""The set open-rgba from small packages: one build, killed and gone on with, the same bytes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from acetate.cli import run
from acetate.data.shards import ShardError, index_shards, read_clip
from data_prep import open_rgba
from data_prep.open_rgba import RECIPE, SUMS, build, held_out, quoted, stratum_of
from tests.data_prep.test_collect import FARMERS, RUNNERS, TONED, debian, npm, numbered
from tests.processes import program

OTHERS = ["1f525", "1f4a8", "1f60a", "1f436", "1f431", "1f42d", "1f439", "1f430"]
CFG = {
    "packages": ["emoji"], "rendered": None, "share_alike": False, "replace": False,
    "drawn": {"clips": 28, "frames": 5, "size": 16, "seed": 0}, "per_group": 2, "max_side": 8,
    "max_frames": 73, "val_fraction": 0.5, "per_stratum": 2, "soft": 0.25,
    "kinds": {"hair": "hair", "glass": "glass", "smoke": "smoke", "flame": "glow",
              "particles": "effects", "shadow": "opaque", "shape": "opaque"},
    "words": {"glow": r"\bfire\b", "smoke": r"\bdash\b"},
}  # fmt: skip


def in_process(name, **settings):
    run(f"prep {name}", [f"{key}={quoted(value)}" for key, value in settings.items()])


@pytest.fixture
def quick(monkeypatch):
    """Programs as functions of this process: starting one takes seconds."""
    monkeypatch.setattr(open_rgba, "prep", in_process)


def made(folder):
    return {line.split("  ")[1]: line[:64] for line in (folder / SUMS).read_text().splitlines()}


def test_one_build(tmp_path, quick, monkeypatch):
    source = npm(tmp_path / "down", [*TONED, *FARMERS, *RUNNERS, *OTHERS])
    cfg = {**CFG, "source": str(source)}
    lines = build(cfg, tmp_path / "one", 0)
    assert {line["stratum"] for line in lines} == set(open_rgba.STRATA)
    assert all(line["key"].startswith(f"{line['stratum']}-{line['origin']}-") for line in lines)
    sides = defaultdict(set)
    for line in lines:
        sides[line["group"]].add(line["split"])
    assert all(len(side) == 1 for side in sides.values())
    clips, test = (index_shards([tmp_path / "one" / name]) for name in ("clips", "test"))
    assert {ref.key for ref in test} == {ln["key"] for ln in lines if ln["split"] == "test"}
    assert len(clips) + len(test) == len(lines) and {ref.split for ref in test} == {"val"}
    assert read_clip(test[0]).frames.shape[1] <= 16
    for name, digest in made(tmp_path / "one").items():
        assert hashlib.sha256((tmp_path / "one" / name).read_bytes()).hexdigest() == digest
    assert json.loads((tmp_path / "one" / RECIPE).read_text())["packages"][0][1] == "1.0.0"

    # elsewhere, from a copy of the packages, and killed while clips are copied
    again = npm(tmp_path / "moved", [*TONED, *FARMERS, *RUNNERS, *OTHERS])
    write, calls = open_rgba.read_media, []

    def dies(ref):
        calls.append(ref)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return write(ref)

    monkeypatch.setattr(open_rgba, "read_media", dies)
    with pytest.raises(KeyboardInterrupt):
        build({**cfg, "source": str(again)}, tmp_path / "two", 0)
    assert not (tmp_path / "two" / SUMS).exists()
    build({**cfg, "source": str(again)}, tmp_path / "two", 0)
    assert made(tmp_path / "two") == made(tmp_path / "one")


def test_share_alike_is_left_out_unless_it_is_asked_for(tmp_path, quick):
    root = debian(tmp_path / "down", "endless-sky")
    for name in ("ion blast+{}.png", "puff~{}.png"):
        numbered(root / "images/effect", name, 4, 16)  # public domain, as its file says
    numbered(root / "images/asteroid/gold", "spin-{}.png", 4, 16)
    cfg = {**CFG, "source": str(tmp_path / "down"), "packages": ["endless-sky"]}
    lines = build(cfg, tmp_path / "free", 0)
    assert {line["licence"] for line in lines} == {"CC0-1.0", "public-domain"}
    lines = build({**cfg, "share_alike": True}, tmp_path / "all", 0)
    assert "CC-BY-SA-3.0+" in {line["licence"] for line in lines}


@pytest.mark.parametrize("licence", ["CC-BY-SA-4.0", "CC-BY-SA-3.0+", "GPL-2.0-or-later", "GPL-3+"])
def test_share_alike_licences(licence):
    assert open_rgba.SHARE_ALIKE.search(licence)
    assert not any(map(open_rgba.SHARE_ALIKE.search, ("MIT", "CC0-1.0", "public-domain")))


def test_strata():
    assert stratum_of("flame-000003", "", 0.9, CFG) == "glow"
    assert stratum_of("emoji-fire-1f525", "3D emoji: fire.", 0.1, CFG) == "opaque"
    assert stratum_of("emoji-fire-1f525", "3D emoji: fire.", 0.4, CFG) == "glow"
    assert stratum_of("emoji-ghost-1f47b", "3D emoji: ghost.", 0.4, CFG) == "effects"


def test_the_test_takes_whole_groups_that_do_not_train():
    def member(key, group, stratum, split):
        line = {"key": key, "group": group, "stratum": stratum, "split": split}
        return open_rgba.Member(None, line)  # type: ignore[arg-type]

    found = [member(f"g{i}{j}", f"g{i}", "glow", "val") for i in range(9) for j in range(3)]
    found += [member(f"t{i}", f"t{i}", "glow", "train") for i in range(9)]
    found.append(member("h", "h", "hair", "val"))
    taken = held_out(found, 4)
    assert taken - {"h"} <= {f"g{i}" for i in range(9)} and len(taken) == 3 and "h" in taken


def test_wrong_folders_are_refused_before_anything_is_made(tmp_path):
    cfg = {**CFG, "source": str(tmp_path)}
    with pytest.raises(FileNotFoundError, match="npm install --prefix"):
        build(cfg, tmp_path / "out", 0)
    with pytest.raises(ShardError, match="holds no finished shards"):
        build({**cfg, "packages": [], "rendered": str(tmp_path)}, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.slow
def test_killed_with_what_it_started(tmp_path):
    source = npm(tmp_path / "down", [*TONED, *OTHERS])
    command = [
        *("acetate", "prep", "open_rgba", f"source={source}", f"out={tmp_path / 'out'}"),
        *("drawn.clips=140", "drawn.frames=9", "drawn.size=16", "per_stratum=1"),
    ]
    build = subprocess.Popen([sys.executable, "-m", *command, "workers=1"])
    for _ in range(600):
        if list((tmp_path / "out/parts").glob("drawn/*.tmp")):
            break
        time.sleep(0.1)
    os.kill(build.pid, signal.SIGKILL)
    build.wait()
    code, said = program(tmp_path / "log", *command, "workers=0")
    assert code == 0, said[-2000:]
    sums = subprocess.run(["sha256sum", "-c", SUMS], cwd=Path(tmp_path / "out"))
    assert sums.returncode == 0
