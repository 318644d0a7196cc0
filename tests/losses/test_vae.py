import pytest
import torch
from torch import nn
from torch.testing import assert_close

from acetate.alpha import palette_colors
from acetate.losses.terms import l1
from acetate.losses.vae import UnrenderedVAELoss, VAELoss
from acetate.released.vae import ReleasedVAELoss

RED, BLUE, KEY = (palette_colors(torch.tensor([i])) for i in (4, 1, 0))
SETTINGS = {
    "l1_weight": 1.0,
    "perceptual_weight": 0.0,
    "edge_weight": 0.0,
    "perceptual": None,
    "eps": 0.0,
}


def loss(kind=VAELoss, **settings):
    return kind(**SETTINGS | settings)


def flat(value, channels=3):
    return torch.full((1, channels, 2, 6, 6), value)


def noise(seed, channels=3):
    return torch.rand(1, channels, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


class SquaredError(nn.Module):
    """A perceptual term whose features are the pixels."""

    def forward(self, x_hat, x, feature_maps):
        return feature_maps * (x_hat - x).square().mean()


def values(parts):
    return {name: round(value.item(), 5) for name, value in parts.items()}


def test_without_rendering_hidden_color_counts():
    """0.5 off where nothing is seen: nothing to a render, all of it to straight colour."""
    rgb, alpha = flat(0.0), flat(0.0, 1)
    rendered, straight = (
        loss(kind)(rgb + 0.5, alpha, rgb, alpha, RED, BLUE, None)
        for kind in (VAELoss, UnrenderedVAELoss)
    )
    assert rendered[0].item() == 0
    assert values(straight[1]) == {"alpha/l1": 0.0, "rgb/l1": 0.5}


@pytest.mark.parametrize("kind", [VAELoss, ReleasedVAELoss])
def test_identity_is_zero(kind):
    rgb, alpha = noise(0) * 2 - 1, noise(1, 1).round()
    term = loss(kind, edge_weight=1.0, perceptual_weight=1.0, perceptual=SquaredError())
    total, parts = term(rgb.clone(), alpha.clone(), rgb, alpha, RED, BLUE, 1.0)
    assert total.item() == 0
    assert len(parts) == 9


def test_each_view_by_hand():
    """Colour 0.1 at alpha 0.8 for colour 0.5 at alpha 1.

    Alpha in [-1, 1]: 0.6 for 1. Soft over black: 0.8 * 0.1 - 0.2 = -0.12 for 0.5. Hard: colour
    alone.
    """
    total, parts = loss()(flat(0.1), flat(0.8, 1), flat(0.5), flat(1.0, 1), KEY, RED, None)
    assert values(parts) == {"alpha/l1": 0.4, "soft/l1": 0.62, "hard/l1": 0.4}
    assert total.item() == pytest.approx(1.42)


def test_empty_pixels_show_the_background_only():
    """Colour under alpha 0 counts in no view, whatever it is."""
    _, parts = loss()(flat(0.1), flat(0.0, 1), flat(-0.7), flat(0.0, 1), RED, BLUE, None)
    assert values(parts) == {"alpha/l1": 0.0, "soft/l1": 0.0, "hard/l1": 0.0}


def test_soft_colors_count_in_the_hard_view_in_full():
    _, parts = loss()(flat(0.1), flat(0.01, 1), flat(0.5), flat(0.01, 1), KEY, KEY, None)
    assert values(parts) == {"alpha/l1": 0.0, "soft/l1": 0.004, "hard/l1": 0.4}


def test_whose_support_the_hard_view_takes():
    """A prediction that is just above 0 where the target is empty: black 0.1 / -1 over red."""
    arguments = (flat(0.1), flat(0.001, 1), flat(0.5), flat(0.0, 1), KEY, RED, None)
    _, target = loss()(*arguments)
    _, prediction = loss(ReleasedVAELoss)(*arguments)
    assert target["hard/l1"].item() == 0
    assert prediction["hard/l1"].item() == pytest.approx((0.9 + 1.1 + 1.1) / 3)
    _, thresholded = loss(ReleasedVAELoss, eps=0.002)(*arguments)
    assert thresholded["hard/l1"].item() == 0


def test_views_use_their_own_background():
    arguments = (flat(0.0), flat(0.5, 1), flat(0.0), flat(0.0, 1))
    views = loss().views(*arguments, RED, BLUE)
    assert_close(views["soft"][1], RED.expand_as(flat(0.0)))
    assert_close(views["hard"][1], BLUE.expand_as(flat(0.0)))
    assert_close(views["soft"][0], RED.expand_as(flat(0.0)) / 2)
    assert all(x.shape == (1, 3, 2, 6, 6) for pair in views.values() for x in pair)


def test_three_channel_alpha():
    """What the released decoder gives."""
    alpha_hat = noise(2)
    _, parts = loss()(flat(0.0), alpha_hat, flat(0.0), flat(1.0, 1), KEY, RED, None)
    assert_close(parts["alpha/l1"], 2 * l1(alpha_hat, torch.ones(1)))


def test_parts_are_weighted_and_add_up():
    arguments = (noise(0), noise(1, 1), noise(2), noise(3, 1), RED, BLUE, 1.0)
    one, ones = loss(
        l1_weight=1.0, edge_weight=1.0, perceptual_weight=1.0, perceptual=SquaredError()
    )(*arguments)
    total, parts = loss(
        l1_weight=2.0, edge_weight=3.0, perceptual_weight=5.0, perceptual=SquaredError()
    )(*arguments)
    assert_close(sum(ones.values()), one)
    assert_close(sum(parts.values()), total)
    assert sorted(parts) == [
        f"{view}/{term}" for view in ("alpha", "hard", "soft") for term in TERMS
    ]
    for name, value in parts.items():
        assert_close(value, {"l1": 2, "edge": 3, "perceptual": 5}[name.split("/")[1]] * ones[name])


TERMS = ("edge", "l1", "perceptual")


def test_feature_maps_go_to_the_perceptual_term():
    arguments = (noise(0), noise(1, 1), noise(2), noise(3, 1), RED, BLUE)
    term = loss(perceptual_weight=1.0, perceptual=SquaredError())
    (_, once), (_, thrice) = term(*arguments, 1.0), term(*arguments, 3.0)
    for view in ("alpha", "soft", "hard"):
        assert_close(thrice[f"{view}/perceptual"], 3 * once[f"{view}/perceptual"])


def test_terms_of_weight_zero_are_not_computed():
    _, parts = loss(perceptual=SquaredError())(
        noise(0), noise(1, 1), noise(2), noise(3, 1), RED, BLUE, None
    )
    assert sorted(parts) == ["alpha/l1", "hard/l1", "soft/l1"]


def test_gradients_reach_color_and_alpha():
    rgb_hat, alpha_hat = noise(0).requires_grad_(), noise(1, 1).requires_grad_()
    total, _ = loss(edge_weight=1.0)(rgb_hat, alpha_hat, noise(2), noise(3, 1), RED, BLUE, None)
    total.backward()
    assert rgb_hat.grad.abs().min() > 0
    assert alpha_hat.grad.abs().min() > 0


def test_a_perceptual_weight_without_a_network():
    with pytest.raises(ValueError, match="perceptual is null but its weight is not 0"):
        loss(perceptual_weight=1.0)
