"""`checkpointing: auto`, on cards that are not there."""

import json

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from acetate.commands import checkpointing, estimate
from acetate.commands.checkpointing import settle_checkpointing, settled
from acetate.commands.estimate import footprint
from acetate.memory import RESERVE
from tests.compose import called, composed

GIB = 2**30
SMALL = ["data.frames=5", "data.height=16", "data.width=16", "data.batch_size=2"]
VAE = ["experiment=vae_rgba", "model.checkpointing=auto", "loss.diffusion.mode='off'", *SMALL]


def on_card(monkeypatch, gib, gpus=1):
    monkeypatch.setattr(checkpointing, "card", lambda trainer: (gib, gpus))


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A step without checkpointing, as it was measured, and the GiB of a card that it fits by a
    hair."""
    config = composed(tmp_path_factory.mktemp("step"), *VAE)
    measured = footprint(settled(config, False))
    return measured, measured[1].held(1, False) / GIB / (1 - RESERVE)


def test_off_where_it_fits_and_on_where_not(step, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    config, (measured, fits) = composed(tmp_path, *VAE), step
    monkeypatch.setattr(estimate, "footprint", lambda config: measured)
    # DDP has the gradients once more
    for gib, gpus, value in (
        (1.01 * fits, 1, False),
        (0.99 * fits, 1, True),
        (1.01 * fits, 8, True),
    ):
        on_card(monkeypatch, gib, gpus)
        assert settle_checkpointing(config, None, None).model.checkpointing is value
        said = f"model.checkpointing={str(value).lower()} (auto): without it a step takes"
        assert said in caplog.text
        caplog.clear()
    assert config.model.checkpointing == "auto"  # as it was given


@pytest.mark.slow
def test_the_largest_clips_of_a_cache_count(tmp_path, cached, monkeypatch, caplog):
    caplog.set_level("INFO")
    latents = f"data.latents={cached[0]}"
    config = composed(tmp_path, "experiment=dit_dora", latents, "task.checkpointing=auto")
    on_card(monkeypatch, 80)
    data = instantiate(config.data)
    assert settle_checkpointing(config, None, data).task.checkpointing is False
    assert "16 x 5 frames of 24x24" in caplog.text


@pytest.mark.parametrize(
    ("also", "value"), [("task.base.offload=true", True), ("task.base.offload=false", False)]
)
def test_what_other_settings_leave(also, value, tmp_path):
    """On a CPU, off unless something needs it."""
    config = composed(tmp_path, "experiment=dit_dora", "task.checkpointing=auto", also)
    assert settle_checkpointing(config, None, None).task.checkpointing is value


def test_an_unknown_base_is_trained_with_it(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    settings = ["task.checkpointing=auto", f"wan.transformer={tmp_path}"]
    on_card(monkeypatch, 80)
    config = composed(tmp_path, "experiment=dit_dora", *settings)
    assert settle_checkpointing(config, None, None).task.checkpointing is True
    assert "the shape of this DiT is not known" in caplog.text


@pytest.mark.slow
def test_a_run_records_its_choice_and_keeps_it(tmp_path, shards, monkeypatch, capsys):
    own = ["name=a", f"paths.outputs={tmp_path}", f"data.shards={shards}", "data.num_workers=0"]
    quick = ["callbacks.panels=null"]
    monkeypatch.setattr(checkpointing, "card", lambda trainer: None)
    called("train", *VAE, *own, *quick, "trainer.max_steps=1")
    (run,) = (tmp_path / "a").iterdir()
    assert OmegaConf.load(run / ".hydra/config.yaml").model.checkpointing is False
    on_card(monkeypatch, 0.001)  # on which it would be on
    called("train", f"resume={run}", "trainer.max_steps=2")
    told = (run / "train.log").read_text()
    assert f"model.checkpointing=false (auto): as {run} has it" in told
    assert "finished at step 2" in told


@pytest.mark.slow
@pytest.mark.long
def test_estimate_says_what_it_becomes(tmp_path, capsys):
    out = tmp_path / "out.json"
    called("estimate", *VAE, f"out={out}")
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "model.checkpointing=true " in printed and "model.checkpointing=false " in printed
    assert "80 GiB  fits one GPU; model.checkpointing=auto is false" in printed
    assert found["checkpointing"]["24"] is False
    less, more = (found[name]["1"]["total"] for name in ("bytes_per_gpu", "without_checkpointing"))
    assert less < more
    assert "less memory: model" not in printed
