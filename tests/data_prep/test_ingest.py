import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acetate.video_io import IMAGES
from data_prep.bad_clips import TooManyBad
from data_prep.decisions import Decisions
from data_prep.examine import NO_ALPHA, Settings
from data_prep.found import Found
from data_prep.ingest import ingest
from tests.data_prep.material import (
    film,
    notes,
    run,
    source,  # noqa: F401
    still,
)
from tests.media.films import drawn, write
from tests.media.test_packed import packed

MEDIA = Path(os.environ.get("ACETATE_MEDIA", Path(__file__).parents[3] / "shared" / "media"))


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


def test_a_sequence_with_a_gap_is_named(source):
    for i in (1, 2, 4):
        still(source / "gap" / f"{i}.png")
    assert {clip.kind for clip in run(source)[0].values()} == {"still"}
    assert "gap: number 3 is missing, so its 3 images are stills" in notes(source)[0]


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
