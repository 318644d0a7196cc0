import pytest
import torch
from torch import nn
from torch.testing import assert_close

from acetate.alpha import border_mean
from acetate.metrics.alpha import (
    AlphaQuality,
    cells_to_pixels,
    centre_of_mass,
    highest_cell,
)
from acetate.regions import cells
from tests.metrics.drawn import check_unequal_shares


def clips(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_hat and alpha, 5 frames of 16 x 16 with empty, mixed and opaque cells of 8 x 8."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(batch, 1, 5, 16, 16, generator=generator)
    alpha[..., :8, :8], alpha[..., 8:, 8:] = 0, 1
    return alpha + 0.1 * torch.randn(alpha.shape, generator=generator), alpha


def quality() -> AlphaQuality:
    return AlphaQuality(time_stride=4, space_stride=8)


def test_identity():
    metric, (_, alpha) = quality(), clips(2, 0)
    metric.update(alpha, alpha)
    scores = metric.compute()
    assert_close(scores["psnr"], torch.tensor(100.0))
    assert_close(scores["ssim"], torch.tensor(1.0))
    for name in ("mae", "mae_empty", "mae_mixed", "mae_opaque"):
        assert scores[name] == 0


def test_known_errors_by_region():
    alpha = torch.full((1, 1, 1, 16, 16), 0.5)
    alpha[..., :8, :8], alpha[..., 8:, 8:] = 0, 1
    error = torch.full_like(alpha, 0.1)  # the two mixed quarters
    error[..., :8, :8], error[..., 8:, 8:] = 0.2, -0.4
    metric = quality()
    metric.update(alpha + error, alpha)
    scores = metric.compute()
    assert_close(scores["mae_empty"], torch.tensor(0.2))
    assert_close(scores["mae_mixed"], torch.tensor(0.1))
    assert_close(scores["mae_opaque"], torch.tensor(0.4))
    assert_close(scores["mae"], torch.tensor((0.2 + 2 * 0.1 + 0.4) / 4))
    mse = torch.tensor((0.04 + 2 * 0.01 + 0.16) / 4)
    assert_close(scores["psnr"], -10 * mse.log10())
    # The mean is 0.5: half of the pixels are there, the others 0.5 away.
    assert_close(scores["mae_of_mean"], torch.tensor(0.25), rtol=0, atol=2.5e-4)


def test_regions_that_do_not_occur_are_left_out():
    metric = quality()
    metric.update(torch.ones(1, 1, 5, 16, 16), torch.ones(1, 1, 5, 16, 16))
    assert set(metric.compute()) == {"psnr", "ssim", "mae", "mae_opaque", "mae_of_mean"}


def test_eps_widens_empty_and_opaque():
    alpha = torch.full((1, 1, 1, 8, 8), 254 / 255)
    metric = AlphaQuality(time_stride=4, space_stride=8, eps=1 / 255)
    metric.update(alpha, alpha)
    assert "mae_opaque" in metric.compute()


def test_prediction_is_clamped():
    metric = quality()
    metric.update(torch.full((1, 1, 1, 8, 8), 3.0), torch.ones(1, 1, 1, 8, 8))
    assert metric.compute()["mae"] == 0


def test_mae_of_mean_is_exact_for_8_bit_alpha():
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 256, (n, 1, 5, 16, 16), generator=generator) / 255 for n in (1, 3)]
    metric = quality()
    for alpha in batches:
        metric.update(alpha, alpha)
    pixels = torch.cat([alpha.flatten() for alpha in batches]).double()
    assert_close(metric.compute()["mae_of_mean"].double(), (pixels - pixels.mean()).abs().mean())


def test_mae_of_mean_is_what_a_constant_scores():
    _, alpha = clips(3, 2)
    metric = quality()
    metric.update(alpha.mean().expand_as(alpha), alpha)
    scores = metric.compute()
    assert_close(scores["mae_of_mean"], scores["mae"], rtol=0, atol=2.5e-4)


def test_cells_cover_the_pixels_they_saw():
    alpha = torch.zeros(1, 1, 9, 16, 24)
    alpha[:, :, 5, 3, 20] = 0.5  # frames 5..8, rows 0..7, columns 16..23
    region = cells_to_pixels(cells(alpha, 4, 8), 9, 4, 8)
    expected = torch.zeros_like(alpha)
    expected[:, :, 5:, :8, 16:] = 1
    assert_close(region.float(), expected)


def test_precision_of_the_surroundings_does_not_matter():
    alpha_hat, alpha = clips(1, 3)
    metric, expected = quality(), quality()
    expected.update(alpha_hat, alpha)
    nn.ModuleList([metric]).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(alpha_hat, alpha)
    assert_close(metric.compute(), expected.compute(), rtol=0, atol=0)


def test_border_cells_and_centre():
    alpha = torch.zeros(2, 1, 3, 8, 16)
    alpha[0, ..., 0:4, 8:12] = 1  # touches the upper border
    alpha[1] = 0.5
    assert_close(border_mean(alpha), torch.tensor([4 / 44, 0.5]))
    assert_close(highest_cell(alpha, 4), torch.tensor([1.0, 0.5]))
    assert_close(centre_of_mass(alpha), torch.tensor([[10 / 16, 2 / 8], [0.5, 0.5]]))
    assert_close(centre_of_mass(torch.zeros(1, 1, 1, 4, 4)), torch.full((1, 2), 0.5))


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_two_ranks_with_unequal_shares_equal_one_process():
    check_unequal_shares(quality, clips)
