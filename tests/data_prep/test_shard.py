import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acetate.data.shards import ShardError, index_shards, read_clip, read_manifest
from acetate.video_io import encode_ffv1
from data_prep import shard as program
from data_prep.ingest import TooManyBad, ingest
from data_prep.shard import (
    Settings,
    limit_side,
    looks_premultiplied,
    pieces,
    prepare,
    read_lines,
    shard,
    snap,
    unpremultiply,
)

MEDIA = Path(os.environ.get("ACETATE_MEDIA", Path(__file__).parents[3] / "shared" / "media"))
SETTINGS = Settings(
    snap_low=6, snap_high=249, premultiplied="auto", min_alpha=8, max_side=None, max_frames=100, default_fps=24
)


def soft(frames=8, size=32, colour=(240, 120, 60), alpha=None):
    """Straight colour with an alpha ramp, or the given alpha."""
    clip = np.empty((frames, size, size, 4), np.uint8)
    clip[..., :3] = colour
    clip[..., 3] = np.linspace(0, 255, size) if alpha is None else alpha
    return clip


def premultiplied(frames):
    colour = np.round(frames[..., :3] * (frames[..., 3:] / 255.0)).astype(np.uint8)
    return np.concatenate((colour, frames[..., 3:]), axis=-1)


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
    defaults = {"val_fraction": 0.2, "max_clips": 3, "max_bytes": 10**9, "bad_clip_budget": 0, "workers": 0}
    return shard(manifest=manifest, out=out, settings=settings, **(defaults | changes))


def test_folder_to_shards(source, tmp_path):
    manifest = make(source, tmp_path / "out")
    assert (manifest["clips"], manifest["frames"], manifest["skipped"]) == (8, 4 + 3 + 4 + 5 + 6, {})
    assert min(manifest["splits"].values()) >= 1
    refs = {ref.key: ref for ref in index_shards([tmp_path / "out"])}
    wanted = soft()
    wanted[..., 0, :3] = 0  # hidden by alpha 0
    clip = read_clip(refs["film2"])
    assert np.array_equal(clip.frames, wanted[:5]) and clip.fps == 12
    assert clip.prompt == "Transparent background: film2"
    assert np.array_equal(read_clip(refs["still0"]).frames, wanted[:1])


@pytest.mark.slow
def test_workers_make_the_same_bytes(source, tmp_path):
    assert make(source, tmp_path / "a") == make(source, tmp_path / "b", workers=2)


def test_restart_goes_on(source, tmp_path, monkeypatch):
    whole = make(source, tmp_path / "whole")
    calls = []

    def stumble(line, settings):
        calls.append(line.key)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return prepare(line, settings)

    monkeypatch.setattr(program, "prepare", stumble)
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "cut")
    assert make(source, tmp_path / "cut") == whole
    assert len(calls) == 5 + 8 - 3  # the first tar's three clips were kept


def test_finished_work_is_left_alone(source, tmp_path):
    manifest = make(source, tmp_path / "out")
    assert make(source, tmp_path / "out") == manifest
    with pytest.raises(ShardError, match="made otherwise"):
        make(source, tmp_path / "out", val_fraction=0.5)


def test_bad_clips_are_skipped_within_the_budget(source, tmp_path):
    make(source, tmp_path / "first")  # ingests
    (source / "film1.mkv").write_bytes(b"broken since")
    (source / "film2.mkv").write_bytes(encode_ffv1(soft(frames=2), 12))
    with pytest.raises(TooManyBad, match=r"2 bad clips, bad_clip_budget=1: film1: .*cannot be decoded.*; film2: has 2"):
        make(source, tmp_path / "out", bad_clip_budget=1)
    manifest = make(source, tmp_path / "out", bad_clip_budget=2)
    assert manifest["clips"] == 6 and list(manifest["skipped"]) == ["film1", "film2"]
    assert "the manifest says 5; ingest the folder again" in manifest["skipped"]["film2"]


def test_manifest_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_prep\.ingest"):
        read_lines(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: not a line of data_prep\.ingest"):
        read_lines(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"premultiplied": "maybe"}, "choose auto, true or false"),
        ({"snap_low": 250}, "0 <= low < high <= 255"),
        ({"min_alpha": 0}, "min_alpha=0; must be at least 1"),
        ({"max_frames": 0}, "max_frames=0; must be at least 1"),
        ({"max_side": 0}, "max_side=0; must be at least 1"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_snap():
    frames = soft(1, 8, alpha=np.array([0, 5, 6, 100, 249, 250, 255, 1]))
    assert snap(frames, 6, 249)[0, 0, :, 3].tolist() == [0, 0, 6, 100, 249, 255, 255, 0]
    assert np.array_equal(snap(frames, 6, 249)[..., :3], frames[..., :3])


def test_premultiplied_is_measured():
    straight = soft()
    assert not looks_premultiplied(straight)
    assert looks_premultiplied(premultiplied(straight))
    blurred = premultiplied(straight).astype(int) + np.random.default_rng(0).integers(-4, 5, straight.shape)
    assert looks_premultiplied(blurred.clip(0, 255).astype(np.uint8))  # a codec's noise
    assert not looks_premultiplied(soft(alpha=255)) and not looks_premultiplied(soft(colour=(0, 0, 0), alpha=0))
    coloured = premultiplied(straight)
    coloured[..., :8, :3], coloured[..., :8, 3] = 200, 0  # colour where alpha is 0
    assert not looks_premultiplied(coloured)


def test_unpremultiply_inverts_where_alpha_is_not_tiny():
    straight = soft()
    back = unpremultiply(premultiplied(straight), 8)
    visible = straight[..., 3] >= 64
    assert np.abs(back[visible].astype(int) - straight[visible]).max() <= 2
    assert np.array_equal(back[..., 3], straight[..., 3])
    tiny = unpremultiply(np.array([[[[1, 0, 0, 1]]]], np.uint8), 8)
    assert tiny[0, 0, 0].tolist() == [32, 0, 0, 1]  # 1 / 8, not 1 / 1


@pytest.mark.parametrize(("choice", "expected"), [("auto", True), ("true", True), ("false", False)])
def test_premultiplied_films_become_straight(source, tmp_path, choice, expected):
    (source / "glow.mkv").write_bytes(encode_ffv1(premultiplied(soft()), 12))
    make(source, tmp_path / "out", replace(SETTINGS, premultiplied=choice))
    ref = next(ref for ref in index_shards([tmp_path / "out"]) if ref.key == "glow")
    frame = read_clip(ref).frames[0, 0]
    assert abs(int(frame[16, 0]) - (240 if expected else 124)) <= 2
    with open(ref.tar, "rb") as file:
        file.seek(ref.meta[0])
        assert json.loads(file.read(ref.meta[1]))["premultiplied_source"] is expected


def test_limit_side_is_premultiplied_and_keeps_the_aspect():
    frames = np.zeros((2, 40, 80, 4), np.uint8)
    frames[:, :, 33:] = 255  # white, with hidden black beside it
    small = limit_side(frames, 20)
    assert small.shape == (2, 10, 20, 4)
    assert ((small[..., 3] > 0) & (small[..., 3] < 255)).any()
    assert (small[small[..., 3] > 0][:, :3] >= 254).all()
    assert (small[:, :, :6, 3] == 0).all() and (small[:, :, 12:, 3] == 255).all()
    assert limit_side(frames, 80) is frames


def test_long_clips_are_cut_into_equal_pieces(source, tmp_path):
    make(source, tmp_path / "out", replace(SETTINGS, max_frames=4))
    lengths = {ref.key: ref.frames for ref in index_shards([tmp_path / "out"])}
    assert lengths["film0"] == 3 and lengths["film1"] == 4
    assert (lengths["film3-p000"], lengths["film3-p001"]) == (3, 3)
    splits = {ref.key: ref.split for ref in index_shards([tmp_path / "out"])}
    assert splits["film3-p000"] == splits["film3-p001"]
    line = read_lines(source.parent / "found.jsonl")[0]
    cuts = pieces(replace(line, frames=250), replace(SETTINGS, max_frames=100))
    assert [(start, end) for _, start, end in cuts] == [(0, 83), (83, 166), (166, 250)]


@pytest.mark.slow
@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no real media at {MEDIA}; set ACETATE_MEDIA")
def test_real_media(tmp_path):
    """One or two of every kind and trap."""
    ingest(source=MEDIA, out=tmp_path / "all.jsonl", bad_clip_budget=0)
    wanted = (
        "packed-yyeva_ring", "pairs-vap_wings_trunk", "anims-variant_vap_globe_vp9alpha", "stills-gfm-am2k_sample1",
        "anims-variant_alphaplayer_heartbeats_prores4444", "anims-apngkit_ball", "anims-yyimage_wall-e_12f",
        "anims-vap_simple_demo_seq", "stills-kenney-particle-pack-smoke_04",
    )  # fmt: skip
    lines = [line for line in (tmp_path / "all.jsonl").read_text().splitlines() if json.loads(line)["key"] in wanted]
    assert len(lines) == len(wanted)
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    manifest = shard(
        manifest=tmp_path / "some.jsonl", out=tmp_path / "out", settings=replace(SETTINGS, max_side=192),
        val_fraction=0.2, max_clips=100, max_bytes=10**9, bad_clip_budget=0, workers=0,
    )  # fmt: skip
    assert manifest["clips"] == len(wanted) and not manifest["skipped"]
    assert read_manifest(tmp_path / "out")["splits"]["val"] >= 1
    was_premultiplied = set()
    for ref in index_shards([tmp_path / "out"]):
        alpha = read_clip(ref).frames[..., 3]
        assert max(ref.width, ref.height) <= 192 and alpha.min() == 0 and alpha.max() > 150
        with open(ref.tar, "rb") as file:
            file.seek(ref.meta[0])
            if json.loads(file.read(ref.meta[1]))["premultiplied_source"]:
                was_premultiplied.add(ref.key)
    assert was_premultiplied == {"packed-yyeva_ring"}
