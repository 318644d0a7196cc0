import pytest
import torch
from torch.testing import assert_close

from acetate.formats.comfyui import PREFIX, native_dora, svd_lora
from acetate.formats.names import original_layer
from acetate.models.adapters import trainable_state
from acetate.models.dit import add_dora, dora_layers, merged_weight


def product(low, layer):
    up, down = (low.tensors[f"{PREFIX}{layer}.lora_{matrix}.weight"].float() for matrix in "BA")
    return up @ down


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_a_delta_of_the_rank_is_exact(shape):
    delta = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    low = svd_lora([("blocks.0.ffn.0", delta)], 3, torch.float32)
    assert_close(product(low, "blocks.0.ffn.0"), delta, rtol=0, atol=1e-4)
    assert low.error < 1e-5
    assert low.tensors.keys() == {f"{PREFIX}blocks.0.ffn.0.lora_{matrix}.weight" for matrix in "AB"}


def test_error_is_the_best_of_the_rank():
    """Eckart and Young: what the left singular values hold, here to the noise of the randomised
    SVD."""
    deltas = {"a": torch.randn(40, 60), "b": 3 * torch.randn(50, 20)}
    low = svd_lora(deltas.items(), 8, torch.float32)
    for layer, delta in deltas.items():
        values = torch.linalg.svdvals(delta)
        best = (values[8:].norm() / values.norm()).item()
        assert best - 1e-6 <= low.errors[layer] <= 1.01 * best
        assert_close(
            (delta - product(low, layer)).norm() / delta.norm(), torch.tensor(low.errors[layer])
        )
    missed = sum((low.errors[layer] * delta.norm()).square() for layer, delta in deltas.items())
    whole = sum(delta.norm().square() for delta in deltas.values())
    assert low.error == pytest.approx((missed / whole).sqrt().item(), rel=1e-5)


def test_the_same_every_time_and_rounding_counts():
    delta = torch.randn(30, 2) @ torch.randn(2, 30)
    state = torch.random.get_rng_state()
    first, second = (svd_lora([("a", delta)], 2, torch.bfloat16) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in first.tensors.items():
        assert_close(value, second.tensors[name], rtol=0, atol=0)
    assert 1e-4 < first.error < 1e-2


def test_nothing_trained_and_bad_ranks():
    low = svd_lora([("a", torch.zeros(4, 6))], 2, torch.float32)
    assert (low.error, low.errors) == (0.0, {"a": 0.0})
    with pytest.raises(ValueError, match="rank=0; a LoRA has at least rank 1"):
        svd_lora([("a", torch.zeros(4, 6))], 0, torch.float32)


def test_native_dora_in_the_names_and_shapes_that_comfyui_reads(make_transformer):
    """Its arithmetic by hand: (W + alpha / rank B A) times dora_scale (out, 1) over the norm of its
    rows."""
    transformer = make_transformer()
    add_dora(transformer, 2, 4)
    torch.manual_seed(0)
    for parameter in trainable_state(transformer).values():
        torch.nn.init.normal_(parameter, std=0.1)
    tensors = native_dora(trainable_state(transformer), 4)
    assert len(tensors) == 4 * len(dora_layers(transformer))
    for name, layer in dora_layers(transformer).items():
        key = f"{PREFIX}{original_layer(name)}"
        up, down, alpha, scale = (
            tensors[f"{key}.{part}"]
            for part in ("lora_B.weight", "lora_A.weight", "alpha", "dora_scale")
        )
        assert scale.shape == (len(up), 1)
        adapted = layer.get_base_layer().weight + alpha.item() / len(down) * up @ down
        assert_close(scale * adapted / adapted.norm(dim=1, keepdim=True), merged_weight(layer))
