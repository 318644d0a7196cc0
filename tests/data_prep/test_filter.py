import json

import numpy as np
import pytest

from acetate.data.shards import ShardError, index_shards, read_manifest, read_media, read_meta_text
from acetate.data.writer import ShardWriter, encode_clip
from data_prep import filter as program
from data_prep.bad_clips import TooManyBad
from data_prep.filter import REJECTED_FILE, SCORES_FILE, Duplicates, Rule, filter_clips, parse_rules
from data_prep.journal import only_writer, read_journal
from tests.compose import called

RULES = {"coverage": Rule(0.1, 0.9)}
BEST = Duplicates(distance=6, color=32, keep="best")


def disc(side, grey, radius=0.3, frames=3):
    y, x = np.mgrid[:side, :side] / side - 0.5
    clip = np.zeros((frames, side, side, 4), np.uint8)
    clip[..., :3] = grey * (x > y)[..., None]
    clip[..., 3] = 255 * (np.hypot(x, y) < radius)
    return clip


CLIPS = {
    "empty": disc(32, 200, radius=0.0),
    "full": disc(32, 200, radius=1.0),
    "good": disc(48, 200),
    "small": disc(32, 200),  # good at a smaller size
    "other": np.flip(disc(32, 200) // 2 + 60, axis=2),
}


def add(writer, key, frames):
    writer.add(key, encode_clip(frames, 8), split="train", prompt=key, source="s",
        licence="CC0-1.0", lossy=False,
               premultiplied_source=False)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    with ShardWriter(tmp_path / "in", max_clips=2, max_bytes=10**9, made_by={}) as writer:
        for key, frames in CLIPS.items():
            add(writer, key, frames)
    return tmp_path / "in"


def run(source, out, **changes):
    settings = {
        "rules": RULES, "duplicates": BEST, "scores": None, "max_clips": 1, "max_bytes": 10**9,
        "bad_clip_budget": 0, "executor": "local", "workers": 0,
    }  # fmt: skip
    return filter_clips(shards=[source], out=out, **(settings | changes))


def contents(folder):
    return {
        ref.key: (read_media(ref), read_meta_text(ref), ref.split, ref.crc32)
        for ref in index_shards([folder])
    }


def test_kept_clips_are_the_same_bytes_and_the_rest_has_reasons(source, tmp_path):
    lines, rejected, bad = run(source, tmp_path / "out")
    before, after = contents(source), contents(tmp_path / "out")
    assert after == {key: before[key] for key in ("good", "other")} and bad == {}
    assert lines == read_journal(tmp_path / "out" / SCORES_FILE) and [
        line["key"] for line in lines
    ] == sorted(CLIPS)
    assert rejected == read_journal(tmp_path / "out" / REJECTED_FILE)
    assert [(line["key"], line["score"], line["rule"]) for line in rejected] == [
        ("empty", "coverage", "0.1 to 0.9"),
        ("full", "coverage", "0.1 to 0.9"),
        ("small", "duplicate", "> 6 bits of 128"),
    ]
    assert rejected[0]["value"] == 0 and rejected[1]["value"] == 1 and rejected[2]["of"] == "good"


def test_duplicates_can_stay_or_the_first_be_kept(source, tmp_path):
    run(source, tmp_path / "all", duplicates=None)
    assert contents(tmp_path / "all").keys() == {"good", "other", "small"}
    with ShardWriter(tmp_path / "twins", max_clips=9, max_bytes=10**9, made_by={}) as writer:
        add(writer, "a", CLIPS["small"])
        add(writer, "b", CLIPS["good"])
    run(tmp_path / "twins", tmp_path / "first", duplicates=Duplicates(6, 32, "first"))
    run(tmp_path / "twins", tmp_path / "best")
    assert (list(contents(tmp_path / "first")), list(contents(tmp_path / "best"))) == (["a"], ["b"])


def test_scores_of_something_else_are_an_error(source, tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"key": "good", "prompt": "a disc"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl:1: not a line of scores\.jsonl"):
        run(source, tmp_path / "out", scores=tmp_path / "captions.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_rejected_clip_takes_no_duplicate_with_it(source, tmp_path):
    run(source, tmp_path / "out", rules={"short_side": Rule(max=32), **RULES})
    assert contents(tmp_path / "out").keys() == {"small", "other"}


def counted(monkeypatch):
    read = []

    def score_clip(ref):
        read.append(ref.key)
        if len(read) == stop[0]:
            raise KeyboardInterrupt
        return original(ref)

    original, stop = program.score_clip, [0]
    monkeypatch.setattr(program, "score_clip", score_clip)
    return read, stop


def test_other_rules_do_not_measure_again(source, tmp_path, monkeypatch):
    run(source, tmp_path / "a")
    read, _ = counted(monkeypatch)
    with pytest.raises(ShardError, match="made with other settings"):
        run(source, tmp_path / "a", rules={})
    run(source, tmp_path / "b", rules={}, scores=tmp_path / "a" / SCORES_FILE)
    assert read == [] and contents(tmp_path / "b").keys() == {"empty", "full", "good", "other"}
    assert run(source, tmp_path / "a")[1] == read_journal(tmp_path / "a" / REJECTED_FILE)


def test_an_interrupted_run_goes_on_and_makes_the_same_bytes(source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole")
    read, stop = counted(monkeypatch)
    stop[0] = 3
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut")
    run(source, tmp_path / "cut")
    assert read == ["empty", "full", "good", "good", "other", "small"]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_workers_make_the_same_bytes(source, tmp_path):
    run(source, tmp_path / "a")
    run(source, tmp_path / "b", workers=2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_scores_of_another_clip_of_that_name_do_not_count(source, tmp_path, monkeypatch):
    run(source, tmp_path / "a")
    lines = read_journal(tmp_path / "a" / SCORES_FILE)
    lines[0]["crc32"] += 1
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read, _ = counted(monkeypatch)
    run(source, tmp_path / "b", scores=tmp_path / "old.jsonl")
    assert read == ["empty"]


def test_unreadable_clips_are_counted(source, tmp_path):
    ref = {ref.key: ref for ref in index_shards([source])}["other"]
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + 40)
        file.write(b"damage")
    with pytest.raises(TooManyBad, match=r"1 bad clips, bad_clip_budget=0: other"):
        run(source, tmp_path / "none")
    _, _, bad = run(source, tmp_path / "out", bad_clip_budget=1)
    assert list(bad) == ["other"] and read_manifest(tmp_path / "out")["skipped"] == bad
    assert contents(tmp_path / "out").keys() == {"good"}


def test_a_clip_that_broke_after_it_was_measured_is_counted(source, tmp_path):
    run(source, tmp_path / "a")
    ref = {ref.key: ref for ref in index_shards([source])}["other"]
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + 40)
        file.write(b"damage")
    scores = tmp_path / "a" / SCORES_FILE
    _, _, bad = run(source, tmp_path / "b", scores=scores, bad_clip_budget=1)
    assert list(bad) == ["other"] and contents(tmp_path / "b").keys() == {"good"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"color": {"min": 0}},
            r"rules\.color: no such score; known: frames, short_side, long_side, coverage",
        ),
        ({"motion": 3}, r"rules\.motion=3; give \{min: NUMBER\}"),
        ({"motion": {"least": 3}}, "give {min: NUMBER}"),
        ({"motion": {"min": "much"}}, "give {min: NUMBER}"),
        ({"motion": {"min": 2, "max": 1}}, "min=2 is above max=1"),
    ],
)
def test_rules_are_checked(rules, message):
    with pytest.raises(ValueError, match=message):
        parse_rules(rules)


def test_rules():
    assert parse_rules({"motion": None, "semi": {"min": 0.25}}) == {"semi": Rule(min=0.25)}
    assert [str(rule) for rule in (Rule(min=0.25), Rule(max=2), Rule(1, 2))] == [
        ">= 0.25",
        "<= 2",
        "1 to 2",
    ]


def test_rules_that_keep_nothing(source, tmp_path):
    with pytest.raises(
        ShardError, match=r"the rules reject all 5 clips \(short_side: 5\); loosen them"
    ):
        run(source, tmp_path / "out", rules={"short_side": Rule(min=1000)})
    assert not (tmp_path / "out" / "manifest.json").exists()


def command(capsys, *arguments):
    called("prep filter", *arguments)
    return capsys.readouterr().out


def test_command(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = command(capsys, "shards=in", "out=out", "rules.coverage.min=0.1", "preview=true")
    assert "small: duplicate" in seen and "5 of 5 clips were measured. Nothing was written." in seen
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    seen = command(capsys, "shards=in", "out=out", "rules.coverage.min=0.1")
    assert "2 clips kept, 3 rejected" in seen and "0.1 to 0.98" in seen
    (tmp_path / "mine.yaml").write_text("short_side: {min: 40}\n")
    seen = command(capsys, "shards=in", "out=b", "rules=mine.yaml", "duplicates=null")
    assert "1 clips kept, 4 rejected" in seen


def test_one_run_at_a_time(source, tmp_path):
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(RuntimeError, match="out is being written by another process"),
    ):
        run(source, tmp_path / "out")
