import json
import socket
import time
from dataclasses import replace

import numpy as np
import pytest

from acetate.data.shards import (
    ShardError,
    index_shards,
    read_manifest,
    read_media,
    read_meta,
    read_meta_text,
)
from acetate.data.writer import ShardWriter, encode_clip
from acetate.models import hub
from data_prep.bad_clips import TooManyBad
from data_prep.caption import CAPTIONS_FILE, Settings, caption, read_prompts, sentence
from data_prep.captioner import Captioner, Look
from data_prep.journal import only_writer, read_journal
from tests.compose import called
from tests.data_prep.tiny_captioners import save_llava

PROMPTS = {
    "film-p000": "Transparent background: film",  # as data_prep.ingest makes them of names
    "film-p001": "Transparent background: film",
    "none": "",
    "told": "Transparent background, photo, close-up: a told dog.",
}
SETTINGS = Settings(
    overwrite="missing", missing="(Transparent background: .*)?",
    template="Transparent background, {caption}",
    captioner=None, instruction="describe a star", look=Look(2, "several", "grey"), max_tokens=4,
    dtype="float32",
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    with ShardWriter(tmp_path / "in", max_clips=3, max_bytes=10**9, made_by={}) as writer:
        for i, (key, prompt) in enumerate(PROMPTS.items()):
            frames = np.full((3, 8, 8, 4), 40 * i, np.uint8)
            writer.add(key, encode_clip(frames, 8), split="train", prompt=prompt, source="s",
                licence="MIT",
                       lossy=False, premultiplied_source=False)  # fmt: skip
    return tmp_path / "in"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return str(folder)


def run(source, out, settings=SETTINGS, prompts=None, **changes):
    defaults = {
        "max_clips": 1,
        "max_bytes": 10**9,
        "bad_clip_budget": 0,
        "device": "cpu",
        "executor": "local",
    }
    return caption(
        shards=[source],
        out=out,
        prompts=prompts,
        settings=settings,
        **({"workers": 0} | defaults | changes),
    )


def prompts_of(folder):
    return {ref.key: read_meta(ref)["prompt"] for ref in index_shards([folder])}


def test_given_prompts_take_the_place_of_missing_ones(source, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text(
        "key,caption\nfilm,A grey film.\ntold,A cat\nfilm-p001,Transparent background: Its end.\n"
    )
    lines, bad = run(source, tmp_path / "out", prompts=table)
    assert bad == {} and prompts_of(tmp_path / "out") == {
        "film-p000": "Transparent background, a grey film.",
        "film-p001": "Transparent background: Its end.",
        "none": "",
        "told": PROMPTS["told"],
    }
    assert [line["from"] for line in lines] == ["given", "given", "kept", "kept"]
    before, after = (index_shards([folder]) for folder in (source, tmp_path / "out"))
    for old, new in zip(before, after, strict=True):
        assert read_media(old) == read_media(new)
        assert {**read_meta(new), "prompt": ""} == {**read_meta(old), "prompt": ""}
    assert read_meta_text(before[3]) == read_meta_text(after[3])
    run(source, tmp_path / "all", replace(SETTINGS, overwrite="all"), prompts=table)
    assert prompts_of(tmp_path / "all")["told"] == "Transparent background, a cat"


def test_tables_and_text_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"key": "a", "text": "A star", "style": "photo"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == {
        "a": {"key": "a", "text": "A star", "style": "photo", "caption": "A star"}
    }
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("A moon\n")
    assert read_prompts(tmp_path / "texts") == {"b": {"caption": "A moon"}}
    (tmp_path / "bad.csv").write_text("key,caption\na,b\nc,\n")
    with pytest.raises(ValueError, match=r"bad\.csv: row 2 lacks a key or a caption"):
        read_prompts(tmp_path / "bad.csv")
    with pytest.raises(ValueError, match=r"give a \.csv, a \.jsonl or a folder"):
        read_prompts(tmp_path / "a.parquet")


def test_damaged_tables_and_empty_texts_are_named(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"key": "a", "cap')
    with pytest.raises(ValueError, match=r"cut\.jsonl is not a table"):
        read_prompts(tmp_path / "cut.jsonl")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"b\.txt is empty"):
        read_prompts(tmp_path)


def test_prompts_of_no_clip_are_named(source, tmp_path, caplog):
    table = tmp_path / "prompts.csv"
    table.write_text("key,caption\nfilm,A film\nfilm.mkv,A film\n")
    run(source, tmp_path / "out", prompts=table)
    assert "1 of 2 rows have the key of no clip: film.mkv" in caplog.text
    table.write_text("key,caption\nfilm.mkv,A film\n")
    with pytest.raises(
        ValueError, match=r"1 of 1 rows .* no clip: film\.mkv\. Keys here are as film-p000"
    ):
        run(source, tmp_path / "none", prompts=table)
    assert not (tmp_path / "none").exists()


def test_sentences():
    template = "Transparent background, {style}: {caption}."
    assert (
        sentence(template, {"caption": "The Moon", "style": "photo"})
        == "Transparent background, photo: the Moon."
    )
    assert (
        sentence(template, {"caption": "transparent background, as is"})
        == "transparent background, as is"
    )
    with pytest.raises(ValueError, match=r"asks for 'style'; this row has caption: A"):
        sentence(template, {"caption": "A"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "Transparent"}, r"has no \{caption\}"),
        ({"template": "{caption} {"}, r"template='\{caption\} \{': .*write \{\{ and \}\}"),
        ({"missing": "("}, r"missing='\(' is no regular expression \(missing \), unterminated"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def counted(monkeypatch, stop_at=0):
    seen = []

    def see(self, frames):
        seen.append(int(frames[0, 0, 0, 0]) // 40)
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        return original(self, frames)

    original = Captioner.__call__
    monkeypatch.setattr(Captioner, "__call__", see)
    return seen


@pytest.mark.slow
def test_the_captioner_sees_what_is_missing_and_a_restart_goes_on(
    source, model, tmp_path, monkeypatch
):
    settings = replace(SETTINGS, captioner=model)
    lines, _ = run(source, tmp_path / "whole", settings)
    assert [line["from"] for line in lines] == ["captioner"] * 3 + ["kept"]
    assert all(line["prompt"].startswith("Transparent background, ") for line in lines)
    assert prompts_of(tmp_path / "whole") == {line["key"]: line["prompt"] for line in lines}
    seen = counted(monkeypatch, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut", settings)
    with pytest.raises(ShardError, match="made with other settings"):
        run(source, tmp_path / "cut", replace(settings, max_tokens=3))
    run(source, tmp_path / "cut", settings)
    assert seen == [0, 1, 1, 2]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_workers_make_the_same_bytes(source, model, tmp_path):
    settings = replace(SETTINGS, captioner=model)
    run(source, tmp_path / "a", settings)
    run(source, tmp_path / "b", settings, workers=1)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_finished_work_is_left_alone(source, tmp_path):
    lines, _ = run(source, tmp_path / "out")
    before = (tmp_path / "out" / "clips-000000.tar").stat().st_mtime_ns
    assert run(source, tmp_path / "out") == (lines, {})
    assert (tmp_path / "out" / "clips-000000.tar").stat().st_mtime_ns == before
    assert read_journal(tmp_path / "out" / CAPTIONS_FILE)[1:] == lines
    with pytest.raises(ShardError, match="made with other settings"):
        run(source, tmp_path / "out", replace(SETTINGS, overwrite="all"))


def test_unreadable_clips_are_counted(source, tmp_path):
    ref = index_shards([source])[1]
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + 40)
        file.write(b"damage")
    with pytest.raises(TooManyBad, match="film-p001"):
        run(source, tmp_path / "none")
    _, bad = run(source, tmp_path / "out", bad_clip_budget=1)
    assert list(bad) == ["film-p001"] and read_manifest(tmp_path / "out")["skipped"] == bad
    assert prompts_of(tmp_path / "out").keys() == PROMPTS.keys() - bad.keys()


def command(capsys, *arguments):
    called("prep caption", *arguments)
    return capsys.readouterr().out


def test_command(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"key": "none", "prompt": "A lamp"}) + "\n")
    arguments = ("shards=in", "out=out", "prompts=prompts.jsonl")
    seen = command(capsys, *arguments, "preview=true")
    assert (
        "Transparent background, a lamp" in seen
        and "4 of 4 clips were looked at. Nothing was written." in seen
    )
    assert not (tmp_path / "out").exists()
    assert "out: 4 prompts, 3 kept, 1 given" in command(capsys, *arguments)


def test_one_run_at_a_time(source, tmp_path):
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(RuntimeError, match="out is being written by another process"),
    ):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"captioner=\./nowhere does not exist; give the folder"),
        ("{folder}", r"holds no config\.json"),
        (
            "nobody/nothing",
            r"captioner=nobody/nothing is no folder here, .*hf download nobody/nothing\) and give",
        ),
    ],
)
def test_a_captioner_that_is_not_there_ends_at_once(source, tmp_path, monkeypatch, name, message):
    """Offline, and where a server takes every question and answers none."""
    name = name.format(folder=source)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}"
        )
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match=message):
            run(source, tmp_path / "out", replace(SETTINGS, overwrite="all", captioner=name))
        assert time.monotonic() - start < 30
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, said",
    [("[" * 10**5, "nested too deeply"), ("[1]", r"\[1\] is no row"), ("{", "is not a table"),
     (json.dumps({"key": "a", "caption": "x" * 10**6}), "row 1: caption='x.*at most 100,000")],
)  # fmt: skip
def test_tables_that_are_none(tmp_path, text, said):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"t\.jsonl.*{said}"):
        read_prompts(tmp_path / "t.jsonl")
