import pytest
import torch
from torch.testing import assert_close

from acetate.models.dit import VelocityField, check_latent_grid, load_velocity_field


@pytest.fixture
def field(make_transformer):
    context = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    return VelocityField(make_transformer(), context)


@pytest.fixture
def latents():
    return torch.randn(3, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))


def test_every_clip_has_its_own_timestep(field, latents):
    timesteps = torch.tensor([3.2, 437.5, 1000.0])
    velocity = field(latents, timesteps)
    assert velocity.shape == latents.shape
    for i in range(3):
        assert_close(
            field(latents[i : i + 1], timesteps[i : i + 1])[0], velocity[i], rtol=0, atol=1e-5
        )
    assert (field(latents, timesteps.flip(0)) - velocity)[0].abs().max() > 0.01


def test_the_prompt_counts(field, make_transformer, latents):
    timesteps = torch.full((3,), 500.0)
    other = VelocityField(make_transformer(), field.context.roll(1, 1) * 2)
    assert (other(latents, timesteps) - field(latents, timesteps)).abs().max() > 1e-3


def test_gradients_reach_the_latents_only(field, latents):
    latents.requires_grad_()
    field(latents, torch.tensor([10.0, 500.0, 900.0])).square().mean().backward()
    assert (latents.grad.abs().amax((1, 2, 3, 4)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in field.parameters())


def test_bf16_field_answers_in_the_latents_type(make_transformer, field, latents):
    exact = field(latents, torch.full((3,), 500.0))
    half = VelocityField(make_transformer().bfloat16(), field.context)
    velocity = half(latents, torch.full((3,), 500.0))
    assert velocity.dtype == torch.float32
    assert (velocity - exact).square().mean() < 0.01 * exact.var()


def test_context_is_not_saved(field):
    assert "context" not in field.state_dict()


def test_load_velocity_field(wan_folder, tmp_path, latents):
    field = load_velocity_field(
        transformer=str(wan_folder),
        text_encoder=str(wan_folder),
        prompt="",
        prompt_length=6,
        dtype="float32",
        cache=str(tmp_path),
    )
    assert field.context.shape == (1, 6, 16)
    assert not field.transformer.training
    assert field(latents, torch.full((3,), 500.0)).isfinite().all()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_latent_grid(make_transformer):
    """Patches of 2x2 latents of 8x8 pixels: multiples of 16."""
    transformer = make_transformer()
    check_latent_grid(transformer, 480, 832, space_stride=8)
    with pytest.raises(
        ValueError, match=r"height 472.*multiples of 16 pixels.*8 x patch 2.*height=464"
    ):
        check_latent_grid(transformer, 472, 832, space_stride=8)
    with pytest.raises(ValueError, match=r"width 8;.*width=16"):
        check_latent_grid(transformer, 16, 8, space_stride=8)
    check_latent_grid(transformer, 472, 832, space_stride=4)
