import io

import numpy as np
import pytest
from PIL import Image

from acetate.data import synthetic
from acetate.data.shards import Clip
from data_prep.scores import (
    SCORES,
    colors,
    colors_apart,
    look,
    over_time,
    repeats,
    score,
    semi,
    sharpness,
)
from data_prep.synthesize import stored


def solid(frames=5, height=16, width=16, rgba=(255, 0, 0, 255)):
    return np.broadcast_to(np.array(rgba, np.uint8), (frames, height, width, 4)).copy()


def test_every_score_of_a_still_subject():
    frames = solid(5, 16, 24)
    frames[:, :, 12:, 3] = 0
    values, _, _ = score(Clip(frames, "", 16))
    assert values.keys() == SCORES.keys()
    assert (values["frames"], values["short_side"], values["long_side"], values["coverage"]) == (
        5,
        16,
        24,
        0.5,
    )
    # columns of cells: opaque, cut through the middle, empty
    assert values["semi"] == pytest.approx(1 / 3, abs=1e-6)
    assert values["motion"] == values["flicker"] == 0


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 5, 3), (6, 9, 17)])
def test_semi_of_any_size(frames, height, width):
    alpha = np.full((frames, height, width), 255, np.uint8)
    assert semi(alpha) == 0
    assert semi(alpha // 2) == 1


def test_motion_by_hand():
    frames = solid(3)
    frames[1:, ..., 0] = 204  # one of four channels falls by a fifth, once in two steps
    assert over_time(frames) == (pytest.approx(0.2 / 4 / 2), 0)
    frames[..., 3] = 0  # what alpha hides does not move
    assert over_time(frames) == (0, 0)


def test_flicker_goes_and_comes_back():
    frames = solid(4)
    frames[[1, 3], ..., 3] = 204
    assert over_time(frames)[1] == pytest.approx(0.2)
    fading = solid(4)
    fading[..., 3] = np.array([255, 204, 153, 102])[:, None, None]
    assert over_time(fading)[1] == 0


def test_sharpness_falls_with_blur():
    rng = np.random.default_rng(0)
    noise = solid(1, 64, 64)[0]
    noise[..., :3] = rng.integers(0, 256, (64, 64, 1))
    soft = np.asarray(
        Image.fromarray(noise).resize((16, 16), Image.Resampling.BOX).resize((64, 64))
    )
    assert sharpness(noise) > 2 * sharpness(soft) > 0
    assert sharpness(solid(1)[0]) == sharpness(solid(1, rgba=(9, 9, 9, 0))[0]) == 0


def clip_of(kind, seed, side):
    return stored(synthetic.render(kind, seed, 1, side, side))[0]


def test_looks_of_one_subject_are_near_and_of_others_far():
    others = [clip_of(kind, seed, 96) for kind in ("hair", "flame", "shape") for seed in (2, 3)]
    frames = [clip_of("shape", 1, 128), *others, clip_of("shape", 1, 96)]
    found = repeats([*map(look, frames)], [*map(colors, frames)], distance=8, color=32)
    assert found[:-1] == [None] * 7 and found[-1] is not None and found[-1][0] == 0


def test_repeats_agrees_with_comparing_all():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (6, 128))
    bits = np.concatenate([bits, bits, bits])
    for row in bits[6:]:
        row[rng.choice(128, rng.integers(0, 12), replace=False)] ^= 1
    kept, wanted = [], []
    for i, row in enumerate(bits):
        apart = [(int((bits[j] != row).sum()), j) for j in kept]
        near = min(apart, default=(129, 0))
        wanted.append((near[1], near[0]) if near[0] <= 6 else None)
        if near[0] > 6:
            kept.append(i)
    looks = [np.packbits(row).tobytes().hex() for row in bits.astype(np.uint8)]
    alike = [colors(solid(1)[0])] * len(looks)
    assert repeats(looks, alike, 6, 0) == wanted and 6 <= sum(map(bool, wanted)) <= 12
    assert repeats([], [], 6, 0) == []


def ball(rgb, side=48):
    y, x = np.mgrid[:side, :side] / side - 0.5
    light = np.clip(1 - 2 * np.hypot(x + 0.1, y + 0.1), 0, 1)[..., None]
    alpha = 255 * np.clip((0.3 - np.hypot(x, y)) * side / 3 + 0.5, 0, 1)[..., None]
    return np.concatenate((light * rgb, alpha), axis=-1).astype(np.uint8)


def test_another_color_is_no_repeat_and_another_encoding_is():
    orange, blue = ball((250, 140, 30)), ball((60, 150, 250))
    small = np.asarray(Image.fromarray(orange).resize((36, 36), Image.Resampling.LANCZOS))
    file = io.BytesIO()
    Image.fromarray(orange).save(file, "WEBP", quality=40, alpha_quality=70)
    lossy = np.asarray(Image.open(file).convert("RGBA"))
    frames = [orange, blue, small, lossy]
    looks, shades = [*map(look, frames)], [*map(colors, frames)]
    assert repeats(looks, shades, 8, 255)[1] is not None  # brightness alone takes them for one
    found = repeats(looks, shades, 8, 32)
    assert found[:2] == [None, None] and [match and match[0] for match in found[2:]] == [0, 0]


def test_colors_of_what_is_seen_whatever_its_size():
    frame = np.zeros((8, 8, 4), np.uint8)
    frame[0, 0] = (200, 0, 0, 255)
    frame[7, 7] = (0, 0, 100, 255)
    assert colors(frame) == [
        [100, 0, 50, 255], [200, 0, 0, 128], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 100, 128],
    ]  # fmt: skip
    assert colors(np.zeros((1, 1, 4), np.uint8)) == [[0, 0, 0, 0]] * 5
    turned = np.array([colors(frame[::-1, ::-1])])
    # the whole is the same, the places not
    assert colors_apart(np.array(colors(frame)), turned).tolist() == [200]
