"""What a renderer shows over a background, in linear light, against `over` on encoded colour."""

import numpy as np
import torch

from acetate.alpha import over
from acetate.media.color import encode_srgb
from data_prep.light import straight

STEP = 1 / 255


def rendered(count=4000, seed=0):
    """Grey to saturated surfaces of any coverage, some of them brighter than white."""
    rng = np.random.default_rng(seed)
    cover = rng.uniform(0, 1, (count, 1))
    color = rng.uniform(0, 1, (count, 3)) ** 2
    color[::10] *= 4
    return np.concatenate((color * cover, cover), 1).astype(np.float32)


def shown(picture, background):
    """The stored clip over a grey, by the house's own algebra; in [0, 1]."""
    unit = torch.from_numpy(picture.astype(np.float32) / 255)
    rgb = over(unit[:, :3] * 2 - 1, unit[:, 3:], torch.tensor(2.0 * background - 1))
    return ((rgb + 1) / 2).numpy()


def seen(light, background):
    """The same by the renderer: layers in linear light, then encoded."""
    return encode_srgb((light[:, :3] + (1 - light[:, 3:]) * background).clip(0, 1))


def test_over_black_the_clip_is_the_render():
    light = rendered()
    assert np.abs(shown(straight(light), 0.0) - seen(light, 0.0)).max() <= STEP


def test_over_white_grey_layers_are_the_render():
    light = rendered()
    light[:, :3] = light[:, :1].clip(max=light[:, 3:])
    assert np.abs(shown(straight(light), 1.0) - seen(light, 1.0)).max() <= STEP


def test_both_backgrounds_together_are_nearer_than_with_coverage_as_alpha():
    light = rendered()
    light[:, :3] = light[:, :3].clip(max=light[:, 3:])
    cover = light[:, 3:]
    color = encode_srgb(light[:, :3] / cover)
    ours = usual = 0.0
    for grey in (0.0, 1.0):
        ours += np.abs(shown(straight(light), grey) - seen(light, grey)).mean()
        usual += np.abs(color * cover + (1 - cover) * grey - seen(light, grey)).mean()
    assert ours < 0.6 * usual


def test_light_without_coverage_becomes_its_thinnest_layer():
    light = np.array([[0.5, 0.1, 0.0, 0], [3, 3, 3, 0], [0, 0, 0, 0]], np.float32)
    found = straight(light)
    brightest = np.rint(255 * encode_srgb(light[:, :3].clip(0, 1)).max(1))
    assert found[:, 3].tolist() == brightest.tolist()
    assert found[:2, 0].min() >= 254 and not found[2].any()
    assert np.abs(shown(found, 0.0) - seen(light, 0.0)).max() <= STEP


def test_numbers_by_hand():
    light = np.array([[0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0.5], [0.2, 0.4, 0.6, 1]], np.float32)
    white, black, opaque = straight(light).tolist()
    assert white == [254, 254, 254, 188] and black == [0, 0, 0, 67]  # 187.5 / 188
    assert opaque[3] == 255 and opaque[:3] == [124, 170, 203]


def test_what_a_denoiser_overshoots_is_clamped():
    light = np.array([[-0.01, 0.2, 0.1, 1.2], [0.1, 0.1, 0.1, -0.1]], np.float32)
    assert straight(light)[0, 3] == 255 and straight(light)[0, 0] == 0
    assert straight(light)[1, 3] == np.rint(255 * encode_srgb(np.float32([0.1]))[0])
