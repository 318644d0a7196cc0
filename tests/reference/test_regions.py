import torch
from torch.testing import assert_close

from acetate.regions import OPAQUE, cells, upstream_mask


def strides(file):
    return file.metadata["temporal_factor"], file.metadata["spatial_factor"]


def to_alpha(u8):
    return (u8.float() / 255)[:, None]  # (1, T, H, W) -> (1, 1, T, H, W)


def test_every_case(golden):
    file = golden("alpha_region_mask")
    for case in file.metadata["cases"]:
        mask = upstream_mask(to_alpha(file[f"{case}/alpha_u8"]), *strides(file))
        assert_close(mask.flatten(), file[f"{case}/mask"].flatten(), rtol=0, atol=0, msg=case)


def test_batch(golden):
    file = golden("alpha_region_mask")
    alpha = torch.cat([to_alpha(file[f"{case}/alpha_u8"]) for case in file.metadata["batch2_members"]])
    (name,) = [n for n in file.tensors if n.startswith("batch2") and n.endswith("/mask")]
    assert_close(upstream_mask(alpha, *strides(file)).flatten(), file[name].flatten(), rtol=0, atol=0)


def test_alpha_off_the_8_bit_grid(golden):
    file = golden("alpha_region_mask")
    names = [n for n in file.tensors if n.startswith("float_") and n.endswith("/alpha")]
    for name in names:
        alpha = (file[name] + 1) / 2
        expected = file[name.replace("/alpha", "/mask")]
        assert_close(upstream_mask(alpha, *strides(file)).flatten(), expected.flatten(), rtol=0, atol=0)


def test_our_opaque_cells_are_the_released_ones(golden):
    """On 8-bit alpha both call a cell opaque where every pixel is 255."""
    file = golden("alpha_region_mask")
    for case in file.metadata["cases"]:
        alpha = to_alpha(file[f"{case}/alpha_u8"])
        ours = cells(alpha, *strides(file)) == OPAQUE
        assert_close(ours.flatten(), (file[f"{case}/mask"] == 1).flatten(), msg=case)
