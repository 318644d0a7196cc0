import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from acetate.models.adapters import MergedLoRA, add_lora, check_fit, load_trainable, trainable_state

CONVOLUTIONS = {
    "2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 7)),
    "2d 3x3 strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 6, 8)),
    "3d 3x3x3": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 3, 5, 7)),
    "3d time, strided": (lambda: nn.Conv3d(4, 4, (3, 1, 1), stride=(2, 1, 1)), (2, 4, 5, 3, 4)),
    "3d causal": (lambda: WanCausalConv3d(4, 6, 3, padding=1), (2, 4, 3, 5, 7)),
}


@pytest.fixture(params=CONVOLUTIONS)
def case(request):
    """A convolution before and after adapters of rank 3, and an input; float64."""
    build, shape = CONVOLUTIONS[request.param]
    torch.manual_seed(0)
    plain, adapted = build().double(), nn.Sequential(build()).double()
    adapted[0].load_state_dict(plain.state_dict())
    add_lora(adapted, rank=3, alpha=1.5)
    lora = adapted.double()[0].parametrizations.weight[0]
    nn.init.normal_(lora.B)
    return plain, adapted, lora, torch.randn(shape, dtype=torch.float64)


def factored(plain, lora, x):
    """conv(x; W) + scale * B (conv(x; A)): the two-path form that LoRA is defined by."""
    if isinstance(plain, WanCausalConv3d):
        x = F.pad(x, plain._padding)
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    down = convolve(x, lora.A, None, plain.stride, plain.padding)
    up = convolve(down, lora.B.reshape(*lora.B.shape, *[1] * (x.ndim - 2)))
    return convolve(x, plain.weight, plain.bias, plain.stride, plain.padding) + 1.5 / 3 * up


def test_merged_equals_factored(case):
    plain, adapted, lora, x = case
    x.requires_grad_()
    wanted = [x, lora.A, lora.B]
    outputs = adapted(x), factored(plain, lora, x)
    direction = torch.randn_like(outputs[0])
    merged, two_paths = (torch.autograd.grad((y * direction).sum(), wanted) for y in outputs)
    # The sum W + s BA is taken in float32, whatever the rest.
    assert_close(*outputs, rtol=0, atol=1e-5)
    for name, ours, theirs in zip(("x", "A", "B"), merged, two_paths, strict=True):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item(), msg=name)


def test_starts_as_the_base():
    for build, shape in CONVOLUTIONS.values():
        torch.manual_seed(0)
        module = nn.Sequential(build())
        x = torch.randn(shape)
        before = module(x)
        add_lora(module, rank=3, alpha=1.0)
        assert_close(module(x), before, rtol=0, atol=0)
        lora = module[0].parametrizations.weight[0]
        assert lora.B.abs().max() == 0
        assert lora.A.abs().max() > 0


def test_scale_is_alpha_over_rank():
    lora = MergedLoRA(torch.zeros(1, 1, 1, 1), rank=4, alpha=2.0)
    nn.init.ones_(lora.A)
    nn.init.ones_(lora.B)
    assert lora(torch.full((1, 1, 1, 1), 5.0)).item() == 5 + 2 / 4 * 4


def test_names_every_convolution_and_nothing_else():
    module = nn.ModuleDict(
        {
            "inner": nn.Sequential(
                nn.Conv2d(2, 2, 1), nn.SiLU(), WanCausalConv3d(2, 2, 3, padding=1)
            ),
            "linear": nn.Linear(2, 2),
            "norm": nn.GroupNorm(1, 2),
        }
    )
    assert add_lora(module, rank=1, alpha=1.0) == ["inner.0", "inner.2"]
    assert sorted(trainable_state(module)) == [
        f"inner.{i}.parametrizations.weight.0.{matrix}" for i in (0, 2) for matrix in "AB"
    ]


def test_training_moves_the_adapters_and_nothing_else():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1))
    add_lora(module, rank=2, alpha=2.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(trainable_state(module).values(), lr=0.1)
    x = torch.randn(2, 3, 5, 5)
    for _ in range(2):  # A has no gradient until B has left zero
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.endswith((".A", ".B"))), name
        parameter = dict(module.named_parameters())[name]
        assert (parameter.grad is None) == (not parameter.requires_grad)


def test_bf16_base_under_autocast_keeps_fp32_masters():
    torch.manual_seed(0)
    module = nn.Sequential(WanCausalConv3d(4, 6, 3, padding=1)).bfloat16()
    add_lora(module, rank=3, alpha=3.0)
    lora, base = module[0].parametrizations.weight[0], module[0].parametrizations.weight.original
    nn.init.normal_(lora.B, std=0.1)
    assert base.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = module[0].weight
        module(torch.randn(1, 4, 3, 4, 4)).float().square().mean().backward()
    delta = (lora.B @ lora.A.flatten(1)).view_as(base)
    assert_close(weight, (base.float() + delta).bfloat16(), rtol=0, atol=0)
    assert not torch.equal(weight, base)
    for parameter in (lora.A, lora.B):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


def test_cached_merge_has_the_same_gradient():
    """Chunked decoding merges once per clip and sums the gradients of its chunks."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 1)
    add_lora(conv, rank=2, alpha=2.0)
    lora = conv.parametrizations.weight[0]
    nn.init.normal_(lora.B)
    x = torch.randn(4, 3, 2, 2)
    whole = torch.autograd.grad(conv(x).square().sum(), [lora.A, lora.B])
    with parametrize.cached():
        pieces = sum(conv(piece).square().sum() for piece in x.split(1))
    for ours, expected in zip(torch.autograd.grad(pieces, [lora.A, lora.B]), whole, strict=True):
        assert_close(ours, expected)


@pytest.fixture
def small():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1))
    add_lora(module, rank=2, alpha=1.0)
    return module


def test_trained_state_round_trip(small):
    state = {name: torch.randn_like(p).half() for name, p in trainable_state(small).items()}
    load_trainable(small, state, "file")
    for name, parameter in trainable_state(small).items():
        assert parameter.dtype == torch.float32
        assert_close(parameter.data, state[name].float())
        assert parameter.requires_grad


def test_names_what_does_not_fit_and_loads_nothing(small):
    before = {name: p.clone() for name, p in trainable_state(small).items()}
    state = {name: torch.full_like(p, 7.0) for name, p in before.items()}
    del state["0.parametrizations.weight.0.A"], state["0.parametrizations.weight.0.B"]
    state["1.parametrizations.weight.0.B"] = torch.zeros(3, 5)
    state["0.lora_A"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_trainable(small, state, "run.safetensors")
    message = str(error.value)
    assert message.startswith("run.safetensors does not fit the model: ")
    assert "2 missing: 0.parametrizations.weight.0.A, 0.parametrizations.weight.0.B" in message
    assert "1 not used: 0.lora_A" in message
    assert (
        "1 of another shape: 1.parametrizations.weight.0.B is (3, 5), the model has (3, 2)"
        in message
    )
    for name, parameter in trainable_state(small).items():
        assert_close(parameter.data, before[name].data, rtol=0, atol=0)


def test_errors_list_all_names_up_to_twenty():
    target = {f"w{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(ValueError, match=rf"20 missing: {', '.join(target)}\. Choose"):
        check_fit(target, {}, "file")
    with pytest.raises(ValueError, match=r"22 not used: x0, .*, x19 and 2 more\. Choose"):
        check_fit({}, {f"x{i}": torch.zeros(1) for i in range(22)}, "file")
    check_fit(target, dict(target), "file")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_quantised_tensors_do_not_fit(dtype):
    with pytest.raises(
        ValueError, match=rf"1 of another type: w is {str(dtype)[6:]}, needed: a float of 16 bits"
    ):
        check_fit({"w": torch.zeros(2)}, {"w": torch.zeros(2).to(dtype)}, "file")
    # what is no float
    check_fit({"w": torch.zeros(2, dtype=torch.int64)}, {"w": torch.zeros(2).to(dtype)}, "file")
