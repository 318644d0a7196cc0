"""Every setting has a rule, every default keeps it, and what breaks one is named."""

import pytest
import yaml
from hydra import compose, initialize_config_dir

from acetate.commands import as_on_gpu
from acetate.commands.checks import MISSING, check_settings, rule_of, settings_of
from acetate.settings import SettingError
from tests.compose import composed
from tests.paths import ROOT

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
PROGRAMS = sorted(
    f"{folder}/{path.stem}"
    for folder in ("command", "prep")
    for path in (ROOT / "conf" / folder).glob("*.yaml")
)
# Constants of code that is not ours, which refuses what it cannot take
OF_OTHERS = ("task.vae.", "task.transformer.", "trainer.plugins", "callbacks.checkpoint.")
RUN_QUESTIONS = ("estimate", "cost", "evaluate")


def of_program(config_name: str, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(config_name, [*overrides])


@pytest.fixture(autouse=True)
def no_gpu():
    with as_on_gpu(False):
        yield


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_setting_of_a_run_has_a_rule_that_its_default_keeps(experiment, tmp_path):
    config = composed(tmp_path, f"experiment={experiment}")
    settings = list(settings_of("train", config))
    without = [
        path
        for path, value, rule in settings
        if rule is None and not path.startswith(OF_OTHERS) and value is not None
    ]
    assert not without
    for path, value, rule in settings:
        if rule is not None and value != MISSING:
            rule.check(path, value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_of_a_program_has_a_rule_that_its_default_keeps(program):
    name = program.rpartition("/")[2]
    for path, value, rule in settings_of(name, of_program(program)):
        if name not in RUN_QUESTIONS or path.startswith(("cost.", "out", "run", "checkpoint")):
            assert rule is not None, f"{program}: {path}"
            if value != MISSING:
                rule.check(path, value)


@pytest.mark.parametrize(
    "override",
    [
        "model.lora_rank=0", "model.lora_rank=x", "model.lora_alpha=nan", "task.lr=abc",
        "task.lr=null",
        "task.lr=0", "task.lr=.inf", "task.betas=[1,0]", "task.betas=0.9", "task.warmup_steps=-1",
        "task.decay_steps=None", "task.decay_steps=0", "trainer.max_steps=abc",
        "trainer.max_steps=1.5",
        "trainer.val_check_interval=0", "trainer.val_check_interval=0.5",
        "trainer.accumulate_grad_batches=0",
        "trainer.precision=16", "data.batch_size=1.5", "data.batch_size=two",
        "data.batch_size=true",
        "data.cache_mb=-1", "data.shards=null", "data.shards=[]", "data.shards=''",
        "data.shards={a: -1}",
        "data.num_workers=100000", "data.frames=8", "data.scale_range=[1,0.5]", "data.flip=2",
        "loss.diffusion.mode=none", "loss.diffusion.weight=-1", "loss.reconstruction.eps=1",
        "wan.dtype=float7", "name=null", "name=../x", "name=/x", "name=a/../../b", "name=''",
        "name=5",
        "objective=nope", "objective=5", "seed=-1", "seed=1.0", "callbacks.panels.clips=0",
        "callbacks.throughput.every_n_steps=0",
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_named(override, tmp_path):
    name = override.partition("=")[0]
    config = composed(tmp_path, "experiment=vae_rgba", f"data.shards={tmp_path}", override)
    with pytest.raises(SettingError) as caught:
        check_settings("train", config)
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name}=")
    assert "must be" in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.batch_size=60000", "data.frames=81", "data.height=480", "data.width=832"],
        ["data.height=16000", "data.width=16000", "data.frames=81"],
    ],
)
def test_a_batch_that_no_memory_holds(overrides, tmp_path):
    with pytest.raises(SettingError, match=r"GiB, and this machine has \d+\. Lower"):
        check_settings("train", composed(tmp_path, "experiment=vae_rgba", *overrides))


def test_a_setting_without_a_value(tmp_path):
    config = composed(tmp_path, "experiment=vae_rgba_wan21")
    with pytest.raises(SettingError, match=r"data\.shards has no value.*Give data\.shards="):
        check_settings("train", config)


@pytest.mark.parametrize(
    ("program", "override"),
    [
        ("sample", "count=0"), ("sample", "batch_size=0"), ("sample", "guide.centre=[0.5]"),
        ("sample", "seed=x"), ("sample", "guide.axes=[0,1]"), ("sample", "formats=[]"),
        ("sample", "formats=[mp5]"),
        ("sample", "fps=0"), ("export", "shift=nan"), ("export", "to=onnx"), ("export", "rank=0"),
        ("cache_latents", "frames=9"), ("cache_latents", "sizes=[48,48]"),
        ("cache_latents", "area=1e12"),
        ("cache_latents", "ellipse.threshold=nan"), ("cache_latents", "variants=9"),
        ("shard", "max_mb=-5"),
        ("shard", "fps=1e7"), ("shard", "bleed=100000"), ("inspect", "lengths=[]"),
        ("filter", "workers=-1"),
        ("synthesize", "frames=8"), ("caption", "overwrite=some"), ("ingest", "memory_gb=0"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_of_a_program_is_named(program, override):
    folder = "command" if (ROOT / f"conf/command/{program}.yaml").exists() else "prep"
    given = {
        "to": "acetate",
        **dict.fromkeys(("source", "out", "shards", "manifest", "rgba_vae", "checkpoint"), "x"),
    }
    config = of_program(f"{folder}/{program}")
    name = override.partition("=")[0]
    needed = [f"{key}={text}" for key, text in given.items() if key in [*config] and key != name]
    with pytest.raises(SettingError) as caught:
        check_settings(program, of_program(f"{folder}/{program}", *needed, override))
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("program", "broken"),
    [
        ("sample", "guide.end_axes=0.5"),
        ("export", "dit=lora dtype=float8"),
        ("cost", "cost.strategies=[zero] cost.strategies=[] cost.strategies=ddp cost.gpus=[0] "
         "cost.gpus=[1.5] cost.gpus=[true] cost.gpus=8 cost.clips=-1 cost.samples_per_clip=0.5 "
         "cost.prompt_tokens=-5 cost.global_batch=0 cost.clip_mb=null cost.least_scaling=2 "
         "cost.efficiency=1.5 cost.overlap=-1 cost.latency_us=-1 cost.gpu.link_gb_s=0"),
        ("benchmark", "parts=[] parts=[writer] parts=reader precision=float16 lora_rank=0 "
         "repeats=0 warmup=-1 dit.size=2B dit.ways=[theirs] reader.clips=0 evaluate.clips=1"),
        ("cache_latents", "frames=[] frames=[9,x] sizes=[48,48] dtype=float64 per_tar=0 "
         "smallest=0 variants=9 background=teal condition=second max_aspect=0.5 scheme=both "
         "long_prompts=cut"),
        ("shard", "min_alpha=0 max_frames=0 max_side=0 fps=0 bleed=-1 full=maybe executor=slurm"),
        ("inspect", "sample=0 lengths=5"),
        ("filter", "duplicates.keep=last duplicates.distance=33 duplicates.color=256"),
        ("caption", "pictures=0 images=two background=red dtype=float7"),
        ("synthesize", "clips=0 size=[[16,24,3]] workers=-1"),
        ("render", "kinds=[galss]"),
    ],
)  # fmt: skip
def test_values_that_rules_refuse(program, broken):
    for text in broken.split():
        name, _, value = text.partition("=")
        assert not rule_of(program, name).holds(yaml.safe_load(value)), text


def test_the_longest_name_decides():
    assert rule_of("train", "data.frames").holds(9)
    assert not rule_of("cache_latents", "frames").holds(9)
    assert rule_of("cache_latents", "frames").holds([9, 17])
    assert rule_of("train", "data.unheard_of") is None


def test_errors_come_whole_from_another_process():
    import pickle

    error = pickle.loads(pickle.dumps(SettingError("task.lr", "x", "task.lr=x: must be a number.")))
    assert (error.name, error.value, str(error)) == ("task.lr", "x", "task.lr=x: must be a number.")
