import json

from torch.nn.attention import SDPBackend

from acetate.commands.benchmark_ceilings import (
    BACKENDS,
    CeilingsLoad,
    Convolution,
    benchmark_ceilings,
    heaviest,
    rates_of,
    works,
)
from acetate.commands.benchmark_clock import DTYPES, failures_of
from tests.commands.test_benchmark import load, run
from tests.fake_gpu import fake_gpu

SIZES = CeilingsLoad(side=16, gib=1e-5, repeats=1)
SHAPES = {"5x32x32": (2, 8, 16)}
KINDS = {
    "matmul",
    "conv forward",
    "conv backward",
    "attention of 5x32x32, forward",
    "attention of 5x32x32, backward",
    "copy",
}


def test_the_heaviest_convolution_is_the_decoders():
    """At half and at full resolution, by hand: twice the channels, a quarter of the pixels."""
    found = heaviest(load(frames=9, height=32, width=16, base_dim=4))
    flops = 2 * 27 * 4 * 4 * 9 * 32 * 16
    assert found == [
        (Convolution((1, 8, 11, 16, 8), (8, 8, 3, 3, 3), (1, 1, 1), (0, 1, 1)), flops),
        (Convolution((1, 4, 11, 32, 16), (4, 4, 3, 3, 3), (1, 1, 1), (0, 1, 1)), flops),
    ]


def test_every_ceiling_has_a_rate():
    rows = benchmark_ceilings(SIZES, load(precision="bfloat16"), SHAPES)
    assert not [row for row in rows if "error" in row]
    rates = rates_of(rows)
    assert rates.keys() == KINDS and min(rates.values()) > 0


def test_the_best_of_a_kind_is_its_rate():
    rows = [{"kind": "matmul", "rate": rate} for rate in (2.0, 3.0, 1.0)]
    assert rates_of([*rows, {"what": "x", "error": "no memory"}]) == {"matmul": 3.0}


def test_a_kernel_that_the_device_lacks_is_no_failure(monkeypatch):
    """A CPU has no cuDNN."""
    monkeypatch.setitem(BACKENDS, "cpu", (None, SDPBackend.CUDNN_ATTENTION))
    rows = benchmark_ceilings(SIZES, load(), SHAPES)
    assert [row["what"] for row in rows if "missing" in row] == [
        "attention of 5x32x32, cudnn_attention"
    ]
    assert not list(failures_of(rows)) and rates_of(rows).keys() == KINDS


def test_on_a_card_nothing_leaves_it():
    """On a fake one, which refuses what mixes devices; it has no backends of attention to choose
    from."""
    workload = load(precision="bfloat16")
    object.__setattr__(workload, "device", "cuda")
    planned = list(works(SIZES, workload, SHAPES))
    assert sum(optional for _, optional, _ in planned) == 2
    with fake_gpu() as gpu:
        for _, optional, measures in planned:
            if optional:
                continue
            for _, count, call in measures("cuda", DTYPES["bfloat16"]):
                call()
                assert count > 0
    assert not gpu.waits and len(gpu.attentions) == 2
    assert all(convolution.channels_last for convolution in gpu.convolutions)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"ceilings.side": 16, "ceilings.gib": 1e-5, "ceilings.repeats": 1}
    run(parts="[ceilings]", out="speed.json", **small)
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    assert "16 x 16 matrices" in printed and "TFLOP/s" in printed
    kinds = {row["kind"] for row in written["ceilings"]["rows"]}
    assert {"matmul", "conv backward", "copy"} < kinds and "error" not in written["ceilings"]
