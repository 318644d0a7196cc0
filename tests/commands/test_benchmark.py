import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from acetate.commands import benchmark
from acetate.commands.benchmark import WAYS, DisagreementError, FactoredLoRA, Workload
from acetate.commands.benchmark_reader import ReaderLoad
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
SETTINGS = TINY | {"lora_alpha": 1.0, "batch_size": 1, "precision": "float32", "seed": 0}


def load(**settings):
    return Workload(**(SETTINGS | settings))


def build_both(workload):
    return [benchmark.build(way, workload) for way in WAYS]


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
    agreement = benchmark.check_agreement([ours, released], benchmark.draw_clip(workload))
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
        benchmark.step_loss(released, benchmark.draw_clip(workload), "float32")
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
        benchmark.check_agreement([ours, released], benchmark.draw_clip(workload))


def test_factored_lora_is_the_merged_convolution():
    conv = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
    lora = MergedLoRA(conv.weight, rank=2, alpha=4.0)
    torch.nn.init.normal_(lora.B)
    x = torch.randn(2, 3, 8, 8)
    merged = torch.nn.functional.conv2d(x, lora(conv.weight), conv.bias, stride=2, padding=1)
    assert_close(FactoredLoRA(conv, lora)(x), merged, rtol=0, atol=1e-5)


def check_output(folder, printed, repeats):
    assert "released / ours" in printed.out and "Both ways agree" in printed.out.replace("\n", " ")
    assert all(
        row in printed.out
        for row in ("step, median, s", "step, min, s", "encode", "merge", "decode")
    )
    assert "check" in printed.err and "check" not in printed.out
    results = json.loads((folder / "new/speed.json").read_text())
    assert results["workload"] == SETTINGS
    assert results["agreement"]["gradients"] == 185
    for way in WAYS:
        assert len(results[way]["seconds"]) == repeats
        for seconds in results[way]["seconds"]:
            parts = seconds["encode"] + seconds["merge"] + seconds["decode"] + seconds["backward"]
            assert 0 < parts <= seconds["step"]
        assert sys.platform != "linux" or results[way]["peak_memory"] > 0
    # no log, no temporary file
    assert sorted(path.name for path in folder.rglob("*")) == ["new", "speed.json"]


def test_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # A process takes seconds to import torch; the slow test below starts real ones.
    monkeypatch.setattr(
        benchmark, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers)
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
    monkeypatch.setattr(benchmark, "LOSS_TOLERANCE", -1.0)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(DisagreementError):
        run(out="speed.json")
    assert "step" not in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_bfloat16_runs():
    workload = load(precision="bfloat16")
    clip = benchmark.draw_clip(workload)
    for vae in build_both(workload):
        loss = benchmark.step_loss(benchmark.freeze_in(vae, "bfloat16"), clip, "bfloat16")
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable_state(vae).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 8}, "8 frames; this VAE needs 4k.1 frames .* Use frames=5"),
        ({"width": 20}, "width 20; this VAE needs multiples of 8"),
        ({"precision": "float16"}, "precision=float16; known: float32, bfloat16"),
        ({"device": "tpu"}, "device=tpu; known: cpu, cuda"),
        ({"lora_rank": 0}, "lora_rank=0; must be at least 1"),
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
        ({"clips": 0}, r"reader\.clips=0; must be at least 1"),
    ],
)
def test_clips_that_cannot_be_drawn(settings, message):
    small = {"clips": 2, "frames": 5, "size": 16, "batch_size": 2, "repeats": 1, "seed": 0}
    with pytest.raises(ValueError, match=message):
        ReaderLoad(**small | settings)


def test_steps_are_timed_once_at_least():
    with pytest.raises(ValueError, match="repeats=0; must be at least 1"):
        benchmark.benchmark(load(), 0, 0)
    with pytest.raises(ValueError, match="warmup=-1; must be at least 0"):
        benchmark.benchmark(load(), -1, 1)


@pytest.mark.parametrize("parts", [["step", "writer"], [], "reader"])
def test_parts_are_a_list_of_known_ones(parts):
    with pytest.raises(ValueError, match=r"parts=.*; a list of step, reader, one at least"):
        benchmark.main(OmegaConf.create({"out": None, "parts": parts}))


def test_the_program_checks_its_settings(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"reader\.size=40; sides are multiples of 16"):
        run(**{"reader.size": 40})
