import pytest
import torch
from torch.testing import assert_close

from acetate.alpha import PALETTE, harden, over, palette_colors


def test_palette(golden):
    assert_close(PALETTE, torch.tensor(golden("rendering").metadata["colours"]))


@pytest.mark.parametrize("source", ["", "unclamped/"])
@pytest.mark.parametrize("color", range(8))
def test_soft_and_hard(golden, source, color):
    file = golden("rendering")
    rgb, alpha = file[f"{source}fgr"], (file[f"{source}pha"] + 1) / 2
    background = palette_colors(torch.full((len(rgb),), color))
    assert_close(
        over(rgb, alpha, background),
        file[f"{source}soft/{color}"].expand_as(rgb),
        rtol=0,
        atol=1e-6,
    )
    assert_close(
        over(rgb, harden(alpha), background), file[f"{source}hard/{color}"], rtol=0, atol=1e-6
    )
