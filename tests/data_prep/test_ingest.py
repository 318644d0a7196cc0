import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.examine import Found, prompt_from_name
from data_prep.ingest import TooManyBad, ingest

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
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixels)))
        container.mux(stream.encode())


def run(source, budget=0, **changes):
    result = ingest(source=source, out=source.parent / "found.jsonl", bad_clip_budget=budget, **changes)
    return {clip.key: clip for clip in result.clips}, result.bad


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
        json.dumps({"gift": {"rgb_rect": [0, 0, 32, 16], "alpha_rect": [32, 0, 16, 8], "packed_size": [48, 16]}})
    )
    clips, bad = run(source)
    assert not bad
    assert {key: (clip.kind, clip.frames, clip.width, clip.height) for key, clip in clips.items()} == {
        "gift": ("packed", 3, 32, 16),
        "jump": ("pair", 3, 32, 16),
        "stills-red_fox": ("still", 1, 10, 8),
        "walk": ("sequence", 3, 10, 8),
        "films-wave": ("video", 3, 32, 16),
    }
    assert [Path(file).name for file in clips["jump"].files] == ["jump_fgr.mp4", "jump_pha.mp4"]
    assert (clips["gift"].colour_rect, clips["gift"].alpha_rect) == ((0, 0, 32, 16), (32, 0, 16, 8))
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
    for name in ("a", "b", "c", "d"):
        still(source / f"{name}.png")
    (source / "index.csv").write_text(
        "file,caption,licence,source,premultiplied,group\n"
        "a.png,a red ball,MIT,me/here,true,x\n"
        "b.png,from the table,,,,\n"
    )
    (source / "more.jsonl").write_text(json.dumps({"path": "c.png", "prompt": "a cup", "license": "CC0"}) + "\n")
    (source / "b.txt").write_text("from the sidecar\n")
    clips, _ = run(source)
    a, b, c, d = (clips[name] for name in "abcd")
    assert (a.prompt, a.licence, a.source, a.premultiplied, a.group) == ("a red ball", "MIT", "me/here", True, "x")
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
    (source / "r.json").write_text(
        json.dumps({"packed": {"rgb_rect": [0, 0, 8, 8], "alpha_rect": [8, 0, 8, 8], "packed_size": [64, 64]}})
    )
    clips, bad = run(source, budget=4)
    assert not clips and len(bad) == 4
    text = "\n".join(bad.values())
    for reason in ("opaque.png has no alpha", "opaque.mp4 has no alpha", "broken.webm: cannot be decoded",
                   "packed.mp4 is 32x16, its rectangles are for 64x64"):  # fmt: skip
        assert reason in text


def test_keys_are_plain_and_unique(source):
    for name in ("a.b.png", "Fuchs läuft.png", "same.png", "x" * 120 + ".png"):
        still(source / name)
    still(source / "same.webp")
    clips, _ = run(source)
    assert len(clips) == 5
    for key in clips:
        assert key.isascii() and len(key) <= 80 and "." not in key and " " not in key
    assert "same" in clips
    assert list(run(source)[0]) == list(clips)


def test_source_must_be_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="name the folder"):
        run(tmp_path / "none")


def test_prompt_from_name():
    assert prompt_from_name("smoke_04") == "Transparent background: smoke"
    assert prompt_from_name("am2k_sample1") == "Transparent background: am2k sample1"


@pytest.mark.slow
@pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no real media at {MEDIA}; set ACETATE_MEDIA")
def test_all_real_media(tmp_path):
    result = ingest(source=MEDIA, out=tmp_path / "found.jsonl", bad_clip_budget=0, workers=2)
    clips, bad = result.clips, result.bad
    assert not bad
    kinds = [clip.kind for clip in clips]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "still": 163, "pair": 17, "video": 16, "packed": 5, "sequence": 1,
    }  # fmt: skip
    assert all(clip.licence != "unknown" for clip in clips if clip.kind in ("still", "pair"))
    globe = {clip.group for clip in clips if "vap_globe" in clip.key}
    assert len([clip for clip in clips if "vap_globe" in clip.key]) == 3 and len(globe) == 1
