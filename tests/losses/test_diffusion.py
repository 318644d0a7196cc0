import pytest
import torch
from torch.testing import assert_close

from acetate import flow
from acetate.losses.diffusion import DiffusionLoss, masked_mean
from acetate.models.dit import VelocityField

SETTINGS = {
    "mode": "opaque",
    "weight": 1.0,
    "margin": 1.0,
    "latents": "normalised",
    "timestep_weight": False,
    "eps": 0.0,
    "build_judge": None,
}
SPACE, TIME = 2, 4
IDS = torch.tensor([100, 800])


def loss(**settings):
    return DiffusionLoss(**SETTINGS | settings)


def random(seed):
    """Latents or noise of two clips of 5 frames of 4x6 pixels: 2x2x3 cells each, 12 in all."""
    return torch.randn(2, 16, 2, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def latents():
    return random(0).requires_grad_()


@pytest.fixture
def noise():
    return random(1)


@pytest.fixture
def alpha():
    """Cell (0, 0, 0, 0) and the later ones of column 2 of clip 0 are opaque: three; the rest is
    empty or mixed."""
    alpha = torch.zeros(2, 1, 5, 4, 6)
    alpha[0, :, 0, :2, :2] = 1
    alpha[0, :, 1:, :, 4:] = 1
    alpha[1] = 0.5
    return alpha


def off_by(error, latents, noise):
    """A velocity field whose squared error is `error` (broadcast over cells), as a function of its
    input."""

    def field(x_t, timestep):
        return x_t - x_t.detach() + (noise - latents).detach() + error.sqrt()

    return field


def cellwise(opaque, other):
    """Squared error by cell (2, 1, 2, 2, 3): `opaque` in alpha's opaque cells, `other`
    elsewhere."""
    error = torch.full((2, 1, 2, 2, 3), float(other))
    error[0, 0, 0, 0, 0] = opaque[0]
    error[0, 0, 1, :, 2] = torch.tensor(opaque[1:])
    return error


def run(term, latents, alpha, noise, field, ids=IDS):
    return term(latents, alpha, noise, ids, field, TIME, SPACE)


def test_masked_mean_divides_by_the_mask():
    values, mask = torch.tensor([1.0, 3.0, 50.0, 8.0]), torch.tensor([True, True, False, False])
    assert masked_mean(values, mask).item() == 2
    assert masked_mean(values, ~mask | mask).item() == 15.5


def test_masked_mean_of_nothing_is_zero_even_of_infinities():
    values = torch.tensor([1.0, float("inf")], requires_grad=True)
    value = masked_mean(values, torch.zeros(2, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert values.grad.tolist() == [0, 0]


def test_opaque_by_hand(latents, noise, alpha):
    """Three opaque cells of 12, errors 1, 2 and 6: their mean is 3, whatever the others are."""
    field = off_by(cellwise([1.0, 2.0, 6.0], 100), latents, noise)
    assert run(loss(), latents, alpha, noise, field).item() == pytest.approx(3, rel=1e-5)
    assert run(loss(weight=0.1), latents, alpha, noise, field).item() == pytest.approx(
        0.3, rel=1e-5
    )


def test_opaque_without_an_opaque_cell_is_exactly_zero(latents, noise, alpha):
    field = off_by(cellwise([1.0, 2.0, 6.0], 100), latents, noise)
    value = run(loss(), latents, alpha * 0.99, noise, field)
    value.backward()
    assert value.item() == 0
    assert latents.grad.abs().max() == 0


def test_opaque_gradient_stays_in_opaque_cells(latents, noise, alpha):
    run(loss(), latents, alpha, noise, lambda x_t, _: 0.5 * x_t).backward()
    reached = latents.grad.abs().amax(1, keepdim=True) > 0
    assert_close(reached, cellwise([1.0, 1.0, 1.0], 0) > 0)


def test_eps_counts_lossy_cells_as_opaque(latents, noise, alpha):
    field = off_by(cellwise([1.0, 2.0, 6.0], 100), latents, noise)
    lossy = alpha * 254 / 255
    assert run(loss(), latents, lossy, noise, field).item() == 0
    assert run(loss(eps=1.5 / 255), latents, lossy, noise, field).item() == pytest.approx(
        3, rel=1e-5
    )


def test_bidirectional_by_hand(latents, noise, alpha):
    """Plus the mean of the opaque cells, minus that of all others, held at the margin."""
    field = off_by(cellwise([1.0, 2.0, 6.0], 0.25), latents, noise)
    value = run(loss(mode="bidirectional", margin=1.0), latents, alpha, noise, field)
    assert value.item() == pytest.approx(3 - 0.25, rel=1e-5)
    held = run(loss(mode="bidirectional", margin=0.125), latents, alpha, noise, field)
    assert held.item() == pytest.approx(3 - 0.125, rel=1e-5)


def test_bidirectional_margin_bounds_the_push(latents, noise):
    empty = torch.zeros(2, 1, 5, 4, 6)
    term = loss(mode="bidirectional", margin=0.5, weight=0.1)
    for error in (0.3, 0.7, 1e6):
        field = off_by(torch.full((1,), error), latents, noise)
        value = run(term, latents, empty, noise, field)
        assert value.item() == pytest.approx(-0.1 * min(error, 0.5), rel=1e-3)
        (gradient,) = torch.autograd.grad(value, latents)
        assert (gradient.abs().max() > 0) == (error < 0.5)


def test_bidirectional_pushes_the_two_regions_apart(latents, noise, alpha):
    """Along its gradient the error falls in opaque cells and grows in the others."""
    term = loss(mode="bidirectional", margin=1e6)

    def field(x_t, _):
        return 0.5 * x_t

    def errors(z):
        x_t = flow.interpolate(z, noise, term.levels.sigmas[IDS])
        return (field(x_t, None) - flow.velocity(z, noise)).square().mean(1, keepdim=True)

    (gradient,) = torch.autograd.grad(run(term, latents, alpha, noise, field), latents)
    change = errors(latents - 0.01 * gradient) - errors(latents)
    opaque = cellwise([1.0, 1.0, 1.0], 0) > 0
    assert (change[opaque] < 0).all()
    assert (change[~opaque] > 0).all()


def test_every_clip_has_its_own_timestep_and_noise_level(latents, noise, alpha):
    seen = {}

    def field(x_t, timestep):
        seen["x_t"], seen["timestep"] = x_t, timestep
        return x_t

    term = loss()
    run(term, latents, alpha, noise, field)
    levels = flow.schedule()
    assert_close(seen["timestep"], levels.timesteps[IDS], rtol=0, atol=0)
    for i, step in enumerate(IDS):
        sigma = levels.sigmas[step]
        assert_close(seen["x_t"][i], sigma * noise[i] + (1 - sigma) * latents[i])


def test_timestep_weight(latents, noise, alpha):
    """w(t) of each clip; only clip 0 has opaque cells."""
    field = off_by(cellwise([1.0, 2.0, 6.0], 0), latents, noise)
    weighted = run(loss(timestep_weight=True), latents, alpha, noise, field)
    assert weighted.item() == pytest.approx(3 * flow.schedule().weights[100].item(), rel=1e-5)
    other = run(
        loss(timestep_weight=True), latents, alpha, noise, field, ids=torch.tensor([0, 500])
    )
    assert other.item() == 0  # w(1000) = 0


def test_upstream_is_one_sided(latents, noise, alpha):
    """Its clamp takes value and gradient from all cells but the opaque ones, and from errors above
    1 / w."""
    field = off_by(cellwise([0.01, 0.02, 100.0], 0.01), latents, noise)
    term = loss(mode="upstream", timestep_weight=True)
    value = run(term, latents, alpha, noise, field)
    weight = flow.schedule().weights[100].item()
    assert value.item() == pytest.approx((weight * 0.03 + 1) / 24, rel=1e-4)
    value.backward()
    reached = latents.grad.abs().amax(1, keepdim=True) > 0
    assert_close(reached, cellwise([1.0, 1.0, 0.0], 0) > 0)


@pytest.mark.parametrize("mode", ["opaque", "bidirectional", "upstream"])
def test_gradients_reach_the_latents_and_not_the_dit(make_transformer, mode):
    transformer = make_transformer()
    field = VelocityField(
        transformer, torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    )
    latents, noise = (
        torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    latents = (latents * 0.1).requires_grad_()
    alpha = torch.ones(2, 1, 5, 8, 8)
    alpha[1, ..., 4:] = 0
    loss(mode=mode, margin=1e6)(latents, alpha, noise, IDS, field, TIME, SPACE).backward()
    assert (latents.grad.abs().amax((1, 2, 3, 4)) > 0).all()
    assert all(p.grad is None for p in transformer.parameters())


def test_bf16_latents_give_an_fp32_loss(noise, alpha):
    """Timesteps and noise levels too."""
    seen = []

    def field(x_t, timestep):
        seen.append(timestep.dtype)
        return torch.zeros_like(x_t)

    value = run(loss(), random(0).bfloat16(), alpha, noise.bfloat16(), field)
    assert value.dtype == torch.float32
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "both"), ("latents", "scaled")],
)
def test_settings_that_do_not_exist(name, value):
    with pytest.raises(ValueError, match=rf"loss\.diffusion\.{name} '{value}'; known: "):
        loss(**{name: value})
