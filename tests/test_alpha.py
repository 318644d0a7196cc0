import pytest
import torch
from torch.testing import assert_close

from acetate.alpha import (
    PALETTE,
    PALETTE_NAMES,
    checkerboard,
    harden,
    over,
    palette_colors,
    premultiply,
    unpremultiply,
)


@pytest.fixture
def rgb():
    return torch.rand(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def alpha():
    return torch.rand(2, 1, 5, 4, 6, generator=torch.Generator().manual_seed(1))


def color(name, count=2):
    return palette_colors(torch.full((count,), PALETTE_NAMES.index(name)))


def test_over_by_hand():
    rgb = torch.tensor([0.5, -0.5, 1.0]).view(1, 3, 1, 1, 1)
    soft = over(rgb, torch.full((1, 1, 1, 1, 1), 0.25), color("red", 1))
    assert_close(soft.flatten(), torch.tensor([0.875, -0.875, -0.5]))


def test_opaque_ignores_the_background(rgb):
    ones = torch.ones_like(rgb[:, :1])
    assert_close(over(rgb, ones, color("red")), rgb)
    assert_close(over(rgb, ones, color("red")), over(rgb, ones, color("blue")))


def test_empty_is_the_background(rgb):
    nothing = over(rgb, torch.zeros_like(rgb[:, :1]), color("cyan"))
    assert_close(nothing, color("cyan").expand_as(rgb))


def test_two_renders_give_the_alpha_back(rgb, alpha):
    """Triangulation (Smith and Blinn 1996): white minus black is 2 (1 - alpha)."""
    difference = over(rgb, alpha, color("white")) - over(rgb, alpha, color("key"))
    assert_close(1 - difference / 2, alpha.expand_as(rgb))


def test_harden_is_strictly_above_eps():
    alpha = torch.tensor([0.0, 1e-6, 0.5, 1.0])
    assert harden(alpha).tolist() == [0, 1, 1, 1]
    assert harden(alpha, 0.5).tolist() == [0, 0, 0, 1]
    assert harden(alpha.bfloat16()).dtype == torch.bfloat16


def test_hard_and_soft_agree_on_a_binary_matte(rgb, alpha):
    binary = (alpha > 0.5).float()
    assert_close(over(rgb, binary, color("green")), over(rgb, harden(binary), color("green")))


def test_premultiply_is_color_over_black(rgb, alpha):
    assert_close((premultiply(rgb, alpha) + 1) / 2, alpha * (rgb + 1) / 2)
    assert_close(premultiply(rgb, alpha), over(rgb, alpha, color("key")))


def test_unpremultiply_round_trip(rgb, alpha):
    assert_close(
        unpremultiply(premultiply(rgb, alpha), alpha), torch.where(alpha < 1 / 255, -1, rgb)
    )


def test_unpremultiply_keeps_the_first_8_bit_step(rgb):
    alpha = torch.arange(3).view(3, 1, 1, 1, 1) / 255
    straight = unpremultiply(premultiply(rgb[:1], alpha), alpha)
    assert_close(straight[0], torch.full_like(rgb[0], -1))
    assert_close(straight[1:], rgb[:1].expand(2, -1, -1, -1, -1), rtol=0, atol=1e-4)


def test_unpremultiply_clamps():
    """Colour brighter than its coverage allows, as lossy sources have it."""
    bright = unpremultiply(torch.ones(1, 3, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 0.5))
    assert_close(bright, torch.ones(1, 3, 1, 1, 1))


def test_palette_names_its_corners():
    corners = dict(zip(PALETTE_NAMES, PALETTE.tolist(), strict=True))
    assert corners["key"] == [-1, -1, -1]
    assert corners["red"] == [1, -1, -1]
    assert corners["yellow"] == [1, 1, -1]
    assert corners["cyan"] == [-1, 1, 1]
    assert corners["white"] == [1, 1, 1]
    assert len(PALETTE.unique(dim=0)) == 8


def test_palette_colors_stand_as_backgrounds():
    colors = palette_colors(torch.tensor([4, 1]), torch.bfloat16)
    assert colors.shape == (2, 3, 1, 1, 1)
    assert colors.dtype == torch.bfloat16
    assert colors.flatten(1).tolist() == [[1, -1, -1], [-1, -1, 1]]


def test_checkerboard():
    board = checkerboard(5, 6, cell=2)
    assert board.shape == (3, 1, 5, 6)
    dark, light = 0.2, 0.6
    expected = torch.tensor([[dark, dark, light, light, dark, dark]])
    assert_close(board[0, 0, 0:1], expected)
    assert_close(board[2, 0, 2:3], dark + light - expected)
    assert_close(board[1, 0, 4:5], expected)
