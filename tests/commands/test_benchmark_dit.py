import json

import pytest
import torch

from acetate.commands import benchmark_dit
from acetate.commands.benchmark_clock import DisagreementError
from acetate.commands.benchmark_dit import DiTLoad
from acetate.commands.benchmark_flops import Shape, forward_flops, needed_flops
from acetate.memory import Flops
from tests.commands.test_benchmark import run
from tests.fake_gpu import fake_gpu

SETTINGS = {
    "size": "tiny",
    "layers": 2,
    "shapes": ((5, 32, 32),),
    "prompt_length": 6,
    "rank": 2,
    "alpha": 2.0,
    "checkpointing": True,
    "keep_attention": False,
    "ways": ("stock", "ours"),
    "warmup": 1,
    "repeats": 1,
    "device": "cpu",
    "precision": "float32",
    "seed": 0,
}
SHAPE = Shape(5, 32, 32, 6)


def load(**settings):
    return DiTLoad(**SETTINGS | settings)


def built(way="stock", **settings):
    return benchmark_dit.build(way, load(**settings))


def batch_of(transformer, device="cpu"):
    return benchmark_dit.draw(SHAPE, transformer.config.text_dim, device, 0)


def test_forward_arithmetic_is_what_torch_counts():
    transformer = benchmark_dit.blank("tiny", 3, "float32")
    benchmark_dit.fill(transformer, "cpu", 0)
    x, timestep, context, _ = batch_of(transformer)
    with torch.no_grad(), Flops() as flops:
        transformer(x, timestep, context)
    found = forward_flops(transformer.config, 3, SHAPE)
    assert found["attention"] == flops.kinds["attention"]
    assert sum(found.values()) == flops.total


def test_needed_arithmetic_is_what_torch_counts():
    """Of the frozen DiT, with gradients of the input of its blocks alone: each of their matrices
    twice, but for the prompt's; torch counts 2.5 times forward for attention's backward pass."""
    transformer = benchmark_dit.blank("tiny", 3, "float32").requires_grad_(False)
    benchmark_dit.fill(transformer, "cpu", 0)
    x, timestep, context, _ = batch_of(transformer)
    transformer.patch_embedding.register_forward_hook(lambda _, __, out: out.requires_grad_())
    with Flops() as flops:
        transformer(x, timestep, context, return_dict=False)[0].sum().backward()
    needed = needed_flops(transformer.config, 3, SHAPE, rank=0)
    assert needed["attention"] / 3 * 3.5 == flops.kinds["attention"]
    assert needed["matmul"] == flops.kinds["matmul"] + flops.kinds["conv"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_done_are_those_of_real_tensors(checkpointing):
    work = load(checkpointing=checkpointing, layers=3)
    transformer = benchmark_dit.build("stock", work)
    with Flops() as flops:
        benchmark_dit.train_step(transformer, batch_of(transformer), "float32")
    assert benchmark_dit.count_way("stock", work, SHAPE) == dict(flops.kinds)


def test_ways_have_the_same_weights():
    ours, stock = built("ours"), built("stock")
    names = [name for name, p in stock.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 10 * 3 and all("lora_" in name for name in names)
    for (name, one), (other_name, other) in zip(
        ours.named_parameters(), stock.named_parameters(), strict=True
    ):
        assert name == other_name and torch.equal(one, other)


def test_ways_are_held_against_float64():
    found = benchmark_dit.check_ways(load())
    for way in ("stock", "ours"):
        assert 0 < found[way]["float32"]["gradient"] < 1e-5
        assert 1e-4 < found[way]["bfloat16"]["gradient"] < 0.1
        assert found[way]["float32"]["holds"] and found[way]["bfloat16"]["holds"]


def test_a_way_that_computes_another_step_is_not_timed(monkeypatch):
    """The other ways keep their figures."""
    prepare = benchmark_dit.prepare

    def wrong(transformer, way, **settings):
        prepare(transformer, way, **settings)
        if way == "ours":
            transformer.proj_out.register_forward_hook(lambda _, __, out: out * 1.01)

    monkeypatch.setattr(benchmark_dit, "prepare", wrong)
    failed = benchmark_dit.check_ways(load())
    assert "DisagreementError: the velocity differs" in failed["ours"]["error"]
    timed = benchmark_dit.time_shape(load(), (5, 32, 32), failed)
    assert "seconds" not in timed["ways"]["ours"] and timed["ways"]["stock"]["seconds"]
    assert benchmark_dit.summarise(timed, None).keys() == {"stock"}


def test_what_is_no_number_does_not_agree():
    with pytest.raises(DisagreementError, match="gradient"):
        benchmark_dit.judged({"gradient": float("nan")}, {}, "float32")
    beside = {"bfloat16": {"gradient": 0.01}}
    assert not benchmark_dit.judged({"gradient": 0.0111}, beside, "bfloat16")["holds"]
    assert benchmark_dit.judged({"gradient": 0.0109}, beside, "bfloat16")["holds"]


def test_on_a_card_nothing_leaves_it():
    with fake_gpu() as gpu:
        transformer = built("ours", device="cuda", precision="bfloat16")
        batch = batch_of(transformer, "cuda")
        gpu.waits.clear()
        benchmark_dit.train_step(transformer, batch, "bfloat16")
        grads = [p.grad for p in transformer.parameters() if p.requires_grad]
        assert all(grad is not None and grad.is_cuda for grad in grads)
    assert not gpu.waits and all(attention.fused for attention in gpu.attentions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 9}, r"dit\.layers=9; a DiT of size tiny has 8"),
        ({"shapes": ((6, 32, 32),)}, "6 frames; this VAE needs 4k.1"),
        ({"shapes": ((5, 40, 32),)}, "height 40; the DiT needs multiples of 16"),
    ],
)
def test_work_that_cannot_run(settings, message):
    with pytest.raises(ValueError, match=message):
        load(**settings)


@pytest.mark.slow
@pytest.mark.long
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"ceilings.side": 16, "ceilings.gib": 1e-5, "ceilings.repeats": 1}
    small |= {"dit.ways": "[stock,ours]", "dit.shapes": "[[5,32,32]]", "dit.layers": 1}
    run(parts="[ceilings,dit]", out="speed.json", **small)
    printed = capsys.readouterr().out
    assert "share of the ceilings" in printed and "error against float64" in printed
    (shape,) = json.loads((tmp_path / "speed.json").read_text())["dit"]["shapes"]
    for row in shape["summary"].values():
        assert row["step, s"] > 0 and row["all layers, s"] == 8 * row["step, s"]
        assert row["share of the ceilings"] > 0
        assert row["TFLOP done"] * 1e12 > sum(shape["needed"].values())
