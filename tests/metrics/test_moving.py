import pytest
import torch
from torch.testing import assert_close

from acetate.metrics.moving import AlphaMotion
from tests.metrics.drawn import disc, figures, late, painted, plain


def moving(rgb, alpha):
    return figures(AlphaMotion(), rgb, alpha)


def test_a_known_flicker():
    alpha = torch.full((1, 1, 4, 32, 32), 0.5)
    up = alpha + torch.tensor([0.1, -0.1, 0.1, -0.1])[:, None, None]
    rgb = plain(alpha, [1.0, 1.0, 1.0])
    assert moving(rgb, up)["flicker"] == pytest.approx(0.2, rel=1e-5)
    fading = alpha + torch.tensor([0.0, 0.1, 0.2, 0.3])[:, None, None]
    assert moving(rgb, fading)["flicker"] == 0
    assert "flicker" not in moving(rgb[:, :, :2], alpha[:, :, :2])


def test_motion_is_no_flicker():
    alpha = disc()
    assert moving(painted(alpha), alpha)["flicker"] == pytest.approx(0, abs=1e-6)


def test_a_known_disagreement():
    x = torch.arange(64.0)
    alpha = torch.stack([(x + t) / 128 for t in range(4)])[None, None, :, None].expand(
        1, 1, 4, 32, 64
    )
    board = ((torch.arange(32)[:, None] // 4 + x // 4) % 2).expand(1, 3, 4, 32, 64)
    # color stands still, and alpha grows by 1/128 a frame
    assert moving(board * 2 - 1, alpha)["motion_disagreement"] == pytest.approx(1 / 128, rel=1e-4)
    assert "motion_disagreement" not in moving(plain(alpha, [0.5, 0.5, 0.5]), alpha)


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_a_known_lag(lag):
    alpha = disc(10)
    rgb = painted(alpha)
    assert moving(rgb, late(alpha, lag))["lag"] == lag
    assert moving(late(rgb, lag), alpha)["lag"] == -lag


def test_color_that_goes_on_under_empty_alpha_tells_no_lag():
    alpha = disc()
    assert "lag" not in moving(plain(alpha, [0.9, 0.5, 0.1]), alpha)


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("flicker", lambda alpha, s: alpha * (1 - 0.2 * s * (torch.arange(10) % 2)[:, None, None])),
        ("motion_disagreement", late),
        ("lag", late),
    ],
)
def test_a_growing_defect_is_answered(name, defect):
    alpha = disc(10, soft=4.0)
    found = [moving(painted(alpha), defect(alpha, strength))[name] for strength in (0, 1, 2, 3)]
    assert found == sorted(found) and len(set(found)) == 4
    assert found[0] == pytest.approx(0, abs=1e-6)


def test_pieces_of_a_clip_are_one_clip():
    alpha = late(disc(9), 1)
    rgb = painted(disc(9))
    alpha = alpha * torch.rand(9, 1, 1, generator=torch.Generator().manual_seed(0))
    whole = moving(rgb, alpha)
    for cuts in ([1] * 9, [4, 5], [2, 1, 6]):
        metric, start = AlphaMotion(), 0
        for size in cuts:
            piece = (video[:, :, start : start + size] for video in (rgb, alpha))
            metric.update(*piece, goes_on=start > 0)
            start += size
        assert {k: float(v) for k, v in metric.compute().items()} == whole
    both = AlphaMotion()
    both.update(torch.cat([rgb, rgb]), torch.cat([alpha, alpha]))
    assert_close({k: float(v) for k, v in both.compute().items()}, whole)
