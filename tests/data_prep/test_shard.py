import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from acetate.data.shards import MANIFEST, ShardError, index_shards, read_clip, read_manifest
from acetate.media.clip import Limits
from acetate.video_io import encode_ffv1
from data_prep import shard as program
from data_prep.bad_clips import TooManyBad
from data_prep.ingest import ingest
from data_prep.plans import decide, piece_keys, read_lines
from data_prep.shard import DECISIONS, preview, shard
from tests.data_prep.sharded import (
    SETTINGS,
    lines_of,
    make,
    soft,
    source,  # noqa: F401
    with_decisions,
)

MEDIA = Path(os.environ.get("ACETATE_MEDIA", Path(__file__).parents[3] / "shared" / "media"))


def premultiplied(frames):
    color = np.round(frames[..., :3] * (frames[..., 3:] / 255.0)).astype(np.uint8)
    return np.concatenate((color, frames[..., 3:]), axis=-1)


def test_folder_to_shards(source, tmp_path):
    manifest = make(source, tmp_path / "out")
    assert (manifest["clips"], manifest["frames"], manifest["skipped"]) == (
        8,
        4 + 3 + 4 + 5 + 6,
        {},
    )
    assert min(manifest["splits"].values()) >= 1
    refs = {ref.key: ref for ref in index_shards([tmp_path / "out"])}
    wanted = soft()
    wanted[..., 0, :3] = 0  # hidden by alpha 0
    clip = read_clip(refs["film2"])
    assert np.array_equal(clip.frames, wanted[:5]) and clip.fps == 12
    assert clip.prompt == "Transparent background: film2"
    assert np.array_equal(read_clip(refs["still0"]).frames, wanted[:1])


def test_bad_clips_are_skipped_within_the_budget(source, tmp_path):
    make(source, tmp_path / "first")  # ingests
    (source / "film1.mkv").write_bytes(b"broken since")
    (source / "film2.mkv").write_bytes(encode_ffv1(soft(frames=2), 12))
    with pytest.raises(
        TooManyBad,
        match=r"2 bad clips, bad_clip_budget=1: film1: .*cannot be decoded.*; film2: has 2",
    ):
        make(source, tmp_path / "out", bad_clip_budget=1)
    manifest = make(source, tmp_path / "out", bad_clip_budget=2)
    assert manifest["clips"] == 6 and list(manifest["skipped"]) == ["film1", "film2"]
    assert "fewer than the manifest says; ingest the folder again" in manifest["skipped"]["film2"]


def test_what_ingest_refused_is_in_the_manifest(source, tmp_path, capsys):
    """And that no clip validates is said."""
    for path in [*source.glob("film*"), *source.glob("still[1-9]*")]:
        path.unlink()
    (source / "broken.webm").write_bytes(b"no film")
    ingest(source=source, out=tmp_path / "found.jsonl", bad_clip_budget=1)
    made = make(source, tmp_path / "a")
    assert "broken.webm: cannot be decoded" in made["skipped"]["broken"]
    program.print_summary(tmp_path / "a", made)
    assert "none validates, although val_fraction=0.2" in capsys.readouterr().out
    report = tmp_path / "found.report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "clips": 7}))  # another run's
    assert not make(source, tmp_path / "b")["skipped"]


def test_manifest_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"acetate prep ingest"):
        read_lines(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: not a line of acetate prep ingest"):
        read_lines(tmp_path / "bad.jsonl")


def test_pieces_of_long_names_are_all_kept(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    for i in (1, 2):
        (media / f"take_{'x' * 68}_{i:05d}.mkv").write_bytes(encode_ffv1(soft(frames=10), 12))
    assert make(media, tmp_path / "out", replace(SETTINGS, max_frames=5))["frames"] == 20
    assert {len(key) for key in piece_keys("k" * 80, 1001)} == {79, 80}


def test_clips_that_would_share_a_key_are_an_error(source, tmp_path):
    (source / "film3-p001.mkv").write_bytes(encode_ffv1(soft(frames=2), 12))
    with pytest.raises(
        ValueError,
        match=r"'film3-p001' and 'film3' would both write 'film3-p001'.* rename its file",
    ):
        make(source, tmp_path / "out", replace(SETTINGS, max_frames=3))
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_prompts_may_hold_any_line_end(source, tmp_path):
    make(source, tmp_path / "first")  # ingests
    found = source.parent / "found.jsonl"
    lines = [
        {**json.loads(text), "prompt": "a\u2028b\u2029c\x85d"}
        for text in found.read_bytes().split(b"\n")[:-1]
    ]
    found.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    assert {line.prompt for line in read_lines(found)} == {"a\u2028b\u2029c\x85d"}


def test_what_ingest_took_beyond_the_default_limits_is_read(source, tmp_path, monkeypatch):
    make(source, tmp_path / "first")  # ingests
    monkeypatch.setattr("data_prep.plans.LIMITS", Limits(max_pixels=1, max_frames=1, max_bytes=1))
    assert make(source, tmp_path / "out")["clips"] == 8


def test_no_clip_at_all_is_an_error(source, tmp_path):
    make(source, tmp_path / "first")  # ingests
    for path in source.iterdir():
        path.write_bytes(b"broken since")
    with pytest.raises(
        ShardError, match=r"none of the 8 clips of .*found\.jsonl became a shard \(film0: "
    ):
        make(source, tmp_path / "out", bad_clip_budget=8)
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize(("choice", "expected"), [("auto", True), ("true", True), ("false", False)])
def test_premultiplied_films_become_straight(source, tmp_path, choice, expected):
    (source / "glow.mkv").write_bytes(encode_ffv1(premultiplied(soft()), 12))
    make(source, tmp_path / "out", replace(SETTINGS, choices={"color": choice}))
    ref = next(ref for ref in index_shards([tmp_path / "out"]) if ref.key == "glow")
    frame = read_clip(ref).frames[0, 0]
    assert abs(int(frame[16, 0]) - (240 if expected else 124)) <= 2
    with open(ref.tar, "rb") as file:
        file.seek(ref.meta[0])
        assert json.loads(file.read(ref.meta[1]))["premultiplied_source"] is expected


def test_long_clips_are_cut_into_equal_pieces(source, tmp_path):
    make(source, tmp_path / "out", replace(SETTINGS, max_frames=4))
    lengths = {ref.key: ref.frames for ref in index_shards([tmp_path / "out"])}
    assert lengths["film0"] == 3 and lengths["film1"] == 4
    assert (lengths["film3-p000"], lengths["film3-p001"]) == (3, 3)
    splits = {ref.key: ref.split for ref in index_shards([tmp_path / "out"])}
    assert splits["film3-p000"] == splits["film3-p001"]


def test_decisions_are_reported(source, tmp_path):
    (source / "glow.mkv").write_bytes(encode_ffv1(premultiplied(soft()), 12))
    (source / "frozen.mkv").write_bytes(encode_ffv1(np.repeat(soft(1), 5, axis=0), 12))
    (source / "opaque.mkv").write_bytes(encode_ffv1(soft(alpha=255), 12))
    manifest = make(source, tmp_path / "out", bad_clip_budget=0)  # what is refused is not bad
    assert (
        list(manifest["skipped"]) == ["opaque"]
        and "full=keep takes it in" in manifest["skipped"]["opaque"]
    )
    told = lines_of(tmp_path / "out")
    assert list(told) == [line.key for line in read_lines(source.parent / "found.jsonl")]
    assert "black taken out (premultiplied: sure" in told["glow"]["done"]["color"]
    assert told["glow"]["decisions"]["confidence"] > 0.9 and told["glow"]["pieces"] == ["glow"]
    assert "refused" in told["opaque"] and "pieces" not in told["opaque"]
    assert told["still0"]["done"] == {}
    refs = {ref.key: ref for ref in index_shards([tmp_path / "out"])}
    assert refs["frozen"].frames == 1 and refs["frozen"].kind == "rgba.png"
    with open(refs["glow"].tar, "rb") as file:
        file.seek(refs["glow"].meta[0])
        assert json.loads(file.read(refs["glow"].meta[1]))["done"] == told["glow"]["done"]
    kept = make(
        source, tmp_path / "kept", replace(SETTINGS, full="keep", choices={"still": "false"})
    )
    assert kept["skipped"] == {}
    assert {ref.key: ref.frames for ref in index_shards([tmp_path / "kept"])}["frozen"] == 5


def test_lines_of_the_manifest_decide(source, tmp_path):
    """As data_prep.ingest measured, and as a person edited them."""
    (source / "glow.mkv").write_bytes(encode_ffv1(premultiplied(soft()), 12))
    found = source.parent / "found.jsonl"
    make(source, tmp_path / "first")
    told = lines_of(tmp_path / "first")
    lines = with_decisions(source, told)
    make(source, tmp_path / "same")
    for name in [path.name for path in (tmp_path / "first").glob("*.tar")] + [DECISIONS]:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    next(line for line in lines if line["key"] == "glow")["decisions"] |= {
        "color": "straight",
        "cuts": [5],
    }
    found.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make(source, tmp_path / "edited")
    refs = {ref.key: ref for ref in index_shards([tmp_path / "edited"])}
    assert (refs["glow-p000"].frames, refs["glow-p001"].frames) == (5, 3)
    assert abs(int(read_clip(refs["glow-p000"]).frames[0, 0, 16, 0]) - 124) <= 2
    lines[0]["decisions"]["color"] = "purple"
    found.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ValueError, match=r"found\.jsonl:1: .*color='purple'; straight, black, white, matte"
    ):
        make(source, tmp_path / "wrong")


def test_preview_writes_nothing(source, tmp_path, capsys):
    make(source, tmp_path / "out")
    before = sorted(path for path in tmp_path.rglob("*"))
    (source / "glow.mkv").write_bytes(encode_ffv1(premultiplied(soft()), 12))
    ingest(source=source, out=source.parent / "found.jsonl", bad_clip_budget=0)
    preview(
        source.parent / "found.jsonl", replace(SETTINGS, max_frames=4), executor="local", workers=0
    )
    text = capsys.readouterr().out
    assert (
        "glow  8 x 32 x 32, colour premultiplied: sure" in text and "color: black taken out" in text
    )
    assert "pieces: 2, of 4, 4 frames" in text and "made straight" in text
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "glow.mkv") == before


def test_impossible_decisions_name_the_clip(source, tmp_path):
    make(source, tmp_path / "out")
    line = read_lines(source.parent / "found.jsonl")[0]
    line = replace(line, decisions={**(line.decisions or {}), "alpha_high": 252})
    settings = replace(SETTINGS, choices={"alpha_low": "253"})
    with pytest.raises(ValueError, match=r"film0: alpha_low=253, alpha_high=252"):
        decide([line], settings, tmp_path / "journal", executor="local", workers=0)


@pytest.mark.slow
@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no real media at {MEDIA}; set ACETATE_MEDIA")
@pytest.mark.long
def test_real_media(tmp_path):
    """One or two of every kind and trap."""
    ingest(source=MEDIA, out=tmp_path / "all.jsonl", bad_clip_budget=0)
    wanted = (
        "packed-yyeva_ring", "pairs-vap_wings_trunk", "anims-variant_vap_globe_vp9alpha",
        "stills-gfm-am2k_sample1",
        "anims-variant_alphaplayer_heartbeats_prores4444", "anims-apngkit_ball",
        "anims-yyimage_wall-e_12f",
        "anims-vap_simple_demo_seq", "stills-kenney-particle-pack-smoke_04",
    )  # fmt: skip
    lines = [
        line
        for line in (tmp_path / "all.jsonl").read_text().splitlines()
        if json.loads(line)["key"] in wanted
    ]
    assert len(lines) == len(wanted)
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    manifest = shard(
        manifest=tmp_path / "some.jsonl", out=tmp_path / "out", settings=replace(SETTINGS,
        max_side=192),
        val_fraction=0.2, max_clips=100, max_bytes=10**9, bad_clip_budget=0, executor="local",
        workers=0,
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


@pytest.mark.parametrize(
    "change, said",
    [
        *(({"key": key}, "key=") for key in (5, ["a"], "../x", "a\nb", "a/b", "x" * 81)),
        ({"frames": "9"}, "frames='9': must be a whole number"), ({"width": 0}, "width=0"),
        ({"kind": "x"}, "kind='x': must be one of still"), ({"files": "a.png"}, "files="),
        ({"files": []}, "files="), ({"fps": "x"}, "fps='x'"), ({"prompt": 5}, "prompt=5"),
        ({"color_rect": [1, 2]}, "color_rect="), ({"decisions": [1]}, "decisions="),
        ({"decisions": {}}, "decisions: .*missing"), ({"more": 1}, "'more' is unknown"),
        ({"notes": 5}, "notes=5"),
    ],
)  # fmt: skip
def test_lines_are_held_to_their_schema(tmp_path, change, said):
    line = {
        "key": "a", "kind": "still", "files": ["a.png"], "frames": 1, "width": 8, "height": 8,
        "fps": None, "prompt": "", "licence": "", "source": "", "group": "a", "lossy": False,
        "premultiplied": None, "color_rect": None, "alpha_rect": None,
    }  # fmt: skip
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n")
    assert read_lines(tmp_path / "m.jsonl")[0].key == "a"
    (tmp_path / "m.jsonl").write_text(json.dumps(line | change) + "\n")
    with pytest.raises(
        ValueError, match=rf"m\.jsonl:1: not a line of acetate prep ingest \({said}"
    ):
        read_lines(tmp_path / "m.jsonl")


def test_lines_that_are_none(tmp_path):
    for text, said in (("[" * 10**5, "nested too deeply"), ("5", "must be an object")):
        (tmp_path / "m.jsonl").write_text(text)
        with pytest.raises(ValueError, match=rf"m\.jsonl:1: .*{said}"):
            read_lines(tmp_path / "m.jsonl")
