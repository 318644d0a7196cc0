import re
from html.parser import HTMLParser

import numpy as np
import pytest

from acetate.alpha import PALETTE_NAMES
from acetate.data.shards import index_shards
from acetate.data.writer import ShardWriter, encode_clip
from data_prep.folders import DECISIONS
from data_prep.inspect import inspect, picture
from data_prep.journal import write_lines
from data_prep.report import COLORS, Bucket, Entry, Picture, Report, bars, render, size_text, words
from tests.browser import chromium, needs_chromium
from tests.compose import called
from tests.paths import ROOT

HOSTILE = '<script>document.body.dataset.hacked = 1</script> "quoted" & ä'
SETTINGS = {
    "sample": 99, "seed": 0, "frames": 4, "side": 24, "vae": str(ROOT / "assets/wan-tiny"),
    "lengths": [5],
    "area": 32 * 32, "max_aspect": 2.0, "executor": "local", "workers": 0,
}  # fmt: skip


def ramp(frames, height, width):
    clip = np.full((frames, height, width, 4), 200, np.uint8)
    clip[..., 3] = np.linspace(0, 255, width).round()
    return clip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("inspected") / "clips"
    clips = {"wide": (7, 16, 32), "tall": (5, 32, 16), "still": (1, 20, 20), "broken": (1, 16, 16)}
    with ShardWriter(out, max_clips=9, max_bytes=10**9, made_by={"command": "test"}) as writer:
        for key, shape in clips.items():
            writer.add(
                key, encode_clip(ramp(*shape), 12), split="val" if key == "tall" else "train",
                prompt=HOSTILE if key == "wide" else f"glass {key}", source="here",
                licence="MIT" if key == "still" else "CC0-1.0", lossy=False,
                premultiplied_source=False, done={"still": "<kept> one"} if key == "wide" else None,
            )  # fmt: skip
        writer.skipped |= {"lost": "was <never> there", "gone": "was <never> there"}
    line = {
        "pieces": ["wide"],
        "notes": ["turned", "cut"],
        "decisions": {"reasons": {"color": "straight: sure"}},
    }
    write_lines(out / DECISIONS, [line, {"refused": "empty"}])
    ref = {ref.key: ref for ref in index_shards([out])}["broken"]
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + 40)
        file.write(b"damage")
    return out


@pytest.fixture(scope="module")
def page(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(inspect(shards=[source], **SETTINGS)), encoding="utf-8")
    return path


def test_report(source):
    report = inspect(shards=[source], **SETTINGS)
    assert {entry.key: entry.kind for entry in report.entries} == {
        "wide": "video",
        "tall": "video",
        "still": "still",
    }
    assert report.buckets == {
        (5, 32, 32): Bucket(windows=1, clips=1, enlarged=1, most_enlarged=1.6, looped=0, held=1),
        (5, 40, 24): Bucket(windows=1, clips=1, enlarged=1, most_enlarged=1.5, looped=0, held=0),
        (5, 24, 40): Bucket(windows=1, clips=1, enlarged=1, most_enlarged=1.5, looped=0, held=0),
    }
    assert report.buckets[5, 32, 32].said == "1 enlarged, up to 1.6 times a side; 1 stills, held"
    assert report.skipped.keys() == {"lost", "gone", "broken"} and "CRC" in report.skipped["broken"]
    wide = next(entry for entry in report.entries if entry.key == "wide")
    assert (wide.fps, wide.licence, wide.split, wide.prompt) == (12, "CC0-1.0", "train", HOSTILE)
    assert wide.picture is not None and wide.picture.frames == 4


def test_alpha_is_measured_on_every_pixel(source):
    made = picture(index_shards([source])[-1], frames=4, side=24)
    assert isinstance(made, Picture)
    assert made.shares == pytest.approx((1 / 32, 30 / 32, 1 / 32))
    assert made.coverage == pytest.approx(0.5, abs=1e-3) and sum(made.alpha) == pytest.approx(1)


def test_the_sample_depends_on_the_seed_alone(source):
    def keys(**changes):
        return [entry.key for entry in inspect(shards=[source], **(SETTINGS | changes)).pictured]

    assert keys(sample=2) == keys(sample=2) and len(keys(sample=2)) <= 2
    assert len({tuple(keys(sample=1, seed=seed)) for seed in range(8)}) > 1
    wrong = [
        ({"side": 9999}, "must not pass 16383"),
        ({"lengths": [6]}, r"lengths: 6 frames; Wan needs 4k\+1"),
        ({"area": 1e12}, r"area=1e\+12 is .* times a side of the largest clip"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            keys(**change)


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    tags = Tags(text).tags
    assert not {"link", "iframe", "img", "base"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if {"src", "href", "srcset"} & attrs.keys()]
    assert set(re.findall(r"url\(([^)]{0,12})", text)) == {"data:image/w", "#alpha"}
    assert "http" not in text and "slot:" not in text


def test_page_says_what_was_decided_and_refused(source, page):
    report = inspect(shards=[source], **SETTINGS)
    assert {entry.key: entry.decided for entry in report.entries} == {
        "wide": {"color": "straight: sure", "read": "turned; cut", "still": "<kept> one"},
        "tall": {},
        "still": {},
    }
    text = page.read_text(encoding="utf-8")
    assert "<dt>read</dt><dd>turned; cut</dd><dt>still</dt><dd>&lt;kept&gt; one</dd>" in text
    assert "<summary><b>2</b> was &lt;never&gt; there</summary>" in text


def test_words_that_tell_prompts_apart():
    prompts = ["red glass with foam", "blue glass with foam", "red glass over sand", "blue glass"]
    entries = [Entry(p, "train", 1, 8, 8, 0, p, "MIT", "s", None) for p in prompts]
    assert words(entries) == {"blue": 2, "foam": 2, "sand": 1}


def test_numbers_in_words():
    assert [size_text(n) for n in (0, 999, 1536, 5 * 2**20, 3 * 2**40)] == [
        "0 bytes", "999 bytes", "1.5 KiB", "5 MiB", "3 TiB",
    ]  # fmt: skip
    many = bars({f"n{i}": 10 - i for i in range(9)})
    assert many.count("<i ") == 7 and "2 more" in many and "<b>5</b>" in many


def test_many_clips_are_a_stated_sample():
    alpha = (1.0, *[0.0] * 255)
    entries = [
        Entry(
            f"k{i}",
            "train",
            1,
            8,
            8,
            0,
            "p",
            "MIT",
            "s",
            Picture(b"x", 1, alpha) if i < 3 else None,
        )
        for i in range(1200)
    ]
    report = Report("t", "m", 10, entries, {(1, 8, 8): Bucket(1200, 1200, 0, 1.0, 0, 0)}, 64, 7, {})
    assert "A sample of 3 of 1,200, drawn with seed 7" in render(
        report
    ) and "Skipped" not in render(report)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("fragment", "shown", "ground"),
    [
        ("", {"wide", "tall", "still"}, "checker"),
        ("q=GLASS&ground=red", {"tall", "still"}, "red"),
        ("split=val&ground=eight", {"tall"}, "eight"),
        ("q=nothing+like+it", set(), "checker"),
    ],
)
def test_page_in_a_browser(page, tmp_path, fragment, shown, ground):
    dom, console = chromium(page, tmp_path, fragment)
    assert console == []
    tags = Tags(dom).tags
    cards = [attrs for tag, attrs in tags if tag == "article"]
    assert {
        attrs["data-text"].split()[0] for attrs in cards if "hidden" not in attrs
    } == shown and len(cards) == 3
    assert (
        next(attrs for _, attrs in tags if attrs.get("class") == "cards")["data-ground"] == ground
    )
    assert ("hidden" in next(attrs for _, attrs in tags if attrs.get("class") == "none")) == bool(
        shown
    )
    assert (
        "data-hacked" not in dom.replace("dataset.hacked", "") and "was &lt;never&gt; there" in dom
    )


@pytest.mark.slow
@needs_chromium
def test_a_broken_script_is_seen(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.read_text(encoding="utf-8").replace(
            "function show() {", "function show() { nowhere();"
        )
    )
    assert "nowhere is not defined" in "".join(chromium(broken, tmp_path / "profile")[1])


def command(capsys, *arguments):
    called("prep inspect", *arguments)
    return capsys.readouterr().out


def test_command(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = command(capsys, f"shards={source}", "out=report.html", "preview=true")
    assert "skipped broken" in seen and "frames x height x width" in seen and "CC0-1.0" in seen
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        command(capsys, f"shards={source}", "out=.")
    assert "out=. is a folder; name a file" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )
    seen = command(capsys, f"shards={source}", "out=report.html", "sample=2")
    assert "Alpha is of a sample of" in seen and [path.name for path in tmp_path.iterdir()] == [
        "report.html"
    ]


def test_the_palette_is_the_one_of_training():
    assert (
        tuple(COLORS) == PALETTE_NAMES
        and COLORS["yellow"] == "#ffff00"
        and COLORS["key"] == "#000000"
    )
