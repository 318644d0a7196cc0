import json
from dataclasses import replace

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from acetate.commands.cost import check, limit, shares, table, verdicts
from acetate.commands.program import composed
from acetate.cost import Cost
from tests.compose import called
from tests.paths import ROOT


@pytest.fixture
def run(monkeypatch, two_blocks):
    def run(*arguments):
        called("cost", two_blocks, *arguments)

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    yield run
    GlobalHydra.instance().clear()


def one(gpus, step):
    return Cost(
        gpus=gpus, compute=1.0, communication=0.0, step=step, sent=0.0, clips_per_second=1.0,
        data_per_node=1.0,
        fits=True,
    )  # fmt: skip


def test_limit_is_looked_for_beyond_the_table():
    bad = limit(lambda gpus: one(gpus, 1 + gpus / 10_000), 0.8)
    assert bad is not None and bad.gpus == 4096  # 71 %; 83 % at 2048
    assert limit(lambda gpus: one(gpus, 1.0), 0.8) is None


def test_a_batch_is_shared_in_whole_passes():
    assert shares(16, 2, [1, 2, 3, 16]) == {1: 8, 2: 4, 8: 1}
    assert shares(12, 2, [4]) == {6: 1}


def test_verdicts():
    fixed = [one(1, 8.0), one(8, 1.0)]
    weak, strong = verdicts(one(4096, 1.4096), fixed, 0.8, batch=16, batch_size=2)
    assert weak.endswith(
        "at a time: stops scaling at 4,096 GPUs: 70.9% of a step computes, less than 80%"
    )
    assert weak.startswith("where every GPU gets 2 clips at a time: ")
    assert strong == (
        "where all GPUs share 16 clips a step (cost.global_batch): a step takes 8 s on 1, 1 s on "
        "8; stops scaling at 8 GPUs, as no clips are left for more"
    )
    assert verdicts(None, fixed, 0.8, batch=8, batch_size=1)[0].endswith(
        "at least 80% of a step computes up to 1,048,576 GPUs"
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_fixed_batch_ends_with_its_clips(run, tmp_path, capsys):
    """The published 8 clips: on fewer GPUs a step takes as many passes more, on more GPUs none is
    left."""
    run(
        "experiment=dit_dora",
        "rgba_vae=x",
        "data.batch_size=1",
        "cost.gpus=[1,4,16]",
        f"out={tmp_path / 'x'}",
    )
    assert "where all GPUs share 8 clips a step" in capsys.readouterr().out
    found = json.loads((tmp_path / "x").read_text())
    assert found["global_batch"] == 8 and found["limit"]["ddp"] > 1
    one, four, most = found["fixed_batch"]["ddp"]
    assert [each["gpus"] for each in (one, four, most)] == [1, 4, 8]
    assert (
        one["compute"] == pytest.approx(8 * most["compute"]) == pytest.approx(4 * four["compute"])
    )


def test_short_times_keep_their_digits():
    """A step of 12 microseconds is no step of 0.000 s."""
    short = replace(one(8, 1.2345e-5), sent=4567.0, clips_per_second=1843.6)
    assert [next(iter(column.cells)) for column in table([short]).columns][:6] == [
        "8", "1.23e-05", "1", "0", "4.57e-06", "1,844"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
def test_dit_stage(run, tmp_path, capsys):
    out = tmp_path / "cost.json"
    run(
        "experiment=dit_dora",
        "rgba_vae=x",
        "data.batch_size=1",
        "cost.gpus=[16,1]",
        "gpu@cost.gpu=a100",
        f"out={out}",
    )
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "dit_dora on A100 80 GB SXM" in shown and "FSDP2 " in shown
    assert (
        "a sample, 4 (cost.samples_per_clip" in shown
        and found["stored_bytes"] == 4e6 * found["sample_bytes"]
    )
    assert [one["gpus"] for one in found["fsdp"]] == [1, 16] and found["gpu"]["peak_tflops"] == 312
    assert found["ddp"][0]["compute"] == pytest.approx(found["flops"] / (312e12 * 0.4))
    assert "40% of 312 TFLOP/s (bf16-mixed)" in shown
    assert (
        found["ddp"][0]["communication"]
        == 0
        < found["ddp"][1]["communication"]
        < found["fsdp"][1]["communication"]
    )


@pytest.mark.slow
@pytest.mark.long
def test_full_precision_has_its_own_peak(run, tmp_path, capsys):
    run(
        "experiment=dit_dora",
        "rgba_vae=x",
        "trainer.precision=32-true",
        "cost.gpus=[1]",
        f"out={tmp_path / 'x'}",
    )
    assert "40% of 67 TFLOP/s (32-true)" in capsys.readouterr().out
    assert json.loads((tmp_path / "x").read_text())["gpu"]["peak_tflops"] == 67


def test_vae_stage(run, capsys):
    clip = (
        "data.frames=1",
        "data.height=16",
        "data.width=16",
        "loss.diffusion.mode='off'",
        "cost.clip_mb=3",
    )
    run("experiment=vae_rgba", *clip, "cost.gpus=[1]", "cost.strategies=[ddp]")
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "clip shards: 3 MB a clip (cost.clip_mb; 81 frames at 480x832 take about 13 in FFV1), "
        "read whole" in shown
    )
    assert ", 3 TB for 1,000,000 clips" in shown


def test_defaults_are_those_of_what_is_made():
    """As many samples of a clip as cache_latents makes, and clips as the DiT takes them, not the
    VAE's crops."""
    settings = OmegaConf.load(ROOT / "conf/command/cost.yaml").cost
    clip = OmegaConf.load(ROOT / "conf/wan/wan21_1b.yaml")  # which the 14B's begins with
    assert (
        settings.samples_per_clip == OmegaConf.load(ROOT / "conf/prep/cache_latents.yaml").variants
    )
    raw = 4e-6 * clip.frames * clip.height * clip.width
    assert settings.clip_mb == pytest.approx(0.1 * raw, rel=0.01)


@pytest.fixture(scope="module")
def composed_cost():
    GlobalHydra.instance().clear()
    return composed("command/cost", ["experiment=dit_dora", "rgba_vae=x"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cost.gpu", "h100", "chosen with gpu@cost.gpu=h100"),
        ("cost.global_batch", 12, "cost.global_batch=12; a multiple of data.batch_size=16"),
    ],
)
def test_settings_are_checked(composed_cost, name, value, message):
    config = composed_cost.copy()
    OmegaConf.update(config, name, value, merge=False)
    with pytest.raises(ValueError, match=message):
        check(config)


def test_the_program_checks_its_settings(run):
    with pytest.raises(ValueError, match=r"cost\.gpus=\[0\]"):
        run("experiment=dit_dora", "rgba_vae=x", "cost.gpus=[0]")
