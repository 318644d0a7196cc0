import pytest
import torch
from torch.testing import assert_close

from acetate.regions import (
    EMPTY,
    MIXED,
    OPAQUE,
    cells,
    check_clip_shape,
    fit_ellipses,
    gaussian,
    outlines,
)
from acetate.released.judge import three_valued_map


def clip(frames, height=4, width=4, value=0.0):
    return torch.full((1, 1, frames, height, width), value)


def test_one_cell_of_each_kind():
    """Strides 4 and 2: a picture of 4x6 pixels has 2x3 cells."""
    alpha = torch.tensor(
        [
            [1.0, 1.0, 0.0, 0.0, 0.5, 0.5],
            [1.0, 1.0, 0.0, 0.0, 0.5, 0.5],
            [1.0, 0.9, 0.0, 0.1, 1.0, 0.0],
            [1.0, 1.0, 0.0, 0.0, 1.0, 0.0],
        ]
    )[None, None, None]
    regions = cells(alpha, time_stride=4, space_stride=2)
    assert regions.shape == (1, 1, 1, 2, 3)
    assert regions.dtype == torch.int8
    assert regions[0, 0, 0].tolist() == [[OPAQUE, EMPTY, MIXED], [MIXED, MIXED, MIXED]]


def test_first_cell_sees_the_first_frame_only():
    alpha = clip(9, value=1.0)
    alpha[:, :, 0] = 0
    assert cells(alpha, 4, 4).flatten().tolist() == [EMPTY, OPAQUE, OPAQUE]
    alpha = clip(9)
    alpha[:, :, 0] = 1
    assert cells(alpha, 4, 4).flatten().tolist() == [OPAQUE, EMPTY, EMPTY]


@pytest.mark.parametrize("frame", range(9))
def test_one_pixel_of_one_frame_changes_its_cell_alone(frame):
    """Frames 1..4 belong to cell 1, frames 5..8 to cell 2."""
    alpha = clip(9, value=1.0)
    alpha[0, 0, frame, 1, 2] = 254 / 255
    expected = torch.full((3, 2, 2), OPAQUE)
    expected[(frame + 3) // 4, 0, 1] = MIXED
    assert cells(alpha, 4, 2)[0, 0].tolist() == expected.tolist()


def test_strides_of_one():
    alpha = torch.tensor([1.0, 0.0, 0.5]).view(1, 1, 3, 1, 1)
    assert cells(alpha, 1, 1).flatten().tolist() == [OPAQUE, EMPTY, MIXED]


def test_batch_and_sides_stay_apart():
    generator = torch.Generator().manual_seed(0)
    alpha = torch.randint(3, (3, 1, 5, 8, 12), generator=generator) / 2
    alpha[0, :, :, :4, 4:8] = 1
    alpha[1, :, 1:, 4:, :4] = 0
    together = cells(alpha, 4, 4)
    assert together.shape == (3, 1, 2, 2, 3)
    assert_close(together, torch.cat([cells(one[None], 4, 4) for one in alpha]))
    assert_close(cells(alpha.mT, 4, 4), together.mT)
    assert (together == OPAQUE).sum() == 2
    assert (together == EMPTY).sum() == 1


def test_complement_swaps_opaque_and_empty():
    generator = torch.Generator().manual_seed(1)
    alpha = (torch.rand(2, 1, 5, 8, 8, generator=generator) > 0.5).float()
    alpha[:, :, :, :4] = 0
    regions, opposite = cells(alpha, 4, 4), cells(1 - alpha, 4, 4)
    assert_close(opposite == OPAQUE, regions == EMPTY)
    assert_close(opposite == MIXED, regions == MIXED)
    assert (regions == EMPTY).any()


def test_eps_forgives_codec_noise():
    noisy = torch.tensor([254 / 255, 1 / 255, 2 / 255]).view(1, 1, 1, 1, 3)
    assert cells(noisy, 4, 1).flatten().tolist() == [MIXED, MIXED, MIXED]
    assert cells(noisy, 4, 1, eps=1.5 / 255).flatten().tolist() == [OPAQUE, EMPTY, MIXED]


@pytest.mark.parametrize(("frames", "remedy"), [(2, 1), (4, 1), (6, 5), (16, 13), (0, 1)])
def test_frames_off_the_grid(frames, remedy):
    with pytest.raises(ValueError, match=rf"^{frames} frames.*4k\+1.*Use frames={remedy}\.$"):
        check_clip_shape(frames, 8, 8, time_stride=4, space_stride=8)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (12, 16, "height 12.*multiples of 8.*height=8"),
        (16, 20, "width 20.*width=16"),
        (4, 8, "height 4.*height=8"),
        (8, 0, "width 0.*width=8"),
    ],
)
def test_sides_off_the_grid(height, width, message):
    with pytest.raises(ValueError, match=message):
        check_clip_shape(5, height, width, time_stride=4, space_stride=8)


@pytest.mark.parametrize("regions", [cells, three_valued_map])
def test_both_maps_check_their_clip(regions):
    with pytest.raises(ValueError, match="6 frames"):
        regions(clip(6), 4, 4)
    with pytest.raises(ValueError, match="width 6"):
        regions(clip(5, width=6), 4, 4)


def test_shapes_on_the_grid_pass():
    for frames in (1, 5, 81):
        check_clip_shape(frames, 480, 832, time_stride=4, space_stride=8)
    check_clip_shape(3, 4, 4, time_stride=2, space_stride=4)


def drawn_ellipse(cx, cy, long, short, degrees, size=128):
    """A solid ellipse in pixels, (1, 1, 1, size, size)."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    turn = torch.deg2rad(torch.tensor(float(degrees)))
    u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
    v = (y - cy) * turn.cos() - (x - cx) * turn.sin()
    return ((u / (long / 2)) ** 2 + (v / (short / 2)) ** 2 <= 1).float()[None, None, None]


@pytest.mark.parametrize("degrees", [0, 30, 75, 120])
def test_fit_finds_the_ellipse_that_was_drawn(degrees):
    alpha = drawn_ellipse(70, 56, 88, 40, degrees)
    cx, cy, long, short, angle = fit_ellipses(alpha, 4, 4)[0, 0].tolist()
    assert abs(cx - (70 / 4 - 0.5)) < 0.3  # centres of cells are whole numbers
    assert abs(cy - (56 / 4 - 0.5)) < 0.3
    assert 0.9 < long / 22 < 1.3
    assert 0.9 < short / 10 < 1.4
    assert abs((angle - degrees + 90) % 180 - 90) < 3


@pytest.mark.parametrize("aligned", [False, True])
def test_fit_has_the_subject_inside(aligned):
    alpha = torch.cat([drawn_ellipse(64, 64, 90, 30, 20), drawn_ellipse(40, 90, 30, 30, 0)])
    ellipses = fit_ellipses(alpha, 4, 4, aligned=aligned)
    for clip, ellipse in zip(alpha, ellipses, strict=True):
        shape = torch.nn.functional.avg_pool2d(clip[0], 4)[0] > 0.2
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        cx, cy, long, short, angle = ellipse[0]
        turn = torch.deg2rad(angle)
        u, v = (
            (x - cx) * turn.cos() + (y - cy) * turn.sin(),
            (y - cy) * turn.cos() - (x - cx) * turn.sin(),
        )
        inside = (2 * u / long) ** 2 + (2 * v / short) ** 2 <= 1 + 1e-6
        assert (inside & shape).sum() >= 0.98 * shape.sum()


def test_faint_alpha_counts_from_the_threshold_on():
    alpha = 0.3 * drawn_ellipse(64, 64, 60, 60, 0)
    assert fit_ellipses(alpha, 4, 4, threshold=0.1)[0, 0, 2] > 10
    assert fit_ellipses(alpha, 4, 4, threshold=0.75).abs().max() == 0  # the released training's


def test_guide_of_an_empty_frame_is_zero_and_of_others_reaches_from_0_to_1():
    alpha = torch.zeros(1, 1, 5, 64, 64)
    alpha[:, :, 1:, 20:40, 10:30] = 1
    guide = gaussian(fit_ellipses(alpha, 4, 4), 16, 16)
    assert guide.shape == (1, 1, 2, 16, 16)
    assert guide[:, :, 0].abs().max() == 0
    assert guide[:, :, 1].amin() == 0
    assert guide[:, :, 1].amax() == 1


def test_batched_fits_are_single_ones():
    alpha = torch.cat([drawn_ellipse(50, 60, 80, 30, a) for a in (0, 40)])
    assert_close(fit_ellipses(alpha, 4, 4)[1:], fit_ellipses(alpha[1:], 4, 4))


def test_unknown_raster():
    with pytest.raises(ValueError, match="raster 'cv'; known: exact, opencv"):
        fit_ellipses(torch.zeros(1, 1, 1, 8, 8), 4, 4, raster="cv")


def test_outlines_are_the_ellipses_in_shares_of_the_picture():
    ellipses = torch.tensor(
        [[3.5, 1.5, 4.0, 2.0, 90.0], [1.5, 1.5, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
    )
    points = outlines(ellipses, 4, 8, 9)
    assert points.shape == (9, 64, 2)
    assert_close(points[0].mean(0), torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert_close(
        points[0].amax(0) - points[0].amin(0), torch.tensor([2 / 8, 4 / 4], dtype=torch.float64)
    )
    # cell 0 sees frame 0 only
    assert (points[1:5] == points[1]).all() and not (points[0] == points[1]).all()
    assert points[5:].isnan().all()  # nothing is covered
