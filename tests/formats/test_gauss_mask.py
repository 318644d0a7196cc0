import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from acetate import regions
from acetate.formats.gauss_mask import read_gauss_mask


@pytest.fixture
def mask():
    ellipses = torch.tensor(
        [[[5.0, 3.0, 6.0, 4.0, 20.0], [7.0, 4.0, 6.0, 4.0, 0.0], [9.0, 4.0, 4.0, 4.0, 0.0]]]
    )
    return regions.gaussian(ellipses, 8, 16)[0, 0]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write(path, held, data_pkl=None, protocol=2):
    """As torch.save; data_pkl: other bytes in the place of the pickle."""
    torch.save(held, path, pickle_protocol=protocol)
    if data_pkl is not None:
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, data in parts.items():
                file.writestr(name, data_pkl if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensor(mask, tmp_path, dtype):
    write(tmp_path / "gauss_mask", mask.to(dtype))
    guide = read_gauss_mask(tmp_path / "gauss_mask", (3, 8, 16))
    assert guide.shape == (1, 1, 3, 8, 16) and guide.dtype == torch.float32
    assert_close(guide[0, 0], mask.to(dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_array(mask, tmp_path, dtype, order):
    array = np.array(mask.numpy(), dtype=dtype, order=order)
    write(tmp_path / "gauss_mask", array)
    guide = read_gauss_mask(tmp_path / "gauss_mask", (3, 8, 16))
    assert_close(guide[0, 0].numpy(), array.astype(np.float32), rtol=0, atol=0)


def test_numpy_1_wrote_other_names(mask, tmp_path):
    buffer = io.BytesIO()
    pickle.dump(mask.numpy(), buffer, protocol=2)
    old = buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != buffer.getvalue()
    write(tmp_path / "gauss_mask", mask, old)
    assert_close(read_gauss_mask(tmp_path / "gauss_mask", (3, 8, 16))[0, 0], mask, rtol=0, atol=0)


def test_sides_are_resized_as_the_released_inference_does(mask, tmp_path):
    write(tmp_path / "gauss_mask", mask)
    guide = read_gauss_mask(tmp_path / "gauss_mask", (3, 4, 8))
    expected = torch.nn.functional.interpolate(
        mask[:, None], size=(4, 8), mode="bilinear", align_corners=False
    )
    assert_close(guide[0, 0], expected[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            torch.zeros(2, 8, 16),
            r"gauss_mask has 2 frames, this clip 3 latent frames\. Make a mask of 3 frames",
        ),
        (
            torch.zeros(8, 16),
            r"gauss_mask is \(8, 16\) of torch\.float32; a Gaussian mask is \(frames, h, w\)",
        ),
        (torch.zeros(3, 8, 16, dtype=torch.uint8), r"of torch\.uint8; a Gaussian mask is"),
        (torch.zeros(3, 0, 16), r"gauss_mask is \(3, 0, 16\) of torch\.float32; .* not empty"),
        (
            torch.zeros(3, 8, 16).to(torch.float8_e4m3fn),
            r"of torch\.float8_e4m3fn; a Gaussian mask is .* 16 bits",
        ),
        (
            torch.zeros(3, 8, 16).to_sparse(),
            r"of torch\.float32, sparse_coo; a Gaussian mask is .* dense",
        ),
        (torch.full((3, 8, 16), 1.5), r"from 1\.5 to 1\.5; a Gaussian mask is in \[0, 1\]"),
        (torch.full((3, 8, 16), float("nan")), r"a Gaussian mask is in \[0, 1\]"),
        ({"mask": torch.zeros(3, 8, 16)}, r"cannot be read as a Gaussian mask"),
        (np.array([[[1, "a"]]], dtype=object), r"cannot be read as a Gaussian mask"),
        (np.zeros((3, 8, 16), np.uint8), r"cannot be read as a Gaussian mask"),
        (np.zeros((3,), dtype=[("a", "f4")]), r"cannot be read as a Gaussian mask"),
    ],
)
def test_what_is_no_mask(tmp_path, held, message):
    write(tmp_path / "gauss_mask", held)
    with pytest.raises(ValueError, match=message):
        read_gauss_mask(tmp_path / "gauss_mask", (3, 8, 16))


def test_nothing_runs(mask, tmp_path):
    target = tmp_path / "run"
    array = np.empty(1, object)
    array[0] = Hostile(target)
    for held in (Hostile(target), [mask, Hostile(target)], array):
        for path, data in (
            (tmp_path / "a", None),
            (tmp_path / "b", pickle.dumps(held, protocol=2)),
        ):
            write(path, held if data is None else mask, data)
            with pytest.raises(ValueError, match="Nothing in it was run"):
                read_gauss_mask(path, (3, 8, 16))
    (tmp_path / "c").write_bytes(pickle.dumps(Hostile(target)))
    with pytest.raises(ValueError, match="Nothing in it was run"):
        read_gauss_mask(tmp_path / "c", (3, 8, 16))
    assert not target.exists()


def test_truncated(mask, tmp_path):
    write(tmp_path / "gauss_mask", mask)
    whole = (tmp_path / "gauss_mask").read_bytes()
    for keep in (0, 100, len(whole) - 50):
        (tmp_path / "gauss_mask").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="cannot be read as a Gaussian mask"):
            read_gauss_mask(tmp_path / "gauss_mask", (3, 8, 16))
    with pytest.raises(FileNotFoundError, match=r"guide\.mask=.*none does not exist"):
        read_gauss_mask(tmp_path / "none", (3, 8, 16))
