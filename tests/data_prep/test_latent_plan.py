import pytest
import torch

from acetate.data.shards import ClipRef
from acetate.data.transforms import covering_box, resize, to_float
from data_prep.latent_plan import Piece, bucket_sizes, cut, plan, window_starts


def ref(frames, height, width, key="clip"):
    return ClipRef(
        key=key,
        split="train",
        crc32=0,
        tar=None,
        kind="rgba.mkv",
        frames=frames,
        width=width,
        height=height,
    )


def test_buckets_are_all_maximal_sizes():
    sizes = bucket_sizes(area=16 * 64, max_aspect=4, multiple=8)
    # 48 x 16 could grow to 64 x 16
    assert sizes == [(16, 64), (24, 40), (32, 32), (40, 24), (64, 16)]
    assert bucket_sizes(16 * 64, 2, 8) == [(24, 40), (32, 32), (40, 24)]
    with pytest.raises(
        ValueError, match=r"area=60, max_aspect=2: no bucket in multiples of 8\. Raise area to 64"
    ):
        bucket_sizes(60, 2, 8)


def test_published_area_has_buckets_of_whole_patches():
    sizes = bucket_sizes(399360, 2.0, 16)
    assert (480, 832) in sizes and (640, 624) in sizes
    assert all(h % 16 == 0 and w % 16 == 0 and 0.9 * 399360 < h * w <= 399360 for h, w in sizes)


@pytest.mark.parametrize(
    ("count", "length", "starts"),
    [
        (9, 9, [0]), (10, 9, [0]), (12, 9, [1]), (18, 9, [0, 9]), (22, 9, [1, 12]),
        (33, 9, [1, 12, 23]),
        (5, 9, [0]), (1, 9, [0]),
    ],
)  # fmt: skip
def test_windows_are_whole_apart_and_even(count, length, starts):
    assert window_starts(count, length) == starts


def test_plan_takes_nearest_aspect_and_longest_length():
    sizes = [(32, 32), (24, 40), (40, 24)]
    pieces = plan(
        [ref(20, 90, 160, "a"), ref(8, 50, 48, "b"), ref(3, 160, 90, "c")],
        (5, 9),
        sizes,
        variants=2,
    )
    assert [(p.key, p.bucket, p.start) for p in pieces] == [
        ("a-w000-v0", "9x24x40", 0), ("a-w000-v1", "9x24x40", 0),
        ("a-w001-v0", "9x24x40", 10), ("a-w001-v1", "9x24x40", 10),
        ("b-w000-v0", "5x32x32", 1), ("b-w000-v1", "5x32x32", 1),
        ("c-w000-v0", "5x40x24", 0), ("c-w000-v1", "5x40x24", 0),
    ]  # fmt: skip
    # 16 x 16 and 32 x 32 are equally near
    assert plan([ref(5, 20, 20)], (5,), [(16, 16), (32, 32)], 1)[0].bucket == "5x32x32"


def test_long_keys_stay_apart():
    keys = {Piece(ref(5, 8, 8, "k" * 78 + end), 0, 0, 5, 8, 8, 0).key for end in ("aa", "ab")}
    assert len(keys) == 2 and all(len(key) == 80 and key.endswith("-w000-v0") for key in keys)


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (7, 9), (64, 48), (16, 24)])
def test_box_covers_with_the_target_aspect(size):
    top, left, height, width = covering_box(*size, 16, 24)
    assert 0 <= top <= size[0] - height and 0 <= left <= size[1] - width
    assert height == size[0] or width == size[1]
    assert abs(height * 24 / 16 - width) <= 1.25


def test_frames_are_resampled_once():
    frames = torch.randint(0, 256, (3, 40, 30, 4), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    piece = Piece(ref(3, 40, 30), 0, 0, 5, 16, 16, 0)
    rgb, alpha = cut(frames, piece)
    forth_and_back = frames[[0, 1, 2, 1, 0]][:, 5:35]
    wanted = resize(*to_float(forth_and_back), 16, 16)
    torch.testing.assert_close((rgb[0], alpha[0]), wanted)
    same = frames[:, 12:28, 7:23]
    # of the bucket's size: not resampled at all
    rgb, alpha = cut(same, Piece(ref(3, 16, 16), 0, 0, 3, 16, 16, 0))
    assert torch.equal(rgb[0], to_float(same)[0]) and torch.equal(alpha[0], to_float(same)[1])
    # enlarged
    assert cut(frames, Piece(ref(3, 40, 30), 0, 0, 1, 80, 64, 0))[0].shape == (1, 3, 1, 80, 64)
