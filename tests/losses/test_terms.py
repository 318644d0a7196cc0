import pytest
import torch
from torch.testing import assert_close

from acetate.alpha import frames
from acetate.losses.terms import SobelL1, l1
from acetate.released.vae import central_difference_l1, central_difference_magnitude

sobel_l1 = SobelL1()


def noise(seed=0, channels=3):
    return torch.randn(2, channels, 3, 8, 10, generator=torch.Generator().manual_seed(seed))


def ramp(slope, channels=3):
    """Rises to the right by `slope` a pixel; (1, C, 1, 4, 6)."""
    return (slope * torch.arange(6.0)).expand(1, channels, 1, 4, 6)


@pytest.mark.parametrize("term", [l1, sobel_l1, central_difference_l1])
def test_identity_is_zero(term):
    x = noise()
    assert term(x, x.clone()).item() == 0
    assert term(x, noise(1)).item() > 0.1
    assert_close(term(x, noise(1)), term(noise(1), x))


def test_frames_keep_clips_and_time_in_order():
    video = torch.arange(2 * 3 * 4.0).view(2, 3, 4, 1, 1)
    stacked = frames(video)
    assert stacked.shape == (8, 3, 1, 1)
    assert_close(stacked[5], video[1, :, 1])


def test_l1_by_hand():
    assert l1(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).item() == 2.25


def test_sobel_of_a_ramp_is_its_slope():
    """Normalised Sobel: the slope inside, half of it at the two replicated borders; 1e-6 stands
    under the root."""
    flat = torch.zeros(1, 3, 1, 4, 6)
    inside, border = ((slope**2 + 1e-6) ** 0.5 - 1e-3 for slope in (0.2, 0.1))
    expected = torch.tensor((4 * inside + 2 * border) / 6)
    assert_close(sobel_l1(ramp(0.2), flat), expected, rtol=1e-5, atol=0)
    assert_close(sobel_l1(ramp(0.2).mT.contiguous(), flat.mT), expected, rtol=1e-5, atol=0)


def test_sobel_ignores_a_constant_and_the_sign():
    x = noise()
    assert_close(sobel_l1(x + 0.5, x), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(sobel_l1(-x, x), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_sobel_sees_color_edges_of_equal_luma():
    """Luma differences, the released edges, do not."""
    x = torch.zeros(1, 3, 1, 8, 8)
    x[:, 0, ..., 4:] = 1
    x[:, 1, ..., 4:] = -65.738 / 129.057
    inside = central_difference_magnitude(x)[..., 1:-1, 1:-1]
    assert_close(inside, torch.full_like(inside, 1e-3), rtol=1e-2, atol=0)
    assert sobel_l1(x, torch.zeros_like(x)).item() > 0.05


def test_central_difference_by_hand():
    """Two pixels apart without halving: a ramp of grey has twice the slope times the luma weights'
    sum."""
    magnitude = central_difference_magnitude(ramp(0.1, channels=1))
    assert_close(magnitude[0, 0, 1:-1, 1:-1], torch.full((2, 4), (0.2**2 + 1e-6) ** 0.5))
    grey = central_difference_magnitude(ramp(0.1))
    luma = (65.738 + 129.057 + 25.064) / 256
    assert_close(grey[0, 0, 1:-1, 1:-1], torch.full((2, 4), ((0.2 * luma) ** 2 + 1e-6) ** 0.5))


@pytest.mark.parametrize("term", [sobel_l1, central_difference_l1])
def test_flat_pictures_have_finite_gradients(term):
    x_hat = torch.zeros(1, 3, 2, 6, 6, requires_grad=True)
    term(x_hat, noise()[:1, :, :2, :6, :6]).backward()
    assert x_hat.grad.isfinite().all()
