from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from acetate import regions
from acetate.models.dit import velocity
from acetate.models.rgba_vae import RGBAVAE
from acetate.sampling import EllipsePath, Solver, check_size, decode, initial_noise, sample_latents

SHAPE = (16, 2, 4, 4)


@pytest.fixture
def dit(make_transformer):
    return make_transformer(), torch.randn(2, 3, 16), torch.randn(1, 3, 16)


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_seed_gives_the_same_clip_in_any_batch(dit, name, guidance):
    transformer, context, negative = dit
    solver = Solver(name=name, steps=3, guidance=guidance)
    noise = initial_noise([4, 9], SHAPE, None, 0.0, "cpu")
    both = sample_latents(transformer, noise, context, negative, solver, progress=False)
    alone = sample_latents(
        transformer,
        initial_noise([9], SHAPE, None, 0.0, "cpu"),
        context[1:],
        negative,
        solver,
        progress=False,
    )
    assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(both[0], both[1])


def test_euler_is_the_flow_equation(dit):
    """x <- x + (sigma' - sigma) v, by hand, with guidance."""
    transformer, context, negative = dit
    x = initial_noise([1, 2], SHAPE, None, 0.0, "cpu")
    u = torch.linspace(1, 0, 4)
    sigmas = 5 * u / (1 + 4 * u)
    expected = x
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            t = (1000 * now).expand(2)
            without = velocity(transformer, expected, t, negative.expand(2, -1, -1))
            v = without + 2.5 * (velocity(transformer, expected, t, context) - without)
            expected = expected + (after - now) * v
    ours = sample_latents(
        transformer, x, context, negative, Solver("euler", 3, 2.5), progress=False
    )
    assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_solvers_meet_with_more_steps(dit):
    transformer, context, negative = dit
    noise = initial_noise([1, 2], SHAPE, None, 0.0, "cpu")
    euler, unipc = (
        sample_latents(transformer, noise, context, negative, Solver(name, 60, 1.0), progress=False)
        for name in ("euler", "unipc")
    )
    few = sample_latents(
        transformer, noise, context, negative, Solver("euler", 4, 1.0), progress=False
    )
    assert (euler - unipc).abs().mean() < (few - unipc).abs().mean() / 3


def test_guide_moves_from_its_first_to_its_last_frame():
    path = EllipsePath(
        centre=(0.25, 0.5), axes=(0.5, 0.25), angle=0.0, end_centre=(0.75, 0.5), end_angle=90.0
    )
    ellipses = path.ellipses(5, 8, 16)
    assert_close(ellipses[0, 0], torch.tensor([3.5, 3.5, 4, 2, 0], dtype=torch.float64))
    assert_close(ellipses[0, -1], torch.tensor([11.5, 3.5, 4, 2, 90], dtype=torch.float64))
    guide = regions.gaussian(ellipses, 8, 16)
    assert guide.shape == (1, 1, 5, 8, 16)
    peaks = guide[0, 0].sum(1).argmax(1)
    assert (peaks.diff() > 0).all()


def test_shift_is_outside_of_the_guide():
    guide = regions.gaussian(EllipsePath(axes=(0.5, 0.5)).ellipses(2, 8, 8), 8, 8)
    shape = (16, 2, 8, 8)
    shifted = initial_noise([3], shape, guide, 0.5, "cpu")
    with pytest.warns(UserWarning, match="trained with a mean shift of 0.5, and no guide"):
        plain = initial_noise([3], shape, None, 0.5, "cpu")
    shift = (shifted - plain)[0]
    assert_close(shift[:, 0, 0, 0], torch.full((16,), 0.5))
    assert shift[:, :, 4, 4].max() < 0.05


def test_decoding_in_chunks_is_decoding_whole(make_vae):
    whole = RGBAVAE(
        vae=make_vae("wan21"), merge_init="residual", lora_rank=2, lora_alpha=2.0
    ).eval()
    latents = torch.randn(2, 16, 3, 2, 2)
    expected = list(decode(whole, latents))
    whole.chunk = 1
    for (rgb, alpha), (rgb_whole, alpha_whole) in zip(
        decode(whole, latents), expected, strict=True
    ):
        assert rgb.shape == (3, 9, 16, 16)
        assert alpha.shape == (1, 9, 16, 16)
        assert_close(rgb, rgb_whole, rtol=0, atol=1e-4)
        assert_close(alpha, alpha_whole, rtol=0, atol=1e-4)


def test_samples_of_released_adapters_have_one_alpha(make_vae):
    vae = RGBAVAE(
        vae=make_vae("tiny"), merge_init="scratch", lora_rank=2, lora_alpha=2.0, average_alpha=False
    )
    (clip,) = decode(vae, torch.zeros(1, *vae.geometry.latent_shape(5, 16, 16)))
    assert [x.shape[0] for x in clip] == [3, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Solver(name="heun"), "solver 'heun'; known: unipc, euler"),
        (lambda: Solver(steps=0), "steps=0; at least 1"),
        (lambda: EllipsePath(axes=(0.0, 0.5)), r"guide\.axes=\[0.0, 0.5\]; lengths are positive"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_that_the_dit_cannot_make(make_vae):
    geometry = RGBAVAE(
        vae=make_vae("wan21"), merge_init="residual", lora_rank=1, lora_alpha=1.0
    ).geometry
    check_size(9, 32, 48, geometry, (1, 2, 2))
    with pytest.raises(ValueError, match=r"width 40; this VAE needs multiples of 16. Use width=32"):
        check_size(9, 32, 40, geometry, (1, 2, 2))
    with pytest.raises(ValueError, match="8 frames"):
        check_size(8, 32, 48, geometry, (1, 2, 2))
