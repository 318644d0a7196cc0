"""File names, keys and prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from acetate.data.keys import plain_key
from data_prep.bad_clips import print_bad
from data_prep.examine import prompt_from_name, said_of_names
from data_prep.found import Found
from data_prep.ingest import ingest, print_summary
from tests.data_prep.material import (
    notes,
    run,
    source,  # noqa: F401
    still,
)
from tests.media.films import drawn, write
from tests.paths import ROOT


def test_keys_are_plain_and_unique(source):
    for name in ("a.b.png", "Fuchs läuft.png", "same.png", "x" * 120 + ".png"):
        still(source / name)
    still(source / "same.webp")
    clips, _ = run(source)
    assert len(clips) == 5
    for key in clips:
        assert plain_key(key) == key and len(key.encode()) <= 80
    assert "same" in clips
    assert list(run(source)[0]) == list(clips)


def test_sidecar_and_table_errors_name_the_file(source):
    for name in ("a", "b", "c"):
        still(source / f"{name}.png")
    (source / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (source / "index.csv").write_text("file,premultiplied\nb.png,jawohl\nd.png,no\n")
    clips, bad = run(source, 2)
    assert list(clips) == ["c"]
    assert "a.txt: not UTF-8" in bad["a"] and "premultiplied=jawohl" in bad["b"]
    assert notes(source) == ["index.csv, row 2: d.png names no file"]


def test_names_with_brackets_are_printed(capsys):
    print_bad(Console(width=200), {"logo [final]": "in [/b]"}, None)
    assert "logo [final]: in [/b]" in capsys.readouterr().out


def test_keys_keep_letters_of_all_scripts(source):
    # the third as macOS writes it
    for name in ("É.png", "火の輪.png", "e\u0301lan.png", "кот/кот.png"):
        still(source / name)
    assert sorted(run(source)[0]) == ["É", "élan", "кот-кот", "火の輪"]


def test_prompts_that_are_file_names_are_said(source, capsys):
    for name in ("ae premult.png", "frame.png", "told.png"):
        still(source / name)
    (source / "told.txt").write_text("a red disc")
    result = ingest(source=source, out=source.parent / "found.jsonl", bad_clip_budget=0)
    print_summary(Console(width=200), source, None, result)
    said = capsys.readouterr().out
    assert (
        '2 of 3 prompts are made of file names ("ae premult", "frame")' in said
        and "acetate prep caption" in said
    )


def renamed(path, name):
    """To a name of any bytes."""
    os.rename(path, os.fsencode(path.parent) + b"/" + name)


@pytest.mark.slow
@pytest.mark.long
def test_names_in_other_encodings(source):
    """Taken, refused or ignored, and printed; the files are found again by what is written."""
    flame = "\u706b\u7130".encode("gbk")
    still(source / "a.png")
    still(source / "x.png", width=11)
    (source / "x.txt").write_text("a flame")
    (source / "bad.png").write_bytes(b"damaged")
    (source / "b.bin").write_bytes(b"1")
    write(source / "f.mkv", drawn("glass", 3, 3, 48), "ffv1", "bgra")
    for i in range(3):
        still(source / "seq" / f"{i}.png", width=12 + i // 3)
    for name, end in (("x.png", b".png"), ("x.txt", b".txt"), ("bad.png", b"!.png"),
                      ("b.bin", b".bin"), ("f.mkv", b"2.mkv"), ("seq", b"3")):  # fmt: skip
        renamed(source / name, flame + end)
    out = source.parent / "found.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "acetate", "prep", "ingest", f"source={source}", f"out={out}"],
        capture_output=True, text=True, cwd=source.parent,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HYDRA_FULL_ERROR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert r"\xbb\xf0\xd1\xe6!.png: cannot be decoded" in done.stdout
    lines = [Found(**json.loads(line)) for line in out.read_bytes().splitlines()]
    assert sorted(line.kind for line in lines) == ["sequence", "still", "still", "video"]
    assert all(Path(file).exists() for line in lines for file in line.files)
    assert "a flame" in [line.prompt for line in lines]
    report = json.loads((source.parent / "found.report.json").read_text())
    assert r"\xbb\xf0\xd1\xe6.bin" in [line["file"] for line in report["files"]]


def test_marks_of_encodings_are_no_part_of_prompts(source):
    still(source / "a.png")
    still(source / "b.png", width=11)
    (source / "a.txt").write_text("a red disc\r\n", encoding="utf-8-sig")
    (source / "b.txt").write_text("ein Fl\u00fcgel", encoding="utf-16")
    (source / "._t.csv").write_bytes(b"\0\5\x16\7\xff")
    clips, _ = run(source)
    assert [clip.prompt for clip in clips.values()] == ["a red disc", "ein Fl\u00fcgel"]


def test_a_prompt_that_a_manifest_cannot_hold_is_refused_by_name(source):
    """It ended shard, for all clips."""
    still(source / "a.png")
    still(source / "b.png", width=11)
    (source / "a.txt").write_text("x" * 100_001)
    (source / "b.txt").write_text("a\0 red \x1b[31mdisc\nand more")
    clips, bad = run(source, 1)
    assert "a.png" in bad["a"] and "prompt" in bad["a"] and "at most 100,000" in bad["a"]
    assert clips["b"].prompt == r"a\x00 red \x1b[31mdisc" + "\nand more"


def test_prompt_from_name():
    assert prompt_from_name("smoke_04") == "Transparent background: smoke"
    assert prompt_from_name("am2k_sample1") == "Transparent background: am2k sample1"


@pytest.mark.parametrize("name", ["___", os.fsdecode("火焰".encode("gbk"))])
def test_a_name_without_words_is_announced_as_a_missing_prompt(name):
    prompt = prompt_from_name(name)
    assert prompt == "Transparent background"
    assert "1 of 2 are missing" in said_of_names([prompt, "a red fox"])
    assert said_of_names(["a red fox"]) is None
