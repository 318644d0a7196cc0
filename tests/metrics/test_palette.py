import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from acetate.alpha import frames, over
from acetate.metrics import published
from acetate.metrics.palette import COLORS, NAMES, PaletteQuality
from acetate.metrics.published import PublishedComposites, composite
from acetate.metrics.rgb import frame_psnr, frame_ssim
from tests.metrics.drawn import disc, figures, painted, plain


@pytest.fixture(scope="module")
def pair():
    alpha = disc(2)
    rgb, noise = painted(alpha), torch.Generator().manual_seed(0)
    rgb_hat = (rgb + 0.1 * torch.randn(rgb.shape, generator=noise)).clamp(-1, 1)
    return rgb_hat, disc(2, shift=0.5), rgb, alpha


def test_each_color_is_its_composite(pair):
    rgb_hat, alpha_hat, rgb, alpha = pair
    found = figures(PaletteQuality(), *pair)
    for name, color in zip(NAMES, COLORS, strict=True):
        ground = (color * 2 - 1)[:, None, None, None]
        x_hat, x = (
            frames(over(*layers, ground)) / 2 + 0.5
            for layers in ((rgb_hat, alpha_hat), (rgb, alpha))
        )
        assert found[f"psnr_{name}"] == pytest.approx(float(frame_psnr(x_hat, x).mean()), rel=1e-5)
        assert found[f"ssim_{name}"] == pytest.approx(float(frame_ssim(x_hat, x).mean()), rel=1e-5)
    for kind in ("psnr", "ssim"):
        assert found[kind] == pytest.approx(sum(found[f"{kind}_{name}"] for name in NAMES) / 9)


def test_known_errors():
    alpha = torch.full((1, 1, 2, 16, 16), 0.5)
    rgb = plain(alpha, [1.0, 1.0, 1.0])
    found = figures(PaletteQuality(), plain(alpha, [0.8, 0.8, 0.8]), alpha, rgb, alpha)
    assert found["premultiplied_mad"] == pytest.approx(100, rel=1e-5)  # 0.5 * 0.2
    assert [found[f"psnr_{name}"] for name in NAMES] == pytest.approx([20] * 9, rel=1e-5)
    assert found["alpha_psnr"] == 100 and found["alpha_ssim"] == pytest.approx(1)
    # of alpha that is 0.1 off white is blind, black is not
    found = figures(PaletteQuality(), rgb, alpha + 0.1, rgb, alpha)
    assert found["psnr_white"] == 100 and found["psnr_key"] == pytest.approx(20, rel=1e-4)
    assert found["alpha_psnr"] == pytest.approx(20, rel=1e-4)


def test_pieces_and_batches_are_one(pair):
    whole, pieces, batch = PaletteQuality(), PaletteQuality(), PaletteQuality()
    whole.update(*pair)
    for t in range(2):
        pieces.update(*(video[:, :, t : t + 1] for video in pair))
    batch.update(*(frames(video)[:, :, None] for video in pair))
    assert_close(pieces.compute(), whole.compute())
    assert_close(batch.compute(), whole.compute())


def test_the_published_composite_cuts_off_what_8_bits_do_not_hold():
    picture = np.full((16, 16, 4), 128, np.uint8)
    # 255 (128/255)^2 = 64.25, and 127 more over white
    assert composite(picture, COLORS[0].numpy())[0, 0].tolist() == [64] * 3
    assert composite(picture, COLORS[7].numpy())[0, 0].tolist() == [191] * 3
    picture[..., 3] = 127  # 63.75, which would be rounded to 64
    assert composite(picture, COLORS[0].numpy())[0, 0].tolist() == [63] * 3


def test_published_figures_by_hand():
    alpha = torch.full((1, 1, 1, 16, 16), 1.0)
    grey, darker = (plain(alpha, [level / 255] * 3) for level in (128, 118))
    found = figures(PublishedComposites(), darker, alpha, grey, alpha)
    # flat fields survive JPEG; brightness alone tells them apart
    assert found["alphavae_psnr"] == pytest.approx(-10 * math.log10((10 / 255) ** 2 + 1e-8))
    light = (2 * 128 * 118 + 2.55**2) / (128**2 + 118**2 + 2.55**2)
    assert found["alphavae_ssim_red"] == pytest.approx(light, rel=1e-6)
    same = figures(PublishedComposites(), grey, alpha, grey, alpha)
    assert same["alphavae_psnr"] == pytest.approx(80) and same["alphavae_ssim"] == 1


@pytest.mark.filterwarnings("ignore:.*deprecated since 0.13.*")
def test_published_lpips_is_of_composites_after_jpeg(pair, monkeypatch):
    """lpips itself, on a trunk without its weights."""
    import lpips

    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    monkeypatch.setattr(published, "frozen_lpips", lambda net: network if net == "alex" else None)
    found = figures(PublishedComposites(lpips=True), *pair)
    pictures = (published.eight_bits(*pair[:2])[0], published.eight_bits(*pair[2:])[0])
    red = [
        torch.tensor(composite(one, COLORS[4].numpy())).permute(2, 0, 1)[None] / 127.5 - 1
        for one in pictures
    ]
    first = PublishedComposites(lpips=True)
    first.update(*(part[:1, :, :1] for part in pair))
    by_hand = float(network(*red))
    assert by_hand > 0
    assert float(first.compute()["alphavae_lpips_red"]) == pytest.approx(by_hand, rel=1e-5)
    assert found["alphavae_lpips"] > 0
    same = figures(PublishedComposites(lpips=True), *pair[2:], *pair[2:])
    assert same["alphavae_lpips"] == 0


def test_published_figures_stand_beside_the_exact_ones(pair):
    exact, cut = figures(PaletteQuality(), *pair), figures(PublishedComposites(), *pair)
    assert {name.removeprefix("alphavae_") for name in cut} <= exact.keys()
    assert cut["alphavae_psnr"] == pytest.approx(exact["psnr"], abs=4)
    assert cut["alphavae_psnr"] != pytest.approx(exact["psnr"], abs=0.01)
