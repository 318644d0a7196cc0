import pytest
import torch
from torch.testing import assert_close

from acetate.models.merge import FeatureMerge


def features(frames=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 8, frames, 2, 3, generator=generator)


@pytest.fixture
def merge():
    torch.manual_seed(0)
    return FeatureMerge(8, 16, "scratch")


def test_published_size():
    with torch.device("meta"):
        merge = FeatureMerge(384, 16, "residual")
    assert sum(p.numel() for p in merge.parameters()) == 25_537_552
    assert len(merge.blocks.resnets) == 3
    assert len(merge.blocks.attentions) == 2


def test_residual_starts_at_zero_and_can_leave_it():
    torch.manual_seed(0)
    merge = FeatureMerge(8, 16, "residual")
    latents = merge(*features())
    assert latents.shape == (2, 16, 3, 2, 3)
    assert latents.abs().max() == 0
    latents.sum().backward()
    assert merge.conv_out.weight.grad.abs().max() > 0


def test_scratch_starts_anywhere(merge):
    assert merge(*features()).abs().max() > 0.01


def test_tells_color_from_alpha(merge):
    rgb, alpha = features()
    assert (merge(rgb, alpha) - merge(alpha, rgb)).abs().max() > 0.01


def test_is_causal_and_attends_within_a_frame(merge):
    rgb, alpha = features(frames=4)
    latents = merge(rgb, alpha)
    assert_close(merge(rgb[:, :, :2], alpha[:, :, :2]), latents[:, :, :2], rtol=0, atol=1e-6)
    moved = rgb.clone()
    moved[:, :, 2] += 1
    change = (merge(moved, alpha) - latents).abs().amax((0, 1, 3, 4))
    assert change[:2].max() == 0
    assert change[2:].min() > 1e-4
    corner = rgb.clone()
    corner[:, :, 0, 0, 0] += 1  # reaches every place of its frame
    assert (merge(corner, alpha) - latents)[:, :, 0].abs().amax((0, 1)).min() > 1e-6


def test_unknown_init():
    with pytest.raises(ValueError, match="'zero'; known: residual, scratch"):
        FeatureMerge(8, 16, "zero")
