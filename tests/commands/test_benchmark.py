import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from acetate.commands import benchmark_step
from acetate.commands.benchmark_clock import (
    DisagreementError,
    failures_in,
    failures_of,
    share_of,
    timed,
)
from acetate.commands.benchmark_reader import ReaderLoad
from acetate.commands.benchmark_released import FactoredLoRA
from acetate.commands.benchmark_step import PARTS, WAYS, Workload
from acetate.memory import Flops
from acetate.models.adapters import MergedLoRA, trainable_state
from tests.compose import called

TINY = {
    "base_dim": 4,
    "lora_rank": 2,
    "frames": 9,
    "height": 16,
    "width": 16,
    "threads": 1,
    "device": "cpu",
}
SETTINGS = TINY | {
    "fused_norm": False,
    "lora_alpha": 1.0,
    "batch_size": 1,
    "checkpointing": False,
    "compile": False,
    "cudnn_benchmark": False,
    "precision": "float32",
    "seed": 0,
}


def load(**settings):
    return Workload(**(SETTINGS | settings))


def build_both(workload):
    return [benchmark_step.build(way, workload) for way in WAYS]


def run(*arguments, **settings):
    overrides = [
        f"{name}={value}"
        for name, value in (
            TINY | {"warmup": 0, "repeats": 2, "parts": "[step]"} | settings
        ).items()
    ]
    called("benchmark", *overrides, *arguments)


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 2, "lora_alpha": 8.0}, {"frames": 1}, {"frames": 17}]
)
def test_both_ways_agree(settings):
    workload = load(**settings)
    ours, released = build_both(workload)
    agreement = benchmark_step.check_agreement([ours, released], benchmark_step.draw_clip(workload))
    trained = trainable_state(ours)
    # no time convolution runs
    assert agreement["gradients"] == len(trained) - (8 if workload.frames == 1 else 0)
    assert agreement["gradient_of"] in trained
    assert len(trained) == len(trainable_state(released)) == 185
    assert not any(isinstance(module, MergedLoRA) for module in released.modules())
    assert sum(isinstance(module, FactoredLoRA) for module in released.modules()) == 2 * 38


def test_released_way_is_chunked_and_factored():
    """The frame counts that each convolution sees, rather than the whole clip once."""
    workload = load()
    _, released = build_both(workload)
    seen = []
    released.encoder.net.conv_in.register_forward_pre_hook(
        lambda _, x: seen.append(("encode", x[0].shape[2]))
    )
    released.merge.blocks.resnets[0].register_forward_pre_hook(
        lambda _, x: seen.append(("merge", x[0].shape[2]))
    )
    for decoder in (released.decoder_rgb, released.decoder_alpha):
        decoder.net.conv_in.register_forward_pre_hook(
            lambda _, x: seen.append(("decode", x[0].shape[2]))
        )
    with torch.no_grad():
        benchmark_step.step_loss(released, benchmark_step.draw_clip(workload), "float32")
    assert seen == 2 * [("encode", 1), ("encode", 4), ("encode", 4)] + 3 * [("merge", 1)] + 6 * [
        ("decode", 1)
    ]


@pytest.mark.parametrize("change", ["B", "bias", "scale"])
def test_disagreement_is_an_error(change):
    workload = load(lora_alpha=8.0)
    ours, released = build_both(workload)
    conv = released.decoder_alpha.net.conv_out
    with torch.no_grad():
        if change == "B":
            conv.B[0, 0] += 1
        elif change == "bias":
            conv.conv.bias += 1
        else:
            conv.scale *= 1.1
    with pytest.raises(DisagreementError, match="one way computes another step"):
        benchmark_step.check_agreement([ours, released], benchmark_step.draw_clip(workload))


def test_factored_lora_is_the_merged_convolution():
    conv = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
    lora = MergedLoRA(conv.weight, rank=2, alpha=4.0)
    torch.nn.init.normal_(lora.B)
    x = torch.randn(2, 3, 8, 8)
    merged = torch.nn.functional.conv2d(x, lora(conv.weight), conv.bias, stride=2, padding=1)
    assert_close(FactoredLoRA(conv, lora)(x), merged, rtol=0, atol=1e-5)


def check_output(folder, printed, repeats):
    assert "released / ours" in printed.out and "Both ways agree" in printed.out.replace("\n", " ")
    assert all(row in printed.out for row in ("step, s", "quickest, s", "encode", "backward, s"))
    assert "time ours" in printed.err and "time ours" not in printed.out
    written = json.loads((folder / "new/speed.json").read_text())
    assert "base_dim=4" in written["machine"]["command"]
    results = written["step"]
    assert results["workload"] == SETTINGS
    assert results["agreement"]["gradients"] == 185
    for way in WAYS:
        assert len(results[way]["seconds"]) == repeats and min(results[way]["seconds"]) > 0
        assert all(one.keys() == set(PARTS) for one in results[way]["parts"])
        assert all(min(one.values()) > 0 for one in results[way]["parts"])
        assert sys.platform != "linux" or results[way]["peak_memory"] > 0
    # no log, no temporary file
    assert sorted(path.name for path in folder.rglob("*")) == ["new", "speed.json"]


@pytest.mark.slow
@pytest.mark.long
def test_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A process takes seconds to import torch; the slow test below starts real ones.
    monkeypatch.setattr(
        benchmark_step, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers)
    )
    run(out="new/speed.json")
    check_output(tmp_path, capsys.readouterr(), repeats=2)


@pytest.mark.slow
@pytest.mark.long
def test_module_runs_from_anywhere(tmp_path):
    overrides = [
        f"{name}={value}"
        for name, value in (TINY | {"warmup": 1, "repeats": 1, "parts": "[step]"}).items()
    ]
    command = [sys.executable, "-m", "acetate.commands.benchmark", *overrides, "out=new/speed.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    check_output(tmp_path, SimpleNamespace(out=done.stdout, err=done.stderr), repeats=1)


def test_no_speed_without_agreement(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark_step, "LOSS_TOLERANCE", -1.0)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RuntimeError, match="step: DisagreementError: Loss differs"):
        run(out="speed.json")
    assert "quickest" not in capsys.readouterr().out
    assert json.loads((tmp_path / "speed.json").read_text())["step"].keys() == {"workload", "error"}


def test_bfloat16_runs():
    workload = load(precision="bfloat16")
    clip = benchmark_step.draw_clip(workload)
    for vae in build_both(workload):
        vae.cast_frozen("bfloat16")
        loss = benchmark_step.step_loss(vae, clip, "bfloat16")
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable_state(vae).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 8}, "8 frames; this VAE needs 4k.1 frames .* Use frames=5"),
        ({"width": 20}, "width 20; this VAE needs multiples of 8"),
        ({"device": "tpu"}, "device=tpu; known: cpu, cuda"),
    ],
)
def test_a_workload_that_cannot_run(settings, message):
    with pytest.raises(ValueError, match=message):
        load(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 8}, r"reader\.frames: 8 frames; .*Use frames=5"),
        ({"size": 40}, r"reader\.size=40; sides are multiples of 16"),
        ({"frames": 1}, r"reader\.frames=1; must be at least 5"),
    ],
)
def test_clips_that_cannot_be_drawn(settings, message):
    small = {"clips": 2, "frames": 5, "size": 16, "batch_size": 2, "repeats": 1, "seed": 0}
    with pytest.raises(ValueError, match=message):
        ReaderLoad(**small | settings)


def test_the_program_checks_its_settings(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"reader\.size=40; sides are multiples of 16"):
        run(**{"reader.size": 40})


@pytest.mark.parametrize("settings", [{}, {"batch_size": 2}, {"precision": "bfloat16"}])
def test_flops_of_a_step_are_those_of_real_tensors(settings):
    workload = load(**settings)
    vae = benchmark_step.build("ours", workload)
    vae.cast_frozen(workload.precision)
    with Flops() as flops:
        benchmark_step.step(vae, benchmark_step.draw_clip(workload), workload.precision)
    counted = benchmark_step.count_flops(workload)
    assert benchmark_step.whole(counted) == dict(flops.kinds)
    assert counted["backward"]["conv"] > counted["decode"]["conv"] > counted["merge"]["conv"] > 0


@pytest.mark.slow
@pytest.mark.long
def test_checkpointing_is_no_need():
    """What is computed again is not counted; it runs in ours, and hooks leave nothing behind."""
    workload = load(checkpointing=True)
    assert benchmark_step.count_flops(workload) == benchmark_step.count_flops(load())
    vae, clip = benchmark_step.build("ours", workload), benchmark_step.draw_clip(workload)
    with Flops() as flops:
        benchmark_step.step(vae, clip, "float32")
    assert flops.total > sum(benchmark_step.whole(benchmark_step.count_flops(load())).values())
    assert min(benchmark_step.time_parts(vae, clip, workload).values()) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vae.modules())


def test_share_of_ceilings_by_hand():
    flops = {"encode": {"conv": 20}, "merge": {}, "decode": {"conv": 60, "attention": 5}}
    flops["backward"] = {"conv": 160, "matmul": 15}
    rates = {"conv forward": 10.0, "conv backward": 20.0, "matmul": 5.0}
    assert benchmark_step.at_rates(flops, "decode") == {"conv forward": 60, "matmul": 5}
    needed = benchmark_step.at_rates(flops, "step")  # 8 s + 8 s + 4 s
    assert share_of(rates, needed, 40.0) == pytest.approx(0.5)


def test_a_failure_is_told_with_its_place_and_costs_no_other():
    results = {"step": {"ours": {"seconds": [1.0]}, "released": {}}, "dit": [{}]}
    with failures_in(results["step"]["released"], "cpu"):
        torch.empty(-1)
    assert [text.partition(":")[0] for text in failures_of(results)] == ["step.released"]
    rows = benchmark_step.summarise(
        {
            "ours": {"seconds": [2.0], "parts": [dict.fromkeys(PARTS, 0.5)]},
            "released": results["step"]["released"],
            "flops": {part: {"conv": 2} for part in PARTS},
        },
        None,
    )
    assert rows["step, s"] == {"ours": 2.0, "tflop": 8e-12}


def test_the_clock_counts_one_call():
    calls = []
    assert 0 < timed(lambda: calls.append(1), "cpu") < 1 and calls == [1]
