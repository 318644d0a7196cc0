"""Every shipped recipe composes, instantiates, and runs where a CPU can run it."""

import json

import pytest
import torch
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule, Trainer

from acetate.callbacks.dashboards import TensorBoardRun, WandbRun
from acetate.callbacks.metrics_file import MetricsFile
from acetate.commands.loggers import build_loggers, build_story
from acetate.released.dit import third
from acetate.released.flow import ReleasedLevels
from tests.compose import composed
from tests.paths import ROOT
from tests.processes import program

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
SMALL = [
    "data.frames=5",
    "data.height=16",
    "data.width=16",
    "data.batch_size=2",
    "data.num_workers=0",
]


def required(experiment):
    """What a recipe on real weights asks its user for."""
    if "wan2" not in experiment:
        return []
    if "joint" in experiment:  # of the plain VAE
        return ["data.latents=x"]
    return (
        ["data.latents=x", "rgba_vae=x"]
        if experiment.startswith(("dit", "i2v"))
        else ["data.shards=x"]
    )


def offline(experiment):
    """What stands in for downloads: the tiny base, and a perceptual loss without weights."""
    if "wan2" not in experiment:
        return []
    return [
        "wan=tiny",
        *(["task.base.expert=null"] if "wan22" in experiment else []),
        *(
            []
            if experiment.startswith(("dit", "i2v"))
            else ["loss/perceptual=encoder_features", "task.lpips=false"]
        ),
    ]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_composes(experiment, tmp_path):
    config = composed(tmp_path, f"experiment={experiment}", *required(experiment))
    assert config.name == experiment
    assert config.trainer.max_steps > 0
    assert config.objective.startswith("val/")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_instantiates(experiment, tmp_path):
    config = composed(
        tmp_path, f"experiment={experiment}", *required(experiment), *offline(experiment)
    )
    assert isinstance(instantiate(config.task), LightningModule)
    assert isinstance(instantiate(config.data), LightningDataModule)
    assert isinstance(instantiate(config.trainer), Trainer)
    assert [callback for callback in instantiate(config.callbacks).values() if callback is not None]


@pytest.mark.parametrize(
    "sweep", sorted(path.stem for path in (ROOT / "conf/sweep").glob("*.yaml"))
)
def test_sweeps_compose(sweep, tmp_path):
    composed(tmp_path, "experiment=vae_rgba", f"sweep={sweep}")


@pytest.mark.parametrize(
    "logger", sorted(path.stem for path in (ROOT / "conf/logger").glob("*.yaml"))
)
def test_loggers(logger, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = composed(tmp_path, "experiment=vae_rgba", f"logger={logger}")
    built = build_loggers(config)
    assert sum(isinstance(one, MetricsFile) for one in built) == 1
    assert len(built) == (1 if logger == "csv" else 2)
    if logger == "wandb":
        assert config.logger.wandb.offline
        # as of `wandb login`
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key")
        assert not composed(tmp_path, "experiment=vae_rgba", "logger=wandb").logger.wandb.offline


def test_all_loggers_at_once(tmp_path):
    built = build_loggers(
        composed(tmp_path, "experiment=vae_rgba", "logger=[wandb,tensorboard,csv]")
    )
    assert {type(one) for one in built} == {MetricsFile, WandbRun, TensorBoardRun} and len(
        built
    ) == 3
    with pytest.raises(ValueError, match=r"logger\.offline=True; below logger are loggers by name"):
        build_loggers(
            composed(tmp_path, "experiment=vae_rgba", "logger=wandb", "+logger.offline=true")
        )


@pytest.mark.parametrize(("experiment", "own"), [("vae_rgba", "panels"), ("dit_dora", "samples")])
def test_the_average_is_beside_what_a_stage_has(experiment, own, tmp_path):
    plain = composed(tmp_path, f"experiment={experiment}").callbacks
    averaged = composed(tmp_path, f"experiment={experiment}", "callbacks=ema").callbacks
    assert averaged[own] == plain[own] is not None
    assert {name for name in averaged if averaged[name] != plain.get(name)} == {"ema"}


def test_unknown_names_are_named(tmp_path):
    with pytest.raises(MissingConfigException, match="vae_rgbx"):
        composed(tmp_path, "experiment=vae_rgbx")
    with pytest.raises(ConfigCompositionException, match=r"task\.learning_rate"):
        composed(tmp_path, "experiment=vae_rgba", "task.learning_rate=1")


def test_released_dit_choices(tmp_path):
    config = composed(tmp_path, "experiment=dit_dora", "reproduce=upstream_dit")
    task = instantiate(config.task)
    assert isinstance(task.levels, ReleasedLevels)
    assert (task.warmup, task.mean_shift) == (third, 0.05)
    assert task.adapter_dtype == torch.bfloat16


def run_train(tmp_path, *arguments):
    return program(tmp_path / "printed", "train.py", *arguments, f"paths.outputs={tmp_path}")


@pytest.mark.slow
def test_help_names_every_experiment(tmp_path):
    code, printed = run_train(tmp_path, "--help")
    assert code == 0, printed
    assert "resume=last" in printed
    assert all(name in printed for name in EXPERIMENTS)


@pytest.mark.slow
@pytest.mark.long
def test_multirun_has_a_folder_per_job_and_returns_the_objective(tmp_path, shards):
    small = [
        *SMALL,
        f"data.shards={shards}",
        "data.val_clips=2",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    ]
    modes = "loss.diffusion.mode=off,opaque,bidirectional"
    code, printed = run_train(
        tmp_path, "-m", "experiment=vae_rgba", modes, "callbacks=base", *small
    )
    assert code == 0, printed[-2000:]
    folders = sorted(tmp_path.glob("vae_rgba/sweep_*/[0-9]"))
    overrides = [(folder / ".hydra/overrides.yaml").read_text() for folder in folders]
    for mode, text in zip(("off", "opaque", "bidirectional"), overrides, strict=True):
        assert f"loss.diffusion.mode={mode}" in text
    assert len(list(tmp_path.glob("vae_rgba/sweep_*/*/checkpoints/last.ckpt"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["wan_tiny_vae", "wan_tiny_dit"])
def test_base_recipes_run(experiment, tmp_path):
    small = ["task.transformer.num_layers=1", "data.clips=128", f"data.folder={tmp_path}/latents"]
    extra = [] if experiment == "wan_tiny_vae" else small
    steps = [
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "data.val_clips=2",
        f"task.save_to={tmp_path}/base",
    ]
    code, printed = run_train(tmp_path, f"experiment={experiment}", *SMALL, *steps, *extra)
    assert code == 0, printed[-2000:]
    assert list(tmp_path.glob("base/**/*.safetensors"))


@pytest.mark.slow
def test_the_released_vae_recipe_trains_validates_and_is_evaluated(tmp_path, shards):
    """Its decoder keeps three channels of alpha, of which panels and metrics see the mean."""
    recipe = [
        "experiment=vae_rgba",
        "reproduce=upstream",
        "loss/perceptual=encoder_features",
        *SMALL,
    ]
    recipe += [
        f"data.shards={shards}",
        "data.val_clips=2",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    ]
    code, printed = run_train(tmp_path, *recipe)
    assert code == 0, printed[-2000:]
    (run,) = tmp_path.glob("vae_rgba/*")
    assert list(run.glob("panels/step_00000002/*.png"))
    places = [f"paths.outputs={tmp_path}", "resume=last"]
    code, printed = program(tmp_path / "printed", "acetate.commands.evaluate", *recipe, *places)
    assert code == 0, printed[-2000:]
    assert "alpha/mae" in next(iter(json.loads((run / "evaluation.json").read_text()).values()))


@pytest.mark.slow
def test_the_released_dit_recipe_trains_validates_and_samples(tmp_path, cached):
    latents, adapters = cached
    recipe = [
        "experiment=dit_dora",
        "reproduce=upstream_dit",
        f"data.latents={latents}",
        f"rgba_vae={adapters}",
    ]
    recipe += [
        "data.num_workers=0",
        "data.batch_size=2",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    ]
    frames = [
        "callbacks.samples.frames=5",
        "callbacks.samples.solver.steps=2",
        "callbacks.samples.prompts=[smoke]",
    ]
    code, printed = run_train(tmp_path, *recipe, *frames)
    assert code == 0, printed[-2000:]
    assert list(tmp_path.glob("dit_dora/*/samples/step_00000002/sheet.png"))


def test_train_names_a_missing_checkpoint(tmp_path):
    code, printed = run_train(tmp_path, "experiment=vae_rgba", "resume=last")
    assert code != 0
    assert "no last.ckpt below" in printed


@pytest.mark.parametrize(
    ("experiment", "frames"), [("vae_rgba", 9), ("vae_rgba", 1), ("dit_dora", None)]
)
def test_ddp_knows_stills(experiment, frames, tmp_path):
    more = [] if frames is None else [f"data.frames={frames}"]
    strategy = composed(tmp_path, f"experiment={experiment}", "trainer=ddp", *more).trainer.strategy
    assert strategy.find_unused_parameters == (frames == 1)
    assert "forward_sync_buffers" not in strategy  # new in torch 2.13
    several = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.enable_progress_bar=false"]
    default = instantiate(
        composed(tmp_path, f"experiment={experiment}", *several, *more).trainer
    ).strategy
    assert default._ddp_kwargs == {
        "find_unused_parameters": frames == 1,
        "broadcast_buffers": False,
    }


@pytest.mark.parametrize(
    ("experiment", "sample"),
    [
        ("dit_joint", "dora={run} prompt="),
        ("i2v_dora", "dora={run} image=PICTURE.png prompt="),
        ("dit_dora_wan22_a14b", "dora={run} dora_2=RUN_OF_LOW prompt="),
        ("vae_rgba", None),
    ],
)
def test_a_run_says_what_can_come_next(tmp_path, experiment, sample):
    said = build_story(composed(tmp_path, f"experiment={experiment}")).commands
    assert said["evaluate"] == f"acetate evaluate run={tmp_path}"
    assert said["export"] == f"acetate export checkpoint={tmp_path} to=acetate"
    if sample is None:
        assert "sample" not in said
    else:
        assert said["sample"].startswith("acetate sample " + sample.format(run=tmp_path))


def test_a_base_is_not_sampled_by_the_run_that_trains_it(tmp_path):
    assert list(build_story(composed(tmp_path, "experiment=wan_tiny_dit")).commands) == ["go on"]
