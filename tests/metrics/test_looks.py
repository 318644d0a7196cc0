from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from acetate.metrics.looks import AlphaLooks, GuideAdherence, halo_of_frame
from tests.metrics.drawn import disc, figures, painted, plain


def looks(rgb, alpha):
    return figures(AlphaLooks(), rgb, alpha)


def test_known_values_of_a_square():
    alpha = torch.zeros(1, 1, 2, 80, 80)
    alpha[..., 30:50, 30:50] = 1
    alpha[..., 38:42, 38:42] = 0.5  # a hole of half alpha
    found = looks(plain(alpha, [1.0, 0.5, 0.0]), alpha)
    assert found["coverage"] == pytest.approx((400 - 8) / 6400)
    assert found["soft"] == pytest.approx(16 / 6400)
    assert found["border"] == found["background"] == found["halo"] == 0
    assert found["holes"] == pytest.approx(8 / 400)
    corners = 4 * 0.5 * 2**0.5 + (4 * 20 - 8) * 0.5  # corner pixels change both ways
    assert found["edge_sharpness"] == pytest.approx(corners / 76, rel=1e-5)


def test_what_a_shape_does_not_enclose_is_no_hole():
    alpha = torch.ones(1, 1, 1, 40, 40)
    alpha[..., 10:30, 10:40] = 0  # open to the right
    assert looks(plain(alpha, [1.0, 1.0, 1.0]), alpha)["holes"] == 0
    alpha[..., 39] = 1
    assert looks(plain(alpha, [1.0, 1.0, 1.0]), alpha)["holes"] == pytest.approx(580 / 1600)


@pytest.mark.parametrize("width", [3.0, 5.0, 10.0])
def test_a_ramp_of_known_width(width):
    x = torch.arange(48.0)
    alpha = ((x - 20) / width + 0.5).clamp(0, 1).expand(1, 1, 1, 32, 48)
    assert looks(plain(alpha, [1.0, 1.0, 1.0]), alpha)["edge_sharpness"] == pytest.approx(
        1 / width, rel=1e-4
    )


def test_a_known_halo():
    alpha, color = torch.zeros(8, 12), torch.ones(8, 12, 3)
    alpha[:, :4], alpha[:, 4:6] = 1, 0.5
    assert halo_of_frame(color.numpy(), alpha.numpy()) == (0, 16)
    color[:, 4:6] = 0.5  # grey beside white: 0.25 over black, 0.75 over white in place of 1
    total, pixels = halo_of_frame(color.numpy(), alpha.numpy())
    assert total / pixels == pytest.approx((3 * 0.25**2 / 6) ** 0.5)
    assert halo_of_frame(color.numpy(), 0.5 * alpha.numpy()) == (0, 0)  # nothing solid to compare


def test_clips_without_a_subject_leave_figures_out():
    alpha = torch.full((1, 1, 1, 64, 64), 0.2)
    found = looks(plain(alpha, [1.0, 1.0, 1.0]), alpha)
    assert found["border"] == pytest.approx(0.2)
    assert not {"background", "edge_sharpness", "halo"} & found.keys()


def holed(alpha, strength):
    alpha = alpha.clone()
    alpha[..., 26:34, 24:32] *= 1 - strength
    return alpha


def veiled(alpha, strength):
    return alpha.clamp_min(0.2 * strength)


def blurred(alpha, strength):
    return disc(2, speed=0.0, soft=2 + 8 * strength)


def fringed(rgb, alpha, strength):
    """Color is mixed with black where alpha is soft."""
    return (rgb + 1) * (1 - strength + strength * alpha) - 1, alpha


@pytest.mark.parametrize(
    ("name", "defect", "sign"),
    [
        ("holes", lambda rgb, alpha, s: (rgb, holed(alpha, s)), 1),
        ("border", lambda rgb, alpha, s: (rgb, veiled(alpha, s)), 1),
        ("background", lambda rgb, alpha, s: (rgb, veiled(alpha, s)), 1),
        ("edge_sharpness", lambda rgb, alpha, s: (rgb, blurred(alpha, s)), -1),
        ("halo", fringed, 1),
    ],
)
def test_a_growing_defect_is_answered(name, defect, sign):
    alpha = disc(2, speed=0.0)
    rgb = plain(alpha, [0.9, 0.6, 0.3])
    found = [looks(*defect(rgb, alpha, strength))[name] for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    steps = [sign * (more - less) for less, more in pairwise(found)]
    assert min(steps) > 0, found
    if name in ("border", "background"):
        assert found[-1] == pytest.approx(0.2)
    if name in ("holes", "halo"):
        assert found[0] == pytest.approx(0, abs=1e-6)


def test_pieces_and_batches_are_one():
    alpha = veiled(disc(4), 0.5)
    rgb = painted(alpha)
    whole, pieces = AlphaLooks(), AlphaLooks()
    whole.update(torch.cat([rgb, rgb.flip(2)]), torch.cat([alpha, alpha.flip(2)]))
    for video in (rgb, rgb.flip(2)):
        for t in range(4):
            at = 3 - t if video is not rgb else t
            pieces.update(video[:, :, t : t + 1], alpha[:, :, at : at + 1])
    assert_close(pieces.compute(), whole.compute())


def test_a_known_guide():
    alpha = torch.zeros(1, 1, 2, 40, 60)
    alpha[..., 10:30, 20:40] = 1  # its centre is (29.5, 19.5)
    around = torch.tensor([29.5, 19.5, 40.0, 40.0, 0.0])
    found = figures(GuideAdherence(), alpha, around.expand(2, 5))
    assert found == pytest.approx({"guide_inside": 1, "guide_offset": 0})
    half = torch.tensor([29.5 + 20, 19.5, 40.0, 400.0, 0.0])  # its left end is the square's middle
    found = figures(GuideAdherence(), alpha, half.expand(2, 5))
    assert found["guide_offset"] == pytest.approx(20 / 40)
    assert found["guide_inside"] == pytest.approx(0.5, abs=0.05)
    assert figures(GuideAdherence(), alpha, torch.zeros(2, 5)) == {}
    away = [
        figures(GuideAdherence(), alpha, (around + torch.tensor([d, 0, -20, -20, 0])).expand(2, 5))
        for d in (0.0, 8.0, 16.0)
    ]
    assert away[0]["guide_inside"] > away[1]["guide_inside"] > away[2]["guide_inside"]
