"""The fake GPU refuses what a real one refuses, and notes what a real one would be waited for."""

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils.checkpoint import checkpoint

from acetate.draws import generator_for
from acetate.models.ops import _NormSiLU
from tests.fake_backward import fake_backward
from tests.fake_gpu import fake_gpu
from tests.rehearsal import rehearse


def test_what_a_gpu_refuses():
    table = torch.arange(4.0)
    with fake_gpu():
        there = torch.zeros(2, device="cuda:0")
        with pytest.raises(RuntimeError, match="generator of the cpu fills"):
            there.uniform_(generator=generator_for("seed"))
        there.uniform_(generator=generator_for("seed of the GPU", device="cuda:0"))
        with pytest.raises(Exception, match="on the same device"):
            there + torch.zeros(2)
        with pytest.raises(RuntimeError, match="an index on the GPU"):
            table[there.long()]
        assert (torch.arange(3) * 2).tolist() == [0, 2, 4]  # the CPU has numbers


def on_the_cpu(x):
    x[:2].copy_(torch.ones(2, 4))


def masked(x):
    x[x > 0] = x[0, 0]


@pytest.mark.parametrize(
    ("wrong", "wait"),
    [
        (lambda x: float(x.sum()), "item"),
        (lambda x: bool((x > 0).all()), "item"),
        (lambda x: x.cpu(), "copy to the cpu"),
        (lambda x: torch.ones(4).to(x.device), "copy to the cuda"),
        (lambda x: x.new_tensor([1.0, 2.0]), "copy to the cuda"),
        (on_the_cpu, "copy to the cuda"),
        (lambda x: x[torch.tensor([0])], "index of the CPU"),
        (masked, "mask"),
        (lambda x: torch.linalg.eigh(x), "aten._linalg_eigh"),
    ],
)
def test_a_wait_is_noted(wrong, wait):
    with fake_gpu() as gpu:
        x = torch.ones(4, 4, device="cuda:0")
        assert gpu.waits.total() == 0
        wrong(x)
        ((place, count),) = gpu.waits.items()
    assert place.startswith(f"{wait} at ")
    assert count == 1


def test_what_needs_no_wait():
    with fake_gpu() as gpu:
        x = torch.ones(4, 4, device="cuda:0")
        x[x > 0] = 2.0
        x = x * torch.tensor(2.0) + torch.arange(4, device=x.device)
        torch.ones(4, 4).to(x.device, non_blocking=True)
        assert x[x[0].long()].shape == (4, 4)
        assert gpu.waits.total() == 0
        with pytest.raises(DynamicOutputShapeException):  # whose size only numbers tell
            x.nonzero()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_is_not_fused(masked):
    with fake_gpu() as gpu:
        q = torch.zeros(1, 2, 8, 64, device="cuda:0", dtype=torch.bfloat16)
        mask = torch.zeros(8, 8, device="cuda:0", dtype=torch.bfloat16) if masked else None
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        assert not gpu.softmaxes
        (q @ q.mT).softmax(-1) @ q
        assert gpu.softmaxes.total() == 1
    assert [attention.fused for attention in gpu.attentions] == [not masked]


def test_a_convolution_that_leaves_channels_last():
    with fake_gpu() as gpu:
        x = torch.zeros(1, 96, 5, 64, 64, device="cuda:0")
        weight = torch.zeros(96, 96, 3, 3, 3, device="cuda:0", requires_grad=True)
        last = [t.to(memory_format=torch.channels_last_3d) for t in (x, weight)]
        F.conv3d(*last, padding=1).sum().backward()
        F.conv3d(x, last[1], padding=1)
    forward, backward, wrong = gpu.convolutions
    assert (forward.channels_last, wrong.channels_last) == (True, False)
    assert forward.flops == backward.flops == wrong.flops == 2 * 96 * 96 * 27 * 5 * 64 * 64
    assert "test_fake_gpu.py" in wrong.place


class Careless(LightningModule):
    """Waits for its loss at every step."""

    def __init__(self, apart):
        super().__init__()
        self.layer, self.apart = nn.Linear(4, 4), apart

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["rgb"]).square().mean()
        self.last = float(loss)
        return loss + torch.zeros(1) if self.apart else loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def test_a_careless_task():
    batch = {"key": ["a"], "rgb": torch.zeros(1, 3, 1, 4, 4)}
    with fake_gpu() as gpu:
        step, _ = rehearse(gpu, Careless(apart=False), batch, validate=False)
        assert sorted(step.waits.values()) == [1, 1]  # and the guard's
        assert any(place.startswith("item at tests/test_fake_gpu.py") for place in step.waits)
        with pytest.raises(Exception, match="on the same device"):
            rehearse(gpu, Careless(apart=True), batch, validate=False)


def test_the_backward_pass_is_autograds():
    """Through checkpoints, a Function of ours, autocast and several outputs of one node."""

    def gradients():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
        h = checkpoint(net[:2], torch.randn(5, 4), use_reentrant=False)
        h = checkpoint(lambda h: net[2:4](h) + h, h, use_reentrant=False)
        h = _NormSiLU.apply(h.view(5, 8, 1, 1, 1), torch.ones(8, 1, 1, 1))[:, :, 0, 0, 0]
        with torch.autocast("cpu", torch.bfloat16):
            a, b, _ = net[4](h).unbind(1)
        ((a * b).float().sum() + b.float().sum()).backward()
        return [p.grad for p in net.parameters()]

    expected = gradients()
    with fake_backward():
        found = gradients()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
