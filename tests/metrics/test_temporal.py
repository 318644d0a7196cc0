import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from acetate.metrics.faults import Faults, named
from acetate.metrics.motion import motion, moved
from acetate.metrics.temporal import TemporalErrors
from tests.metrics.drawn import disc, figures, late, painted


def cut_out(frames=5, dx=3, dy=-2):
    """A pattern that moves, (T, 48, 64)."""
    noise = torch.rand(1, 1, 104, 124, generator=torch.Generator().manual_seed(0))
    big = 3 * F.avg_pool2d(noise, 5, 1)[0, 0] - 1
    return torch.stack(
        [big[20 - dy * t : 68 - dy * t, 30 - dx * t : 94 - dx * t] for t in range(frames)]
    )


def test_motion_of_a_pattern():
    picture = cut_out()
    before, after = motion(picture)
    inner = (slice(1, None), slice(8, 40), slice(8, 56))
    assert (after[inner] == torch.tensor([3, -2])).all()
    assert (before[inner] == torch.tensor([-3, 2])).all()
    assert_close(moved(picture[1:], after)[inner], picture[:-1][inner])


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 9, 9), (2, 1, 1), (3, 5, 30)])
def test_motion_of_small_pictures(frames, height, width):
    before, after = motion(torch.rand(frames, height, width))
    assert before.shape == after.shape == (frames - 1, height, width, 2)


def test_motion_does_not_depend_on_what_came_before():
    before, after = motion(cut_out(6))
    later = motion(cut_out(6)[2:])
    assert_close(later[1], after[2:])
    assert_close(later[0][1:], before[3:])


def test_an_error_that_goes_along_costs_nothing():
    true = cut_out(4, 8, 0)[None, None]  # a block a frame, so that the border is exact
    spot = torch.zeros_like(true)
    for t in range(4):
        spot[:, :, t, 16:24, 16 + 8 * t : 24 + 8 * t] = 0.25
    along = figures(TemporalErrors(), (true / 2 + spot), true / 2)
    still = figures(TemporalErrors(), true / 2 + spot[:, :, :1], true / 2)
    assert along["messddt"] == pytest.approx(0, abs=1e-7)
    # 64 pixels appear and 64 vanish, of the squared error 1/16
    assert still["messddt"] == pytest.approx(1e3 * 128 / 16 / (48 * 64), rel=1e-5)


def test_known_messddt_of_a_still_matte():
    true = torch.full((1, 1, 3, 16, 16), 0.5)
    seen = true + torch.tensor([0.1, 0.3, 0.3])[:, None, None]
    assert figures(TemporalErrors(), seen, true)["messddt"] == pytest.approx(
        1e3 * (0.09 - 0.01) / 2, rel=1e-4
    )
    assert figures(TemporalErrors(), true[:, :, :1], true[:, :, :1]) == {}


@pytest.mark.parametrize("metric", [TemporalErrors, Faults])
def test_pieces_of_a_clip_are_one_clip(metric):
    alpha = disc(7)
    videos = [late(alpha, 1), alpha]
    if metric is Faults:
        videos = [painted(alpha), videos[0], painted(alpha), alpha]
    whole, pieces = metric(), metric()
    whole.update(*videos)
    for start, end in ((0, 1), (1, 2), (2, 5), (5, 7)):
        pieces.update(*(video[:, :, start:end] for video in videos), goes_on=start > 0)
    assert_close(pieces.compute(), whole.compute())
    both = metric()
    both.update(*(torch.cat([video, video]) for video in videos))
    assert_close(both.compute(), whole.compute())
    with pytest.raises(ValueError, match="goes_on=true, but no piece"):
        metric().update(*videos, goes_on=True)


DEFECTS = {
    "sound": (lambda rgb, alpha: (rgb, alpha), []),
    "shifted": (lambda rgb, alpha: (rgb, alpha.roll(1, -1)), ["alpha is shifted 1 px right"]),
    "higher": (lambda rgb, alpha: (rgb, alpha.roll(-2, -2)), ["alpha is shifted 2 px up"]),
    "late": (lambda rgb, alpha: (rgb, late(alpha, 1)), ["alpha is 1 frame late"]),
    "early": (
        lambda rgb, alpha: (rgb, late(alpha.flip(2), 2).flip(2)),
        ["alpha is 2 frames early"],
    ),
    "twice": (
        lambda rgb, alpha: ((rgb + 1) * alpha - 1, alpha),
        ["colour is multiplied by alpha once too often"],
    ),
    "squared": (lambda rgb, alpha: (rgb, alpha.square()), ["alpha is multiplied by itself"]),
    "noisy": (
        lambda rgb, alpha: (
            rgb, alpha + 0.2 * torch.randn(alpha.shape, generator=torch.Generator().manual_seed(0)),
        ),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("speed", [3.0, 1.0])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_fault_is_named(defect, speed):
    alpha = disc(8, speed)
    rgb = painted(alpha, speed)
    broken, words = DEFECTS[defect]
    assert named(figures(Faults(), *broken(rgb, alpha), rgb, alpha)) == words


def test_how_often_color_is_multiplied_grows():
    alpha = disc(2)
    rgb = painted(alpha)
    found = [
        figures(Faults(), (rgb + 1) * (1 - part + part * alpha) - 1, alpha, rgb, alpha)[
            "multiplied"
        ]
        for part in (0.0, 0.25, 0.5, 1.0)
    ]
    assert found == pytest.approx([0, 0.25, 0.5, 1], abs=1e-5)


def test_color_that_is_not_seen_is_no_fault():
    alpha = disc(4)
    rgb, behind = painted(alpha), late(alpha, 1)
    hidden = torch.where(behind > 0, rgb, -1)  # black where it was not seen
    assert named(figures(Faults(), hidden, behind, rgb, alpha)) == ["alpha is 1 frame late"]
