"""Finished clips of several systems, measured against true ones or alone."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from acetate.media.clip import Limits
from acetate.metrics.catalogue import BY_NAME, FIGURES, PER_COLOR
from acetate.metrics.matting import MattingErrors
from acetate.models.rgba_vae import RGBAVAE as Model
from acetate.pipeline import RGBAVAE
from data_prep.finished import clips_of, opened
from data_prep.measuring import Choices, Work, measured
from data_prep.through import reconstructed
from tests.compose import called
from tests.paths import ROOT

FRAMES, SIDE = 5, 48


def clip(number, frames=FRAMES, side=SIDE):
    """A soft square, opaque inside, that goes to the right over nothing."""
    y, x = np.mgrid[:side, :side].astype(float)
    made = np.zeros((frames, side, side, 4), np.uint8)
    for t in range(frames):
        away = np.maximum(abs(x - 14 - 3 * t), abs(y - 20 - number))
        made[t, ..., 3] = (np.clip((9 - away) / 3, 0, 1) * 255).round()
        made[t, made[t, ..., 3] > 0, :3] = (230, 90 + 20 * number, 40)
    return made


def save(frames, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=rest, duration=100, lossless=True, exact=True)


def noisy(frames, step=20):
    """Soft alpha is a little off."""
    made = frames.copy()
    soft = (made[..., 3] > 0) & (made[..., 3] < 255)
    made[soft, 3] = np.clip(made[soft, 3].astype(int) + step, 0, 255)
    return made


def late(frames):
    made = frames.copy()
    made[1:, ..., 3] = frames[:-1, ..., 3]
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for number in range(4):
        name = f"{'soft' if number % 2 else 'hard'}/clip {number}.webp"
        save(clip(number), root / "true" / name)
        save(noisy(clip(number), 20 + number), root / "mine" / name)
        save(late(clip(number)), root / "theirs" / name)
    return root


def table(out):
    with (out / "clips.csv").open(encoding="utf-8", newline="") as file:
        return {(row["system"], row["clip"]): row for row in csv.DictReader(file)}


def summary(out):
    lines = json.loads((out / "summary.json").read_text(encoding="utf-8"))["summary"]
    return {(s["system"], s["against"], s["stratum"], s["figure"]): s for s in lines}


@pytest.fixture(scope="module")
def evaluated(folders):
    out = folders / "out"
    called("evaluate", f"{folders}/mine", f"{folders}/theirs", f"references={folders}/true",
           f"out={out}")  # fmt: skip
    return out


def test_figures_are_those_of_the_metrics(evaluated):
    rows = table(evaluated)
    assert [*rows] == [(s, f"clip_{n}") for s in ("mine", "theirs") for n in range(4)]
    row = rows["mine", "clip_1"]
    metric = MattingErrors(normalised=True)
    metric.update(*(
        torch.from_numpy(made[..., 3].astype(np.float32) / 255)[None, None]
        for made in (noisy(clip(1), 21), clip(1))
    ))  # fmt: skip
    for name, value in metric.compute().items():
        assert float(row[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-9), name
    assert (row["frames"], row["height"], row["stratum"]) == ("5", "48", "soft")
    assert float(row["psnr_white"]) != float(row["psnr_key"]) and not row["skipped"]
    assert "alphavae_psnr" not in row  # of stills
    assert {name for name in row if name in BY_NAME} > {
        "messddt",
        "lag",
        "halo",
        "premultiplied_mad",
    }


def test_what_is_wrong_is_named(evaluated):
    rows = table(evaluated)
    for number in range(4):
        assert rows["mine", f"clip_{number}"]["faults"] == ""
        assert rows["theirs", f"clip_{number}"]["faults"] == "alpha is 1 frame late"


def test_the_summary_is_of_all_of_each_stratum_and_of_pairs(evaluated):
    rows, lines = table(evaluated), summary(evaluated)
    of_mine, of_theirs = (
        np.array([float(rows[system, f"clip_{n}"]["mad"]) for n in range(4)])
        for system in ("mine", "theirs")
    )
    every = lines["mine", "", "all", "mad"]
    assert every["mean"] == pytest.approx(of_mine.mean()) and every["clips"] == 4
    assert of_mine.min() < every["low"] <= every["mean"] <= every["high"] < of_mine.max()
    soft = lines["theirs", "", "soft", "mad"]
    assert soft["mean"] == pytest.approx(of_theirs[1::2].mean()) and soft["clips"] == 2
    apart = lines["theirs", "mine", "all", "mad"]
    assert apart["mean"] == pytest.approx((of_theirs - of_mine).mean())
    assert apart["low"] > 0
    with (evaluated / "summary.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(lines)


def test_the_screen_has_both_systems_and_their_difference(folders, evaluated, capsys):
    called("evaluate", f"{folders}/mine", f"{folders}/theirs", f"references={folders}/true",
           f"out={folders}/again")  # fmt: skip
    said = capsys.readouterr().out
    assert "theirs - mine" in said and "4 clips" in said and "worse" in said
    assert "theirs: alpha is 1 frame late in 4 of 4 clips" in said
    assert (folders / "again/clips.csv").read_bytes() == (evaluated / "clips.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_the_same_bytes_for_any_number_of_processes(folders, evaluated):
    out = folders / "two"
    called("evaluate", f"{folders}/mine", f"{folders}/theirs", f"references={folders}/true",
           f"out={out}", "workers=2")  # fmt: skip
    for file in evaluated.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.fixture
def odd(folders, tmp_path):
    made = tmp_path / "odd"
    save(clip(0, frames=3), made / "clip 0.webp")
    save(clip(1, side=40), made / "clip 1.webp")
    Image.fromarray(clip(2)[0, ..., :3]).save(made / "clip 2.webp")
    (made / "clip 3.webp").write_bytes(b"RIFF of nothing")
    save(clip(0), made / "Clip nought \u00fc.webp")
    return made


def test_clips_that_do_not_fit_are_named_and_the_others_measured(folders, odd, tmp_path, capsys):
    save(clip(1), odd.parent / "mine" / "clip 1.webp")
    called("evaluate", str(odd), f"{odd.parent}/mine", f"references={folders}/true",
           f"out={tmp_path}/out", "cut_longer=false")  # fmt: skip
    rows, said = table(tmp_path / "out"), capsys.readouterr().out
    why = {name: row["skipped"] for (system, name), row in rows.items() if system == "odd"}
    assert (
        why["clip_0"].startswith("has 3 frames") and "cut_longer=true: the first 3" in why["clip_0"]
    )
    assert "is 40x40" in why["clip_1"] and "48x48; a pair has one size" in why["clip_1"]
    assert "no alpha" in why["clip_2"]
    assert "clip 3.webp" in why["clip_3"]
    assert "no reference has its name" in why["Clip_nought_\u00fc"]
    assert rows["mine", "clip_1"]["skipped"] == "" and float(rows["mine", "clip_1"]["mad"]) == 0
    assert "mine has no clip of 3 references: clip_0, clip_2, clip_3" in said
    assert "skipped odd/clip_2" in said


def test_of_two_lengths_the_frames_that_both_have(folders, odd, tmp_path):
    called("evaluate", str(odd), f"references={folders}/true", f"out={tmp_path}/out",
           "cut_longer=true")  # fmt: skip
    row = table(tmp_path / "out")["odd", "clip_0"]
    assert row["frames"] == "3" and float(row["mad"]) == 0 and not row["skipped"]


def test_nothing_is_half_written(folders, odd, tmp_path, capsys):
    out = tmp_path / "out"
    (odd / "clip 0.webp").unlink()
    with pytest.raises(SystemExit):
        called("evaluate", str(odd), f"references={folders}/true", f"out={out}")
    assert "no clip could be measured" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if path.name != "odd"]
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        called("evaluate", f"{folders}/mine", f"out={out}")
    assert "out holds thesis.txt, which evaluate did not write" in capsys.readouterr().err.replace(
        str(out), "out"
    ).replace("out=out", "out")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{root}/none", "folders={root}/none is not a folder"),
        ("{root}/mine references={root}/none", "references={root}/none is not a folder"),
        ("{root}/empty", "folders={root}/empty: no clip was found there"),
        ("{root}/mine references={root}/other", "a clip and its reference have one name"),
        ("{root}/mine {root}/mine", "a folder is named twice"),
        ("{root}/mine run=x references={root}/true", "are both given"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(settings, words, folders, capsys):
    (folders / "empty").mkdir(exist_ok=True)
    save(clip(0), folders / "other/nothing alike.webp")
    with pytest.raises(SystemExit):
        called("evaluate", *settings.format(root=folders).split(" "), f"out={folders}/never")
    assert words.format(root=folders) in capsys.readouterr().err
    assert not (folders / "never").exists()


def test_without_references_clips_are_measured_alone(folders, tmp_path):
    save(clip(0), tmp_path / "mine/a.webp")
    guide = {"centre": [14.5 / SIDE, 20.5 / SIDE], "end_centre": [26.5 / SIDE, 20.5 / SIDE]}
    (tmp_path / "mine/a.json").write_text(json.dumps({"guide": guide, "stratum": "squares"}))
    called("evaluate", f"{tmp_path}/mine", f"out={tmp_path}/out")
    (row,) = table(tmp_path / "out").values()
    assert row["stratum"] == "squares" and "mad" not in row
    assert float(row["guide_inside"]) == pytest.approx(1, abs=0.02)
    assert float(row["guide_offset"]) == pytest.approx(0, abs=1e-4)
    assert float(row["halo"]) == 0 and float(row["lag"]) == 0


def test_stills_have_the_published_figures_too(tmp_path):
    for name, made in (("true", clip(1)), ("mine", noisy(clip(1)))):
        save(made[:1], tmp_path / name / "still.webp")
    called("evaluate", f"{tmp_path}/mine", f"references={tmp_path}/true", f"out={tmp_path}/out")
    (row,) = table(tmp_path / "out").values()
    assert float(row["alphavae_psnr"]) == pytest.approx(float(row["psnr"]), abs=5)
    assert "flicker" not in row and "messddt" not in row


def test_names_that_several_folders_have_are_told_apart(tmp_path):
    for place in ("a", "b/fgr"):
        save(clip(0), tmp_path / place / "x.webp")
    assert [*clips_of(tmp_path)] == ["a/x", "b/x"]


def test_a_table_of_parquet_says_the_same(evaluated):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(evaluated / "clips.parquet").to_pylist()
    for row, text in zip(rows, table(evaluated).values(), strict=True):
        assert row["clip"] == text["clip"] and row["frames"] == int(text["frames"])
        assert row["mad"] == pytest.approx(float(text["mad"]), rel=1e-8)


def test_every_figure_is_on_the_page():
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    for figure in FIGURES:
        if figure.name not in PER_COLOR:
            assert (
                f"| `{figure.name}` | {figure.says} | {figure.better or '-'} | {figure.source} |"
                in page
            )


def test_a_clip_goes_through_a_vae(make_vae, tmp_path):
    vae = RGBAVAE(
        Model(vae=make_vae("tiny"), merge_init="residual", lora_rank=2, lora_alpha=2.0), "cpu"
    )
    save(clip(0, frames=7, side=43), tmp_path / "mine/a.webp")
    (candidate,) = clips_of(tmp_path / "mine").values()
    limits = Limits()
    pieces = [*reconstructed(candidate, opened(candidate, limits), limits, vae)]
    assert sum(seen.frames for seen, _ in pieces) == 5  # 4k+1
    assert {one.size for pair in pieces for one in pair} == {"40x40"}
    whole = torch.from_numpy(clip(0, frames=7, side=43))[:5, 1:41, 1:41, 3] / 255
    assert_close(pieces[0][1].alpha[0, 0], whole)
    work = Work("mine", "a", "", candidate, through=True)
    found = measured(work, Choices(False, None, False, limits), partial(reconstructed, vae=vae))
    assert not found.why and found.frames == 5 and found.figures["mad"] > 0
