import pytest
import torch
from torch.testing import assert_close

from acetate.data.transforms import (
    ClipTransform,
    check_frames,
    crop,
    pack,
    pan,
    resize,
    to_float,
    unpack,
    window,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(frames, height, width):
    return torch.randint(
        0, 256, (frames, height, width, 4), generator=generator(), dtype=torch.uint8
    )


def gradient(frames, height, width):
    """Red is the column, green the row, blue the frame; opaque."""
    clip = torch.full((frames, height, width, 4), 255, dtype=torch.uint8)
    clip[..., 0] = torch.arange(width)
    clip[..., 1] = torch.arange(height)[:, None]
    clip[..., 2] = torch.arange(frames)[:, None, None]
    return clip


def transform(train=True, **settings):
    defaults = {
        "frames": 5, "height": 16, "width": 16, "time_stride": 4, "space_multiple": 16,
        "scale_range": (0.5, 1.0),
        "min_coverage": 0.0, "flip": 0.0, "pan_speed": 2.0,
    }  # fmt: skip
    return ClipTransform(**(defaults | settings), train=train)


def test_window_plays_forth_and_back():
    assert window(10, 5, 3).tolist() == [3, 4, 5, 6, 7]
    assert window(3, 9, 0).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert window(3, 5, 3).tolist() == [1, 0, 1, 2, 1]
    assert window(2, 5, 0).tolist() == [0, 1, 0, 1, 0]
    assert window(1, 5, 0).tolist() == [0] * 5


def test_frames_of_the_wrong_length():
    with pytest.raises(
        ValueError, match=r"clip: 16 frames; Wan needs 4k\+1 \(5, 9, 13, \.\.\.\)\. Use frames=13\."
    ):
        transform(frames=16)
    with pytest.raises(ValueError, match=r"Use frames=1\."):
        check_frames("clip", 0, 4)
    check_frames("clip", 1, 4)
    check_frames("clip", 3, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 24}, r"height=24; sides are multiples of 16\. Use height=32\."),
        ({"width": 0}, r"width=0; sides are multiples of 16\. Use width=16\."),
        ({"scale_range": (0.0, 1.0)}, r"scale_range=\(0\.0, 1\.0\); needs 0 < low <= high <= 1"),
        ({"scale_range": (0.5, 1.5)}, "scale_range"),
        ({"min_coverage": 2.0}, r"min_coverage=2\.0; must be in \[0, 1\]"),
        ({"flip": -0.1}, r"flip=-0\.1; must be in \[0, 1\]"),
        ({"pan_speed": -1.0}, r"pan_speed=-1\.0; pixels a frame"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        transform(**settings)


def test_ranges_and_hidden_color():
    frames = noise(2, 4, 4)
    frames[0, 0, 0] = torch.tensor([255, 0, 255, 0])
    frames[0, 0, 1] = torch.tensor([255, 0, 51, 255])
    rgb, alpha = to_float(frames)
    assert rgb.shape == (3, 2, 4, 4) and alpha.shape == (1, 2, 4, 4)
    assert rgb[:, 0, 0, 0].tolist() == [-1, -1, -1] and alpha[0, 0, 0, 0] == 0
    assert_close(rgb[:, 0, 0, 1], torch.tensor([1, -1, -0.6])) and alpha[0, 0, 0, 1] == 1


def test_pack_round_trip():
    rgb, alpha = to_float(noise(3, 8, 8))
    back_rgb, back_alpha = unpack(pack(rgb, alpha))
    assert_close(back_alpha, alpha)
    assert_close(back_rgb, rgb, atol=1e-4, rtol=0)


def test_resize_does_not_bleed_hidden_color():
    """A white shape whose surroundings hide black: straight averages would turn the edge to grey
    (A20)."""
    frames = torch.zeros(1, 64, 64, 4, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    soft = (24 - torch.hypot(x - 31.5, y - 31.5)).mul(40).clamp(0, 255).byte()
    frames[0, ..., 3] = soft
    frames[0, ..., :3] = torch.where(soft > 0, 255, 0)[..., None]
    for size in (32, 23, 7):
        rgb, alpha = resize(*to_float(frames), size, size)
        assert ((alpha > 0) & (alpha < 1)).any()
        assert_close(
            rgb[(alpha > 0).expand_as(rgb)],
            torch.ones(int((alpha > 0).sum()) * 3),
            atol=2e-3,
            rtol=0,
        )


@pytest.mark.parametrize("size", [(8, 8), (21, 13), (50, 70)])
def test_resize_keeps_exact_alpha(size):
    frames = noise(2, 40, 40)
    for value, expected in ((255, 1.0), (0, 0.0)):
        frames[..., 3] = value
        rgb, alpha = resize(*to_float(frames), *size)
        assert alpha.shape[-2:] == size and (alpha == expected).all()
        assert rgb.min() >= -1 and rgb.max() <= 1
    assert (rgb == -1).all()


def test_resize_of_opaque_equals_plain_resize():
    rgb, alpha = to_float(gradient(2, 40, 40))
    small, _ = resize(rgb, alpha, 20, 20)
    plain = torch.nn.functional.interpolate(rgb, size=(20, 20), mode="bilinear", antialias=True)
    assert_close(small, plain, atol=1e-5, rtol=0)


def test_crop_pads_with_transparency():
    frames = gradient(2, 4, 6)
    assert torch.equal(crop(frames, 1, 2, 3, 3), frames[:, 1:4, 2:5])
    padded = crop(frames, -2, -1, 8, 9)
    assert padded.shape == (2, 8, 9, 4)
    assert torch.equal(padded[:, 2:6, 1:7], frames)
    assert padded.sum() == frames.sum()
    assert (crop(frames, 10, 10, 3, 3) == 0).all() and crop(frames, 10, 10, 3, 3).shape == (
        2,
        3,
        3,
        4,
    )


def test_pan_by_whole_pixels_is_a_crop():
    rgb, alpha = to_float(noise(1, 20, 20))
    moved_rgb, moved_alpha = pan(
        rgb, alpha, torch.tensor([3.0, 9.0]), torch.tensor([2.0, -1.0]), 3, 8, 8
    )
    for t in range(3):
        place = (..., slice(3 + 2 * t, 11 + 2 * t), slice(9 - t, 17 - t))
        assert_close(moved_alpha[:, t], alpha[:, 0][place], atol=1e-5, rtol=0)
        seen = (alpha[:, 0][place] > 0.02).expand(3, 8, 8)
        assert_close(moved_rgb[:, t][seen], rgb[:, 0][place][seen], atol=2e-3, rtol=0)


def test_pan_by_half_a_pixel_stays_opaque_inside():
    rgb, alpha = to_float(gradient(1, 20, 20))
    moved_rgb, moved_alpha = pan(
        rgb, alpha, torch.tensor([4.0, 4.0]), torch.tensor([0.5, 0.25]), 5, 8, 8
    )
    assert (moved_alpha == 1).all()
    steps = (moved_rgb.diff(dim=1) + 1e-9) * 127.5
    assert_close(steps[0], torch.full_like(steps[0], 0.25), atol=1e-3, rtol=0)
    assert_close(steps[1], torch.full_like(steps[1], 0.5), atol=1e-3, rtol=0)


def motion(seed, **settings):
    """Mean (y, x) motion in pixels a frame of a gradient under the window."""
    rgb, _ = transform(**settings)(gradient(1, 60, 60), generator(seed))
    steps = rgb.diff(dim=1).mean(dim=(1, 2, 3)) * 127.5
    return steps[1].item(), steps[0].item()


def test_pans_favour_no_direction():
    """A19: floor division used to give -1 px one way and 0 the other."""
    moves = torch.tensor([motion(seed, scale_range=(0.5, 0.5)) for seed in range(400)])
    assert (moves.abs() > 0.02).any(dim=1).float().mean() > 0.9
    assert moves.norm(dim=1).max() < 2 * 2.01  # 2 source pixels each at a scale of about 2
    share = (moves > 0).float().mean(dim=0)
    assert (share - 0.5).abs().max() < 0.08  # 3 standard deviations of 400 throws
    assert moves.mean(dim=0).abs().max() < 0.2
    assert torch.tensor([motion(3), motion(3)]).diff(dim=0).abs().max() == 0


def test_pan_stops_where_the_still_ends():
    rgb, alpha = transform(scale_range=(1.0, 1.0), pan_speed=50.0)(gradient(1, 16, 40), generator())
    assert (alpha == 1).all()
    assert rgb.diff(dim=1)[1].abs().max() < 1e-4  # no room up or down
    _, still = transform(pan_speed=50.0)(gradient(1, 16, 16), generator())
    assert (still == 1).all()


def test_still_without_time():
    rgb, alpha = transform(frames=1)(gradient(1, 40, 40), generator())
    assert rgb.shape == (3, 1, 16, 16) and alpha.shape == (1, 1, 16, 16)
    rgb, _ = transform(frames=1)(gradient(9, 40, 40), generator())
    assert rgb.shape == (3, 1, 16, 16)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "shape", [(9, 40, 64), (2, 16, 16), (1, 100, 30), (7, 10, 90), (3, 3, 3), (1, 5, 300)]
)
def test_every_size_and_length_fits(train, shape):
    for seed in range(5):
        rgb, alpha = transform(train, flip=0.5)(noise(*shape), generator(seed))
        assert rgb.shape == (3, 5, 16, 16) and alpha.shape == (1, 5, 16, 16)
        assert rgb.isfinite().all() and rgb.min() >= -1 and rgb.max() <= 1
        assert alpha.min() >= 0 and alpha.max() <= 1
        assert (rgb[(alpha == 0).expand_as(rgb)] == -1).all()


def test_same_generator_same_clip():
    frames = noise(9, 40, 50)
    first, again, other = (transform(flip=0.5)(frames, generator(seed)) for seed in (4, 4, 5))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_color_and_alpha_take_the_same_crop_and_flip():
    frames = gradient(9, 40, 50)
    frames[..., 1] = frames[..., 0]
    frames[..., 3] = frames[..., 0] + 100  # alpha and colour know their column
    flipped = 0
    for seed in range(20):
        rgb, alpha = transform(flip=0.5, scale_range=(0.4, 1.0))(frames, generator(seed))
        column = (rgb[0] + 1) * 127.5
        assert_close(alpha[0] * 255 - 100, column, atol=0.5, rtol=0)
        assert_close((rgb[1] + 1) * 127.5, column, atol=1e-3, rtol=0)
        frame = (rgb[2, :, 0, 0] + 1) * 127.5
        assert_close(frame.diff(), torch.ones(4), atol=0.1, rtol=0)
        assert (column.diff(dim=0).abs() < 1e-3).all()  # one crop for all frames
        flipped += bool(column[0, 0, 0] > column[0, 0, -1])
    assert 3 <= flipped <= 17


def test_validation_takes_the_centre():
    rgb, alpha = transform(train=False, flip=1.0)(gradient(9, 48, 64), generator())
    assert (alpha == 1).all()
    centre = ((rgb + 1) * 127.5).mean(dim=(2, 3))
    assert_close(centre[0], torch.full((5,), 31.5), atol=0.01, rtol=0)
    assert_close(centre[1], torch.full((5,), 23.5), atol=0.01, rtol=0)
    assert_close(centre[2], torch.arange(2.0, 7.0), atol=0.01, rtol=0)
    column = (rgb[0, 0, 0] + 1) * 127.5
    # 48 source pixels on 16, not mirrored
    assert_close(column.diff()[1:-1], torch.full((13,), 3.0))


def test_train_scales_lie_in_the_range():
    widths = set()
    for seed in range(40):
        rgb, _ = transform(scale_range=(0.5, 1.0))(gradient(5, 64, 64), generator(seed))
        widths.add(round(((rgb[0, 0, 0, 15] - rgb[0, 0, 0, 0]) * 127.5 * 16 / 15).item()))
    assert min(widths) in range(31, 36) and max(widths) in range(58, 65) and len(widths) > 10


def test_small_clips_keep_their_size_and_aspect():
    frames = gradient(5, 6, 10)
    for train in (True, False):
        rgb, alpha = transform(train)(frames, generator())
        assert alpha.sum() == 5 * 6 * 10 and ((alpha == 0) | (alpha == 1)).all()
        rows, columns = alpha[0, 0].nonzero().T
        box = (..., slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        assert_close(
            (rgb[box] + 1) * 127.5, frames[..., :3].permute(3, 0, 1, 2).float(), atol=1e-3, rtol=0
        )
    assert (rows.min(), columns.min()) == (5, 3)  # centred in validation


def test_crops_look_for_the_subject():
    frames = torch.zeros(5, 160, 160, 4, dtype=torch.uint8)
    frames[:, 100:150, 100:150] = 255
    settings = {"scale_range": (0.15, 0.25)}
    shown = [
        sum(
            transform(min_coverage=least, **settings)(frames, generator(seed))[1].mean() > 0.02
            for seed in range(60)
        )
        for least in (0.0, 0.05)
    ]
    assert shown[0] < 30 and shown[1] > 45


def test_frames_are_not_changed():
    frames = noise(5, 20, 20)
    before = frames.clone()
    transform()(frames, generator())
    assert torch.equal(frames, before)
