import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from acetate.data.keys import plain_key
from acetate.video_io import IMAGES
from data_prep import ingest as program
from data_prep.bad_clips import TooManyBad, print_bad
from data_prep.decisions import OVERRIDES, Decisions
from data_prep.examine import NO_ALPHA, Found, Settings, prompt_from_name, said_of_names
from data_prep.ingest import ingest, print_summary
from data_prep.journal import only_writer
from tests.media.films import drawn, write
from tests.media.test_images import encode
from tests.media.test_packed import packed
from tests.paths import ROOT

MEDIA = Path(os.environ.get("ACETATE_MEDIA", Path(__file__).parents[3] / "shared" / "media"))


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def still(path, height=8, width=10, channels=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, channels)).save(path)


def film(path, frames=3, height=16, width=32, codec="libx264", pixels="yuv420p"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for picture in noise(frames, height, width, 4):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixels)
                )
            )
        container.mux(stream.encode())


def run(source, budget=0, **changes):
    result = ingest(
        source=source, out=source.parent / "found.jsonl", bad_clip_budget=budget, **changes
    )
    return {clip.key: clip for clip in result.clips}, result.bad


def notes(source):
    """Of the report that `run` wrote."""
    return json.loads((source.parent / "found.report.json").read_text())["notes"]


@pytest.fixture
def source(tmp_path):
    return tmp_path / "media"


def test_every_kind(source):
    still(source / "stills" / "red_fox.png")
    for i in range(3):
        still(source / "walk" / f"{i:03d}.png")
    film(source / "films" / "wave.mov", codec="qtrle", pixels="argb")
    film(source / "jump_fgr.mp4")
    film(source / "jump_pha.mp4")
    film(source / "gift.mp4", width=48)
    (source / "rects.json").write_text(
        json.dumps(
            {
                "gift": {
                    "rgb_rect": [0, 0, 32, 16],
                    "alpha_rect": [32, 0, 16, 8],
                    "packed_size": [48, 16],
                }
            }
        )
    )
    clips, bad = run(source)
    assert not bad
    assert {
        key: (clip.kind, clip.frames, clip.width, clip.height) for key, clip in clips.items()
    } == {
        "gift": ("packed", 3, 32, 16),
        "jump": ("pair", 3, 32, 16),
        "stills-red_fox": ("still", 1, 10, 8),
        "walk": ("sequence", 3, 10, 8),
        "films-wave": ("video", 3, 32, 16),
    }
    assert [Path(file).name for file in clips["jump"].files] == ["jump_fgr.mp4", "jump_pha.mp4"]
    assert (clips["gift"].color_rect, clips["gift"].alpha_rect) == ((0, 0, 32, 16), (32, 0, 16, 8))
    assert {key: (clip.lossy, clip.premultiplied) for key, clip in clips.items()} == {
        "gift": (True, None),
        "jump": (True, None),
        "stills-red_fox": (False, False),
        "walk": (False, False),
        "films-wave": (False, None),
    }
    assert clips["stills-red_fox"].prompt == "Transparent background: red fox"
    assert (clips["jump"].fps, clips["walk"].fps) == (10, None)


def test_manifest_lines_are_the_clips(source, tmp_path):
    still(source / "a.png")
    still(source / "b.png")
    clips, _ = run(source)
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [Found(**line) for line in lines] == list(clips.values())


def test_tables_and_sidecars_describe(source):
    for i, name in enumerate("abcd"):
        still(source / f"{name}.png", width=10 + i)  # copies would be one group
    (source / "index.csv").write_text(
        "file,caption,licence,source,premultiplied,group\na.png,a red "
        "ball,MIT,me/here,true,x\nb.png,from the table,,,,\n"
    )
    (source / "more.jsonl").write_text(
        json.dumps({"path": "c.png", "prompt": "a cup", "license": "CC0"}) + "\n"
    )
    (source / "b.txt").write_text("from the sidecar\n")
    clips, _ = run(source)
    a, b, c, d = (clips[name] for name in "abcd")
    assert (a.prompt, a.licence, a.source, a.premultiplied, a.group) == (
        "a red ball",
        "MIT",
        "me/here",
        True,
        "x",
    )
    assert (b.prompt, b.licence, b.source, b.premultiplied, b.group) == (
        "from the sidecar", "unknown", "unknown", False, "b",
    )  # fmt: skip
    assert (c.prompt, c.licence) == ("a cup", "CC0")
    assert d.prompt == "Transparent background: d"


def test_forms_of_a_clip_are_one_group(source):
    film(source / "pairs" / "globe_fgr.mp4")
    film(source / "pairs" / "globe_pha.mp4")
    film(source / "variant_globe_prores4444.mov", codec="qtrle", pixels="argb")
    for i in range(2):
        still(source / f"dancer_{i}.png")
    origins = {f"dancer_{i}": {"source": "them", "path": "dance.webm"} for i in range(2)}
    (source / "origins.json").write_text(json.dumps(origins))
    groups = {key: clip.group for key, clip in run(source)[0].items()}
    assert groups == {
        "pairs-globe": "globe",
        "variant_globe_prores4444": "globe",
        "dancer_0": "them/dance.webm",
        "dancer_1": "them/dance.webm",
    }


def test_what_is_a_sequence(source):
    for i in (8, 9, 10):
        still(source / "frames" / f"f{i}.png")
    for name in ("a1", "b2"):
        still(source / "names" / f"{name}.png")
        still(source / "words" / f"{name[0]}.png")
    for i in (1, 3):
        still(source / "gap" / f"{i}.png")
    for i in (1, 2):
        still(source / "sizes" / f"{i}.png", width=9 + i)
        still(source / "listed" / f"{i}.png")
    (source / "index.csv").write_text("file,prompt\nlisted/1.png,x\n")
    kinds = {key: clip.kind for key, clip in run(source)[0].items()}
    assert kinds.pop("frames") == "sequence"
    assert len(kinds) == 10 and set(kinds.values()) == {"still"}
    (source / "index.csv").write_text("file,prompt\nnames/,x\n")
    assert run(source)[0]["names"].kind == "sequence"


def test_pairs_of_folders(source):
    for i in range(3):
        still(source / "run_fgr" / f"{i}.png", channels=3)
        still(source / "run_pha" / f"{i}.png", channels=3)
    clips, _ = run(source)
    assert list(clips) == ["run"] and clips["run"].kind == "pair" and clips["run"].frames == 3


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda s: film(s / "x_pha.mp4", frames=4), r"x_fgr\.mp4: 3 frames, x_pha\.mp4: 4"),
        (lambda s: film(s / "x_pha.mp4", width=16), r"x_fgr\.mp4: 32x16, x_pha\.mp4: 16x16"),
        (lambda s: None, r"no partner x_pha"),
    ],
)
def test_pairs_that_do_not_match_are_bad(source, make, reason):
    film(source / "x_fgr.mp4")
    still(source / "good.png")
    make(source)
    with pytest.raises(TooManyBad, match=rf"1 bad clips, bad_clip_budget=0: x: .*{reason}"):
        run(source)
    assert not (source.parent / "found.jsonl").exists()
    clips, bad = run(source, budget=1)
    assert list(clips) == ["good"] and list(bad) == ["x"]


def test_bad_files_are_named(source):
    still(source / "opaque.png", channels=3)
    film(source / "opaque.mp4")
    (source / "broken.webm").write_bytes(b"no film")
    film(source / "packed.mp4")
    still(source / "sound.png")
    (source / "r.json").write_text(
        json.dumps(
            {
                "packed": {
                    "rgb_rect": [0, 0, 8, 8],
                    "alpha_rect": [8, 0, 8, 8],
                    "packed_size": [64, 64],
                }
            }
        )
    )
    clips, bad = run(source, budget=4)
    assert list(clips) == ["sound"] and len(bad) == 4
    text = "\n".join(bad.values())
    for reason in ("opaque.png has no alpha", "opaque.mp4 has no alpha",
        "broken.webm: cannot be decoded",
                   "packed.mp4 is 32x16, its rectangles are for 64x64"):  # fmt: skip
        assert reason in text


def test_rectangles_given_in_a_table_and_found(source):
    frames, color, alpha = packed(drawn("flame", 22, 6, 160), "right")
    source.mkdir()
    for name in ("given", "found"):
        write(source / f"{name}.mp4", frames, "libx264", "yuv420p")
    write(
        source / "grey.mp4",
        frames.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8),
        "libx264",
        "yuv420p",
    )
    (source / "t.csv").write_text("file,color_rect,alpha_rect\ngiven.mp4,0 0 64 64,160 0 64 64\n")
    clips, bad = run(source, budget=3)
    assert {key: (clip.kind, clip.color_rect, clip.alpha_rect) for key, clip in clips.items()} == {
        "given": ("packed", (0, 0, 64, 64), (160, 0, 64, 64)),
        "found": ("packed", color, alpha),
    }
    assert "grey.mp4 has no alpha of its own, and is perhaps packed: colour at" in bad["grey"]
    clips, bad = run(source, budget=3, settings=Settings(detect_packed=False))
    assert list(clips) == ["given"] and "found.mp4 has no alpha" in bad["found"]


def test_what_a_person_decides(source):
    """Each decision, from a table or from the command line; the table has the last word."""
    source.mkdir()
    clip = drawn("glass", 3, 6, 48)
    for name in ("plain", "told", "wrong"):
        write(source / f"{name}.mkv", clip, "ffv1", "bgra")
    (source / "t.csv").write_text(
        "file,premultiplied,alpha_low,alpha_high,matte,crop,still,cuts,color\n"
        "told.mkv,true,3,250,full,1 2 30 40,true,2 4,white\n"
        "wrong.mkv,,,,,1 2 3,,,\n"
    )
    clips, bad = run(
        source, budget=1, settings=Settings(choices={"alpha_low": "7", "still": "false"})
    )
    assert "wrong.mkv: its table says crop=(1, 2, 3); a rectangle is" in bad["wrong"]
    plain, told = (Decisions.of_json(clips[name].decisions) for name in ("plain", "told"))
    assert (plain.alpha_low, plain.still, plain.crop, plain.cuts) == (7, False, None, ())
    assert plain.reasons["alpha_low"] == "chosen by the command line"
    assert (told.color, told.alpha_low, told.alpha_high, told.matte) == ("white", 3, 250, "full")
    assert (told.crop, told.still, told.cuts, told.confidence) == ((1, 2, 30, 40), True, (2, 4), 1)
    assert set(told.reasons.values()) == {"chosen by the table"}
    (source / "t.csv").write_text("file,premultiplied\nplain.mkv,no\ntold.mkv,yes\n")
    clips, _ = run(source)
    assert [(clips[n].premultiplied, clips[n].decisions["color"],
        clips[n].decisions["reasons"]["color"])
            for n in ("plain", "told")] == [(False, "straight", "declared"), (True, "black",
            "declared")]  # fmt: skip


def test_preview_writes_nothing_and_says_the_same(source, tmp_path):
    still(source / "a.png")
    before = sorted(tmp_path.rglob("*"))
    seen, _ = run(source, preview=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(source)[0] == seen


def test_the_report_accounts_for_every_file(source, tmp_path):
    still(source / "a.png")
    (source / "a.txt").write_text("a cup")
    for i in range(2):
        still(source / "walk" / f"{i}.png")
    film(source / "b_fgr.mp4")
    film(source / "b_pha.mp4")
    still(source / "opaque.png", channels=3)
    (source / "LICENCE").write_text("CC0")
    run(source, budget=1)
    report = json.loads((tmp_path / "found.report.json").read_text())
    said = {line.pop("file"): line for line in report["files"]}
    refused = said.pop("opaque.png")["refused"]
    assert (
        "has no alpha" in refused and report["bad"] == {"opaque": refused} and report["clips"] == 3
    )
    assert said == {
        "LICENCE": {"ignored": "a licence or a note"}, "a.png": {"ingested as": "a"},
        "a.txt": {"prompt of": "a"},
        "b_fgr.mp4": {"ingested as": "b"}, "b_pha.mp4": {"part of": "b"},
        "walk/0.png": {"part of": "walk"}, "walk/1.png": {"part of": "walk"},
    }  # fmt: skip


def listed_pairs(source, names):
    """Named in a table, where a file may be one that makes its reader wait."""
    rows = [f"{name}_fgr.mp4,{name}_pha.mp4" for name in names]
    for name in names:
        film(source / f"{name}_fgr.mp4")
        film(source / f"{name}_pha.mp4")
    (source / "t.csv").write_text("\n".join(("video_fgr,video_pha", *rows)))


@pytest.mark.slow
def test_a_reader_that_waits_for_ever_is_ended(source):
    listed_pairs(source, "abc")
    (source / "b_pha.mp4").unlink()
    os.mkfifo(source / "b_pha.mp4")  # whoever opens it waits
    clips, bad = run(source, budget=1, workers=1, settings=Settings(seconds=0.3))
    assert list(clips) == ["a", "c"] and list(bad) == ["b"]
    assert bad["b"].startswith(
        "took more than its time, seconds=0.3 and 1 more for every 4 megapixels"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(seconds=0.1, megapixels_per_second=1e9), "took more than its time, seconds=0.1"),
        (Settings(memory_gb=0.1), "d.png: does not fit into memory"),
    ],
)
def test_what_only_decoding_shows_to_be_too_large_is_refused(source, settings, reason):
    """A valid picture, which is read as floats; the rest goes on."""
    still(source / "a.png")
    encode(source / "d.png", noise(2500, 2500, 8).view(">u2"), "png", "rgba64be")
    still(source / "e.png")
    clips, bad = run(source, budget=1, workers=1, settings=settings)
    assert list(clips) == ["a", "e"] and reason in bad["d"]


@pytest.mark.slow
def test_a_killed_run_goes_on(source, tmp_path):
    """The same bytes, and nothing is decoded twice."""
    listed_pairs(source, "abc")
    slow, journal = source / "c_pha.mp4", tmp_path / "found.journal.jsonl"
    whole = slow.read_bytes()
    slow.unlink()
    os.mkfifo(slow)
    command = [
        sys.executable,
        "-m",
        "data_prep.ingest",
        f"source={source}",
        f"out={tmp_path / 'found.jsonl'}",
    ]
    program = subprocess.Popen([*command, "workers=1"], cwd=ROOT, start_new_session=True)
    while program.poll() is None and not (
        journal.exists() and journal.read_text().count("\n") == 2
    ):
        time.sleep(0.05)
    os.killpg(program.pid, signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL and not (tmp_path / "found.jsonl").exists()
    slow.unlink()
    slow.write_bytes(whole)
    known = [json.loads(line) for line in journal.read_text().splitlines()]
    known[0]["outcome"]["found"]["prompt"] = "from the journal"
    journal.write_text("".join(json.dumps(line) + "\n" for line in known))
    # the command's
    same = {"workers": 1, "settings": Settings(choices=dict.fromkeys(OVERRIDES, "auto"))}
    assert run(source, **same)[0]["a"].prompt == "from the journal" and not journal.exists()
    lines = (tmp_path / "found.jsonl").read_text()
    run(source)
    uninterrupted = (tmp_path / "found.jsonl").read_text()
    assert lines == uninterrupted.replace('Transparent background: a"', 'from the journal"')


def test_a_file_that_changes_during_the_run_is_decoded_again_by_the_next(source, monkeypatch):
    still(source / "a.png")
    still(source / "b.png")
    examine = program.examine

    def change(state, task, stop):
        outcome = examine(state, task)
        still(source / "a.png", height=9)  # after it was decoded
        if stop and task.key == "b":
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(program, "examine", lambda state, task: change(state, task, True))
    with pytest.raises(KeyboardInterrupt):
        run(source)
    monkeypatch.setattr(program, "examine", lambda state, task: change(state, task, False))
    clips, _ = run(source)
    assert (clips["a"].height, clips["b"].height) == (9, 8)


def test_one_run_at_a_time(source):
    still(source / "a.png")
    out = source / "found.jsonl"  # among the material
    with (
        only_writer(out),
        pytest.raises(RuntimeError, match="jsonl is being written by another process"),
    ):
        ingest(source=source, out=out, bad_clip_budget=0)
    assert [file["file"] for file in ingest(source=source, out=out, bad_clip_budget=0).files] == [
        "a.png"
    ]


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


def test_damage_of_a_few_bytes_is_refused(source):
    still(source / "good.png")
    for suffix, body in (
        (".exr", b"v/1\x01ab"),
        (".tif", b"II*\0"),
        (".png", b"\x89PNG\r\n\x1a\n"),
    ):
        for length in range(1, len(body) + 1):
            (source / f"{suffix[1:]}{length}x{suffix}").write_bytes(body[:length])
    clips, bad = run(source, 100)
    assert list(clips) == ["good"] and all("cannot be decoded" in reason for reason in bad.values())


def test_a_folder_named_by_a_dot(source, monkeypatch):
    still(source / "a.png")
    for i in range(2):
        still(source / "walk" / f"{i}.png")
    monkeypatch.chdir(source)
    assert {key: clip.kind for key, clip in run(Path("."))[0].items()} == {
        "a": "still",
        "walk": "sequence",
    }
    monkeypatch.chdir(source / "walk")
    assert {key: clip.kind for key, clip in run(Path("."))[0].items()} == {
        "0": "still",
        "1": "still",
    }
    assert "walk: its numbered images are read as stills" in notes(Path("walk").resolve())[0]
    (source / "walk/index.csv").write_text("file\n.\n")
    assert {key: clip.kind for key, clip in run(Path("."))[0].items()} == {"walk": "sequence"}


def test_a_sequence_with_a_gap_is_named(source):
    for i in (1, 2, 4):
        still(source / "gap" / f"{i}.png")
    assert {clip.kind for clip in run(source)[0].values()} == {"still"}
    assert "gap: number 3 is missing, so its 3 images are stills" in notes(source)[0]


def test_sidecar_and_table_errors_name_the_file(source):
    for name in ("a", "b", "c"):
        still(source / f"{name}.png")
    (source / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (source / "index.csv").write_text("file,premultiplied\nb.png,jawohl\nd.png,no\n")
    clips, bad = run(source, 2)
    assert list(clips) == ["c"]
    assert "a.txt: not UTF-8" in bad["a"] and "premultiplied=jawohl" in bad["b"]
    assert notes(source) == ["index.csv, row 2: d.png names no file"]


def test_alpha_of_its_own_is_not_given_up_for_a_mask(source):
    still(source / "hero.png")
    still(source / "hero_mask.png")
    still(source / "logo" / "x.png")
    still(source / "logo_alpha.png")
    clips = run(source)[0]
    assert {key: clip.kind for key, clip in clips.items()} == {
        "hero": "still", "logo-x": "still", "logo_alpha": "still"
    }  # fmt: skip
    assert clips["hero"].notes == [
        "hero_mask.png beside it is not used: the picture has alpha of its own"
    ]


def test_what_ingest_wrote_is_no_material(source):
    still(source / "a.png")
    Image.new("RGB", (8, 8)).save(source / "photo.jpg")
    out = source / "m.jsonl"
    first = ingest(source=source, out=out, bad_clip_budget=0)
    written = out.read_bytes()
    (source / "m.journal.jsonl").write_text("half a li")
    again = ingest(source=source, out=out, bad_clip_budget=0)
    assert again.files == first.files and out.read_bytes() == written
    assert {file["file"]: file.get("ignored") for file in first.files} == {
        "a.png": None, "photo.jpg": "an opaque picture without a matte"
    }  # fmt: skip


def test_names_with_brackets_are_printed(capsys):
    print_bad(Console(width=200), {"logo [final]": "in [/b]"}, None)
    assert "logo [final]: in [/b]" in capsys.readouterr().out


def test_keys_keep_letters_of_all_scripts(source):
    # the third as macOS writes it
    for name in ("É.png", "火の輪.png", "e\u0301lan.png", "кот/кот.png"):
        still(source / name)
    assert sorted(run(source)[0]) == ["É", "élan", "кот-кот", "火の輪"]


def test_nothing_found_is_an_error_and_leaves_nothing(source):
    source.mkdir()
    with pytest.raises(
        ValueError, match=r"media holds no files; looked for \.png.*NAME_fgr \+ NAME_pha"
    ):
        run(source)
    assert [path.name for path in source.parent.iterdir()] == ["media"]
    still(source / "opaque.png", channels=3)
    (source / "notes.xyz").write_text("")
    with pytest.raises(
        ValueError,
        match=r"none of its 2 files became a clip \(opaque: .*no alpha.*report\.json has all",
    ):
        run(source, budget=5)
    assert not (source.parent / "found.jsonl").exists()


def test_out_is_checked_before_anything_is_decoded(source, monkeypatch):
    still(source / "a.png")
    monkeypatch.setattr("data_prep.ingest.survey", None)
    with pytest.raises(IsADirectoryError, match=r"out=.*media is a folder; name a file"):
        ingest(source=source, out=source, bad_clip_budget=0)
    with pytest.raises(
        NotADirectoryError, match=r"a\.png is a file, so that nothing can be made in it"
    ):
        ingest(source=source, out=source / "a.png" / "x.jsonl", bad_clip_budget=0)
    assert [path.name for path in source.parent.rglob("*")] == ["media", "a.png"]


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


def test_a_matte_that_is_the_subject_itself(source):
    """A cut-out beside its photograph, ProRes with alpha beside a preview; a mask in alpha is
    not."""
    clip = drawn("glass", 3, 4, 48)
    source.mkdir()
    for name, picture in (("shoe", clip[0]), ("cat", clip[0] * (0, 0, 0, 1) + (255, 255, 255, 0))):
        Image.fromarray(clip[0, ..., :3]).save(source / f"{name}.jpg")
        Image.fromarray(picture.astype(np.uint8)).save(source / f"{name}_alpha.png")
    write(source / "smoke.mp4", clip[..., :3], "libx264", "yuv420p")
    write(source / "smoke_alpha.mov", clip, "prores_ks", "yuva444p10le")
    clips, _ = run(source)
    assert {key: (c.kind, [Path(f).name for f in c.files]) for key, c in clips.items()} == {
        "cat": ("matte", ["cat.jpg", "cat_alpha.png"]),
        "shoe": ("still", ["shoe_alpha.png"]),
        "smoke": ("video", ["smoke_alpha.mov"]),
    }
    assert clips["shoe"].notes == [
        "shoe.jpg beside it is not used: shoe_alpha.png has colour and alpha"
    ]
    assert "alpha of its own" in clips["cat"].notes[0]
    report = json.loads((source.parent / "found.report.json").read_text())
    said = {file.pop("file"): file for file in report["files"]}
    assert said["smoke.mp4"] == {"ignored": "not used: smoke has alpha without it"}
    assert said["smoke_alpha.mov"]["ingested as"] == "smoke" and said["cat.jpg"]["notes"]


def test_rectangles_that_vap_states(source):
    frames, color, alpha = packed(drawn("flame", 22, 3, 64), "right")
    source.mkdir()
    grey = frames.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    write(source / "a.mp4", grey, "libx264", "yuv420p")
    info = {"videoW": 128, "videoH": 64, "rgbFrame": color, "aFrame": alpha}
    (source / "vapc.json").write_text(json.dumps({"info": info}))
    clips, _ = run(source)
    assert (clips["a"].kind, clips["a"].color_rect, clips["a"].alpha_rect) == (
        "packed", color, alpha
    )  # fmt: skip


def test_marks_of_encodings_are_no_part_of_prompts(source):
    still(source / "a.png")
    still(source / "b.png", width=11)
    (source / "a.txt").write_text("a red disc\r\n", encoding="utf-8-sig")
    (source / "b.txt").write_text("ein Fl\u00fcgel", encoding="utf-16")
    (source / "._t.csv").write_bytes(b"\0\5\x16\7\xff")
    clips, _ = run(source)
    assert [clip.prompt for clip in clips.values()] == ["a red disc", "ein Fl\u00fcgel"]


def test_bad_clips_are_printed_by_reason(capsys):
    bad = {f"k{i}": f"/x/k{i}.png: cannot be decoded (E{i})" for i in range(30)}
    print_bad(Console(width=200), {"z": "z.png has no alpha"} | bad, Path("r.json"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30 skipped: cannot be decoded" and lines[21] == "1 skipped: has no alpha"
    assert len(lines) == 23 and lines[22] == "11 more are in r.json"


def test_source_must_be_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="name the folder"):
        run(tmp_path / "none")


def test_prompt_from_name():
    assert prompt_from_name("smoke_04") == "Transparent background: smoke"
    assert prompt_from_name("am2k_sample1") == "Transparent background: am2k sample1"


@pytest.mark.parametrize("name", ["___", os.fsdecode("火焰".encode("gbk"))])
def test_a_name_without_words_is_announced_as_a_missing_prompt(name):
    prompt = prompt_from_name(name)
    assert prompt == "Transparent background"
    assert "1 of 2 are missing" in said_of_names([prompt, "a red fox"])
    assert said_of_names(["a red fox"]) is None


@pytest.mark.slow
@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no real media at {MEDIA}; set ACETATE_MEDIA")
@pytest.mark.long
def test_all_real_media(tmp_path):
    """Every file is a clip's, or is refused or ignored with a reason, which is not that it is
    opaque where PIL sees transparency."""
    result = ingest(source=MEDIA, out=tmp_path / "found.jsonl", bad_clip_budget=10**6, workers=2)
    said = {file["file"]: file for file in result.files}
    assert said.keys() == {
        str(path.relative_to(MEDIA)) for path in MEDIA.rglob("*") if path.is_file()
    }
    assert all(len(reason) > 20 for reason in result.bad.values())
    assert not [reason for reason in result.bad.values() if "ended the process" in reason]
    opaque = [
        name
        for name, entry in said.items()
        if Path(name).suffix.lower() in IMAGES
        and ("ignored" in entry or NO_ALPHA in entry.get("refused", ""))
    ]
    assert not [name for name in opaque if has_alpha(MEDIA / name)]
    clips = {clip.key: clip for clip in result.clips}
    if "ACETATE_MEDIA" not in os.environ:  # the folder that the figures are of
        assert Counter(clip.kind for clip in result.clips) == {
            "still": 163, "pair": 17, "video": 16, "packed": 5, "sequence": 1,
        }  # fmt: skip
        assert all(
            clip.licence != "unknown" for clip in result.clips if clip.kind in ("still", "pair")
        )
        assert len({clip.group for key, clip in clips.items() if "vap_globe" in key}) == 1


def has_alpha(path):
    """Whether PIL reads it, and shows some of it as transparent."""
    try:
        with Image.open(path) as image:
            return image.convert("RGBA").getextrema()[3][0] < 255
    except Exception:  # whatever PIL says of a damaged file
        return False
