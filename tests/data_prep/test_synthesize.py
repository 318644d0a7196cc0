import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from acetate.data.drawing import FPS
from acetate.data.shards import MANIFEST, ShardError, index_shards, read_clip, read_manifest
from acetate.data.synthetic import KINDS, render
from data_prep import synthesize
from data_prep.journal import only_writer
from data_prep.synthesize import draw
from tests.compose import called

SETTINGS = {
    "clips": 16,
    "frames": 5,
    "sizes": [16],
    "seed": 0,
    "val_fraction": 0.2,
    "max_clips": 6,
    "max_bytes": 10**9,
}


def make(out, **settings):
    return synthesize.synthesize(out=out, **(SETTINGS | settings))


def test_kinds_are_balanced_and_both_splits_filled(tmp_path):
    manifest = make(tmp_path)
    refs = index_shards([tmp_path])
    counts = [sum(ref.key.startswith(kind) for ref in refs) for kind in KINDS]
    assert max(counts) - min(counts) <= 1 and len(refs) == manifest["clips"] == 16
    assert min(manifest["splits"].values()) >= 1
    assert [len(tar["clips"]) for tar in read_manifest(tmp_path)["shards"]] == [6, 6, 4]
    clip = read_clip(refs[0])
    assert clip.frames.shape == (5, 16, 16, 4) and clip.fps == FPS and "ransparent" in clip.prompt


def test_two_runs_make_the_same_bytes(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["clips-000000.tar", "clips-000001.tar", "clips-000002.tar", MANIFEST]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    make(tmp_path / "c", seed=1)
    assert (tmp_path / "c" / names[0]).read_bytes() != (tmp_path / "a" / names[0]).read_bytes()


def test_pictures_are_the_synthetic_ones():
    clip = render("shape", 3, 2, 16, 16)
    frames = synthesize.stored(clip)
    visible = clip.alpha[0].numpy() > 0
    assert np.abs(frames[..., 3] / 255 - clip.alpha[0].numpy()).max() <= 0.5 / 255 + 1e-6
    color = ((clip.rgb + 1) / 2).permute(1, 2, 3, 0).numpy()
    assert np.abs(frames[..., :3] / 255 - color)[visible].max() <= 0.5 / 255 + 1e-6
    assert (frames[~visible] == 0).all()


def test_sizes_take_turns_over_all_kinds(tmp_path):
    make(tmp_path, sizes=[16, 24], clips=2 * len(KINDS))
    sizes = {
        kind: [ref.width for ref in index_shards([tmp_path]) if ref.key.startswith(kind)]
        for kind in KINDS
    }
    assert all(sorted(widths) == [16, 24] for widths in sizes.values())


def test_sizes_need_not_be_square(tmp_path):
    make(tmp_path, sizes=[[16, 24], 12], clips=2 * len(KINDS))
    sizes = {(ref.height, ref.width) for ref in index_shards([tmp_path])}
    assert sizes == {(16, 24), (12, 12)}


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_workers_make_the_same_bytes(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", workers=2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_interrupted_run_goes_on_after_its_last_tar(tmp_path, monkeypatch):
    make(tmp_path / "whole")
    drawn = []

    def stumble(plan, index):
        drawn.append(index)
        if len(drawn) == 9:
            raise KeyboardInterrupt
        return draw(plan, index)

    monkeypatch.setattr(synthesize, "draw", stumble)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut")
    make(tmp_path / "cut")
    assert drawn[9:] == list(range(6, 16))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clips(tmp_path, monkeypatch):
    one = draw(synthesize.Plan(1, 1, ((8, 8),), 0), 0)
    monkeypatch.setattr(synthesize, "draw", lambda plan, index: replace(one, key=plan.key(index)))
    peaks = []
    for clips in (1_000, 3_000):
        tracemalloc.start()
        make(tmp_path / str(clips), clips=clips, frames=1, max_clips=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # bytes a clip; its line in the manifest alone has 130
    assert (peaks[1] - peaks[0]) / 2_000 < 40


def test_finished_work_is_left_alone(tmp_path):
    manifest = make(tmp_path)
    before = (tmp_path / "clips-000000.tar").stat().st_mtime_ns
    assert make(tmp_path) == manifest
    assert (tmp_path / "clips-000000.tar").stat().st_mtime_ns == before
    with pytest.raises(ShardError, match="made with other settings"):
        make(tmp_path, seed=1)


def test_what_a_kill_left_beside_the_manifest_goes(tmp_path):
    make(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "clips-000002.part.json").write_text("{}")
    make(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_one_run_at_a_time(tmp_path):
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(RuntimeError, match="out is being written by another process"),
    ):
        make(tmp_path / "out")
    with pytest.raises(ValueError, match="Ray needs at least workers=1"):
        make(tmp_path / "out", executor="ray")
    assert not [*tmp_path.iterdir()]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    called(
        "prep synthesize", "out=shards", "clips=7", "frames=5", "size=[16,24]", "val_fraction=0.3"
    )
    assert read_manifest(tmp_path / "shards")["clips"] == 7
    assert "clips to train and" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]  # no log, no .hydra folder


def test_preview_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    called(
        "prep synthesize",
        "out=shards",
        "clips=1000000",
        "frames=5",
        "size=[[16,24]]",
        "preview=true",
    )
    text = capsys.readouterr().out
    assert (
        "shape-000006" in text and "1000000 clips: about" in text and "Nothing was written" in text
    )
    assert not list(tmp_path.iterdir())
