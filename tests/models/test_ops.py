import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch.testing import assert_close

from acetate.models.ops import FusedNorm, fuse_norms, norm_silu, upsample_conv


def leaves(*tensors):
    return [t.double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_silu_is_wans(dtype):
    norm = WanRMS_norm(6, images=False).to(dtype)
    torch.nn.init.normal_(norm.gamma)
    x = torch.randn(2, 6, 3, 4, 5).to(dtype)
    x[0, :, 0, 0, 0] = 0  # a position without a signal
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    assert_close(norm_silu(norm, x), F.silu(norm(x)), rtol=tolerance, atol=tolerance)


def test_norm_silu_gradients():
    norm = WanRMS_norm(5, images=False).double()
    torch.nn.init.normal_(norm.gamma)
    (x,) = leaves(torch.randn(2, 5, 2, 3, 3))
    weight = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64)
    ours = torch.autograd.grad((norm_silu(norm, x) * weight).sum(), (x, norm.gamma))
    wans = torch.autograd.grad((F.silu(norm(x)) * weight).sum(), (x, norm.gamma))
    for a, b in zip(ours, wans, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)
    norm.requires_grad_(False)  # as in a frozen decoder
    (alone,) = torch.autograd.grad((norm_silu(norm, x) * weight).sum(), x)
    assert_close(alone, wans[0], rtol=1e-6, atol=1e-7)


def test_fused_norms_change_nothing_on_a_cpu():
    pytest.importorskip("triton")
    norm, x = WanRMS_norm(6, images=False), torch.randn(1, 6, 3, 2, 2)
    before = norm_silu(norm, x, 2)
    fuse_norms(norm)
    assert type(norm) is FusedNorm and torch.equal(norm_silu(norm, x, 2), before)
    assert not before[:, :, :2].any() and torch.equal(before[:, :, 2:], norm_silu(norm, x))


def test_without_triton_norms_stay(monkeypatch):
    monkeypatch.setitem(sys.modules, "acetate.models.norm_kernel", None)
    norm = WanRMS_norm(6, images=False)
    with pytest.raises(ImportError, match=r"task.fused_norm=true needs triton.*=false"):
        fuse_norms(norm)
    assert type(norm) is WanRMS_norm


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_upsample_conv_is_upsampling_and_a_convolution(size):
    x, weight, bias = leaves(torch.randn(2, 4, 3, *size), torch.randn(6, 4, 3, 3), torch.randn(6))
    ours = upsample_conv(x, weight, bias)
    doubled = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact")
    expected = F.conv3d(doubled, weight[:, :, None], bias, padding=(0, 1, 1))
    assert_close(ours, expected)
    seed = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight, bias), seed),
        torch.autograd.grad(expected, (x, weight, bias), seed),
        strict=True,
    ):
        assert_close(a, b)
