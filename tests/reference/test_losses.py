import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from acetate.losses.perceptual import VGGFeatures
from acetate.losses.terms import l1
from acetate.released.vae import central_difference_l1, central_difference_magnitude


@pytest.fixture
def vgg(golden, tmp_path):
    save_file(golden("recon_losses").under("weights"), tmp_path / "vgg16.safetensors")
    return VGGFeatures(imagenet_norm=False, weights=str(tmp_path / "vgg16.safetensors"))


def pairs(file):
    return sorted({name.split("/")[0] for name in file.tensors if name.endswith("/prediction")})


def test_edges(golden):
    file = golden("recon_losses")
    for pair in pairs(file):
        x, x_hat = file[f"{pair}/target"], file[f"{pair}/prediction"].requires_grad_()
        value = central_difference_l1(x_hat, x)
        (gradient,) = torch.autograd.grad(value, x_hat)
        expected = file[f"{pair}/sobel_grad_prediction"]
        assert_close(value, file[f"{pair}/sobel"].squeeze(), rtol=1e-5, atol=1e-7)
        assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        if f"{pair}/sobel_map_target" in file.tensors:
            assert_close(
                central_difference_magnitude(x), file[f"{pair}/sobel_map_target"], rtol=0, atol=1e-6
            )
        if f"{pair}/sobel_frame0_4d" in file.tensors:
            first = central_difference_l1(x_hat[:, :, :1], x[:, :, :1])
            assert_close(first, file[f"{pair}/sobel_frame0_4d"].squeeze(), rtol=1e-5, atol=1e-7)


def test_vgg_and_l1(golden, vgg):
    file = golden("recon_losses")
    colored = [pair for pair in pairs(file) if f"{pair}/vgg" in file.tensors]
    assert colored
    for pair in colored:
        x, x_hat = file[f"{pair}/target"], file[f"{pair}/prediction"].requires_grad_()
        value = vgg(x_hat, x, feature_maps=None)
        (gradient,) = torch.autograd.grad(value, x_hat)
        expected = file[f"{pair}/vgg_grad_prediction"]
        assert_close(value, file[f"{pair}/vgg"].squeeze(), rtol=1e-5, atol=1e-7)
        assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        assert_close(l1(x_hat, x), file[f"{pair}/l1"].squeeze(), rtol=1e-5, atol=1e-7)
