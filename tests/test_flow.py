import pytest
import torch
from torch.testing import assert_close

from acetate import flow


@pytest.fixture
def clip():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 16, 2, 4, 6, generator=generator)  # latents and noise of three clips


def test_shift_one_is_linear():
    levels = flow.schedule(steps=4, shift=1.0)
    assert_close(levels.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25]))
    assert_close(levels.timesteps, torch.tensor([4.0, 3.0, 2.0, 1.0]))


def test_shift_by_hand():
    """5u / (1 + 4u) at u = 1, 0.75, 0.5, 0.25."""
    levels = flow.schedule(steps=4, shift=5.0)
    assert_close(levels.sigmas, torch.tensor([1, 3.75 / 4, 2.5 / 3, 1.25 / 2]))


def test_wans_schedule():
    levels = flow.schedule()
    assert len(levels.sigmas) == 1000
    assert levels.sigmas[0] == 1
    assert (levels.sigmas.diff() < 0).all()
    assert levels.sigmas[-1] > 0
    assert_close(levels.timesteps, 1000 * levels.sigmas)
    for values in (levels.sigmas, levels.timesteps, levels.weights):
        assert values.dtype == torch.float32
    assert len(levels.timesteps.unique()) == 1000
    assert len(levels.timesteps.bfloat16().unique()) == 294  # why they stay in float32


def test_weights_sum_to_the_number_of_steps():
    levels = flow.schedule()
    assert_close(levels.weights.sum(), torch.tensor(1000.0))
    assert (levels.weights >= 0).all()
    assert levels.weights[0] == 0
    nearest = (levels.timesteps - 500).abs().argmin()
    assert levels.weights.argmax() == nearest


def test_interpolate_by_hand():
    latents, noise = torch.full((2, 1, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1, 1), -6.0)
    x_t = flow.interpolate(latents, noise, torch.tensor([0.25, 0.5]))
    assert x_t.flatten().tolist() == [0.0, -2.0]


def test_ends_of_the_path(clip):
    latents, noise = clip
    assert_close(flow.interpolate(latents, noise, torch.zeros(3)), latents)
    assert_close(flow.interpolate(latents, noise, torch.ones(3)), noise)


def test_one_straight_step_reaches_both_ends(clip):
    latents, noise = clip
    sigma = torch.tensor([0.1, 0.5, 0.95])
    x_t, velocity = flow.interpolate(latents, noise, sigma), flow.velocity(latents, noise)
    assert_close(x_t - flow.per_clip(sigma, x_t) * velocity, latents, rtol=0, atol=1e-5)
    assert_close(x_t + flow.per_clip(1 - sigma, x_t) * velocity, noise, rtol=0, atol=1e-5)


def test_velocity_is_the_derivative_for_sigma(clip):
    latents, noise = clip.double()
    sigma = torch.full((3,), 0.3, dtype=torch.float64)
    step = 1e-3
    ahead, behind = (flow.interpolate(latents, noise, sigma + d) for d in (step, -step))
    assert_close((ahead - behind) / (2 * step), flow.velocity(latents, noise))


def test_per_clip_scales_each_clip_by_its_own_value(clip):
    scaled = flow.per_clip(torch.tensor([0.0, 1.0, 2.0]), clip[0]) * clip[0]
    assert scaled[0].abs().max() == 0
    assert_close(scaled[1], clip[0, 1])
    assert_close(scaled[2], 2 * clip[0, 2])


def test_mean_shift_leaves_the_guide_alone():
    noise, guide = torch.randn(2, 3, 2, 4, 4), torch.rand(2, 1, 2, 4, 4)
    guide[:, :, :, 0, 0] = 1
    shifted = flow.mean_shift(noise, guide, 0.5)
    assert_close(shifted[..., 0, 0], noise[..., 0, 0])
    assert_close((shifted - noise)[:, 1], 0.5 * (1 - guide[:, 0]), rtol=0, atol=1e-6)
