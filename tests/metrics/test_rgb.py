import urllib.error
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchmetrics.functional.image import structural_similarity_index_measure

from acetate.alpha import PALETTE, over
from acetate.metrics import rgb as module
from acetate.metrics.rgb import CompositeQuality, RGBQuality, frame_ssim, frames
from tests.metrics.drawn import check_unequal_shares


def clips(batch: int, seed: int, size: int = 16) -> tuple[torch.Tensor, ...]:
    """rgb_hat, alpha_hat, rgb, alpha of `batch` noisy clips of 3 frames."""
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, 3, 3, size, size, generator=generator) * 2 - 1
    alpha = torch.rand(batch, 1, 3, size, size, generator=generator)
    noise = torch.randn(batch, 4, 3, size, size, generator=generator)
    return rgb + 0.1 * noise[:, :3], alpha + 0.1 * noise[:, 3:], rgb, alpha


def test_frames_keeps_frames_of_a_clip_together():
    video = torch.arange(2 * 3 * 4).view(2, 3, 4, 1, 1).expand(2, 3, 4, 5, 6)
    assert_close(frames(video)[5], video[1, :, 1])


def test_identity_reaches_the_cap():
    _, _, rgb, alpha = clips(2, 0)
    quality = CompositeQuality(lpips=False)
    quality.update(rgb, alpha, rgb, alpha)
    assert_close(quality.compute(), {"psnr": torch.tensor(100.0), "ssim": torch.tensor(1.0)})


def test_psnr_of_a_known_error():
    rgb = torch.zeros(1, 3, 1, 16, 16)
    quality = RGBQuality()
    quality.update(rgb + 0.2, rgb)  # 0.1 of the range: 20 dB
    assert_close(quality.compute()["psnr"], torch.tensor(20.0))


def test_mean_runs_over_frames_not_pixels():
    rgb = torch.zeros(1, 3, 2, 16, 16)
    error = torch.tensor([0.2, 0.02]).view(1, 1, 2, 1, 1)  # 20 and 40 dB
    quality = RGBQuality()
    quality.update(rgb + error, rgb)
    assert_close(quality.compute()["psnr"], torch.tensor(30.0))


def test_alpha_error_shows_on_every_color():
    grey, alpha = torch.zeros(1, 3, 1, 16, 16), torch.full((1, 1, 1, 16, 16), 0.5)
    quality = CompositeQuality(lpips=False)
    # grey is 1 away from each colour: 0.2 in [-1, 1]
    quality.update(grey, alpha + 0.2, grey, alpha)
    assert_close(quality.compute()["psnr"], torch.tensor(20.0))


def test_opaque_composites_are_the_rgb():
    rgb_hat, _, rgb, alpha = clips(1, 1)
    opaque = torch.ones_like(alpha)
    composite, plain = CompositeQuality(lpips=False), RGBQuality()
    composite.update(rgb_hat, opaque, rgb, opaque)
    plain.update(rgb_hat, rgb)
    assert_close(composite.compute(), plain.compute())


def test_color_under_empty_alpha_does_not_count():
    rgb_hat, _, rgb, alpha = clips(1, 2)
    empty = torch.zeros_like(alpha)
    quality = CompositeQuality(lpips=False)
    quality.update(rgb_hat, empty, rgb, empty)
    assert_close(quality.compute()["psnr"], torch.tensor(100.0))


def test_ssim_is_the_mean_over_all_eight_colors():
    rgb_hat, alpha_hat, rgb, alpha = clips(2, 9)
    quality = CompositeQuality(lpips=False)
    quality.update(rgb_hat, alpha_hat, rgb, alpha)
    rgb_hat, alpha_hat = rgb_hat.clamp(-1, 1), alpha_hat.clamp(0, 1)
    scores = []
    for color in PALETTE[:, :, None, None, None]:
        x_hat, x = (
            frames(over(*layers, color)) / 2 + 0.5
            for layers in ((rgb_hat, alpha_hat), (rgb, alpha))
        )
        scores.append(frame_ssim(x_hat, x).mean())
    assert_close(quality.compute()["ssim"], torch.stack(scores).mean())


def test_prediction_is_clamped_to_its_range_first():
    white, opaque = torch.ones(1, 3, 1, 16, 16), torch.ones(1, 1, 1, 16, 16)
    quality = CompositeQuality(lpips=False)
    quality.update(white + 3, opaque + 3, white, opaque)
    assert_close(quality.compute()["psnr"], torch.tensor(100.0))


def test_ssim_of_constant_frames():
    # No variance: (2ab + c1) / (a^2 + b^2 + c1), c1 = 1e-4.
    score = frame_ssim(torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25))
    assert_close(score, torch.tensor([(0.25 + 1e-4) / (0.3125 + 1e-4)]))


@pytest.mark.parametrize("count", [1, 40])
def test_ssim_is_the_standard_one_from_11_pixels(count: int):
    generator = torch.Generator().manual_seed(3)
    x_hat, x = torch.rand(2, count, 3, 11, 12, generator=generator)
    assert_close(
        frame_ssim(x_hat, x).mean(), structural_similarity_index_measure(x_hat, x, data_range=1.0)
    )


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 10])
def test_ssim_of_small_frames(side: int):
    x = torch.rand(4, 3, side, 20, generator=torch.Generator().manual_seed(4))
    assert_close(frame_ssim(x, x), torch.ones(4))
    assert (frame_ssim(1 - x, x) < 0.9).all()


@pytest.mark.parametrize("narrowed", [False, True])
def test_precision_of_the_surroundings_does_not_matter(narrowed: bool):
    batch = clips(1, 5)
    quality, expected = CompositeQuality(lpips=False), CompositeQuality(lpips=False)
    expected.update(*batch)
    if narrowed:
        nn.ModuleList([quality]).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quality.update(*batch)
    assert_close(quality.compute(), expected.compute(), rtol=0, atol=0)


def test_nan_is_not_hidden():
    rgb_hat, alpha_hat, rgb, alpha = clips(1, 6)
    rgb_hat[0, 0, 0, 0, 0] = torch.nan
    quality = CompositeQuality(lpips=False)
    quality.update(rgb_hat, alpha_hat, rgb, alpha)
    assert all(value.isnan() for value in quality.compute().values())


class MeanDifference(nn.Module):
    """Stands where LPIPS stands; 64 weights, all 1/64, so that what it says can be computed by
    hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((64,), 1 / 64))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3), keepdim=True) * self.weight.sum()


def test_lpips_network_is_outside_the_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "frozen_lpips", MeanDifference)
    quality = CompositeQuality(lpips=True)
    task = nn.ModuleDict({"quality": quality})
    assert not list(task.parameters())
    assert not task.state_dict()

    grey, alpha = torch.zeros(1, 3, 20, 16, 16), torch.full((1, 1, 20, 16, 16), 0.5)
    quality.update(grey, alpha + 0.2, grey, alpha)
    assert_close(quality.compute()["lpips"], torch.tensor(0.2))
    assert not quality.lpips.requires_grad


def test_lpips_refuses_frames_that_vgg_cannot_pool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "frozen_lpips", MeanDifference)
    with pytest.raises(ValueError, match=r"8x8 frames; VGG16 needs 16"):
        CompositeQuality(lpips=True).update(*clips(1, 7, size=8))


@pytest.mark.slow
def test_missing_vgg_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    place = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(
        FileNotFoundError, match=f"not at {place}, or damaged.*no route to host.*lpips=false"
    ):
        CompositeQuality(lpips=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated since 0.13.*")
def test_lpips_itself_on_a_random_trunk(monkeypatch: pytest.MonkeyPatch):
    import lpips

    torch.manual_seed(0)
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    monkeypatch.setattr(module, "frozen_lpips", lambda: network)
    rgb_hat, alpha_hat, rgb, alpha = clips(1, 8)
    same, noisy = CompositeQuality(lpips=True), CompositeQuality(lpips=True)
    same.update(rgb, alpha, rgb, alpha)
    noisy.update(rgb_hat, alpha_hat, rgb, alpha)
    assert_close(same.compute()["lpips"], torch.tensor(0.0))
    assert noisy.compute()["lpips"] > 0


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_two_ranks_with_unequal_shares_equal_one_process():
    check_unequal_shares(partial(CompositeQuality, lpips=False), clips)
