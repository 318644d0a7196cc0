import numpy as np
import pytest
import torch
from torch.testing import assert_close

from acetate.commands import agreement
from acetate.commands.agreement import Seen, alike, colors_of, frechet
from acetate.data.synthetic import KINDS, SyntheticClip, render
from acetate.metrics.intervals import interval


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_names_a_color_of_its_subject(kind):
    for seed in range(40):
        prompt = render(kind, seed, 1, 8, 8).prompt
        found = colors_of(prompt)
        assert found and all(name in prompt for name in found)
        assert len(found) == prompt.count(" and ") + 1 - prompt.count("rim and moving")


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("shot: lock of curly red hair with royal blue bow, waving in the wind.", ["red"]),
        ("shot: furry creature with teal hair swaying to the left.", ["teal"]),
        ("shot: sky blue disc and dotted blue ring turning.", ["sky blue", "blue"]),
    ],
)
def test_names_are_whole_and_without_the_bow(prompt, names):
    assert colors_of(prompt) == names


def test_alike_are_neighbours_on_the_circle_and_among_greys():
    assert alike("crimson", "pink") and alike("violet", "royal blue") and alike("teal", "teal")
    assert not alike("crimson", "orange") and not alike("teal", "violet")
    assert alike("grey", "silver") and not alike("black", "white")
    assert not alike("white", "pink") and not alike("blue", "black")


def test_agreement_counts_kind_and_any_named_color():
    def clip(kind, prompt):
        return SyntheticClip(torch.zeros(3, 1, 1, 1), torch.zeros(1, 1, 1, 1), prompt, kind)

    clips = [
        clip("shape", "shot: violet star and lime disc."),
        clip("smoke", "shot: grey smoke."),
        clip("shape", "shot: striped violet star."),
        clip("particles", "shot: sparse lime sparks."),
    ]
    kinds = ["shape", "flame", "shape", "particles"]
    seen = Seen(torch.zeros(4, 2), kinds, ["lime", "pink", "teal", "lime"])
    found, colors = agreement.agreement(seen, clips)
    assert found.tolist() == [True, False, True, True]
    assert colors.tolist() == [True, False]  # the others have a second color


def test_frechet_of_normal_distributions_with_known_moments():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)  # exact moments
    scale, away = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    assert frechet(x, x) == pytest.approx(0, abs=1e-4)
    # |away|^2 + sum (1 - scale)^2 of axes that do not mix
    assert frechet(x, x * scale + away) == pytest.approx(5 + 1 + 0.25, rel=1e-3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    assert frechet(x @ turn, (x * scale + away) @ turn) == pytest.approx(6.25, rel=1e-3)


def test_an_interval_holds_the_value_and_narrows_with_clips():
    few, many = (np.arange(count) % 4 == 0 for count in (32, 512))
    ends = [interval(len(v), lambda at, v=v: v[at].mean(), "percentile") for v in (few, many)]
    assert all(low < 0.25 < high for low, high in ends)
    assert ends[1][1] - ends[1][0] < 0.5 * (ends[0][1] - ends[0][0])


@pytest.fixture
def quick(monkeypatch):
    """A network that is trained in a second, on few drawings."""
    for name, value in (("DRAWN", 56), ("CHECKED", 14), ("EPOCHS", 1), ("BATCH", 14)):
        monkeypatch.setattr(agreement, name, value)


def test_the_reader_is_trained_once_and_kept(quick, tmp_path, monkeypatch):
    reader, right = agreement.load_reader(tmp_path / "cache")
    assert set(right) == {"kind", "color"}
    made = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(made) == 1
    before = made[0].stat().st_mtime_ns
    again, same = agreement.load_reader(tmp_path / "cache")
    assert made[0].stat().st_mtime_ns == before and same == right
    for name, value in reader.state_dict().items():
        assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_measures_of_clips_against_themselves_and_shuffled(quick):
    reader = agreement.train_reader()
    clips = [render(KINDS[n % 7], n, 2, 48, 48) for n in range(35)]
    pairs = [(clip.rgb, clip.alpha) for clip in clips]
    same = agreement.measure(reader, pairs, clips, pairs)
    assert same["frechet"][0] == pytest.approx(0, abs=1e-6)
    dark = agreement.measure(reader, [(rgb * 0 - 1, a) for rgb, a in pairs], clips, pairs)
    assert dark["frechet"][0] > 1e-3
    for name in ("kind", "color"):
        value, low, high = same[name]
        assert low <= value <= high
    of_kinds = [same[f"kind, {kind}"] for kind in KINDS]  # five clips of each
    assert sum(of_kinds) / len(KINDS) == pytest.approx(same["kind"][0])


@pytest.mark.long
@pytest.mark.slow
def test_the_reader_reads_kept_back_drawings(tmp_path):
    _, right = agreement.load_reader(tmp_path)
    assert min(right.values()) >= 0.95
