"""Training of colour and alpha in one sequence on the shipped tiny DiT, and what its runs are good
for: real latents of the plain VAE, real Trainer."""

import json

import pytest
import torch
from hydra.utils import instantiate
from safetensors import safe_open
from torch.testing import assert_close

from acetate import RGBAPipeline, flow
from acetate.commands.same_base import SameBase
from acetate.data.shards import MANIFEST, ShardError
from acetate.draws import ClipDraws
from acetate.formats.checkpoints import read_trained
from acetate.models.adapters import trainable_state
from acetate.sampling import EllipsePath
from tests.commands.exported import export
from tests.compose import composed
from tests.conftest import TINY
from tests.tasks.test_dit import SMALL, fit

SAMPLED = [f"callbacks.samples.{name}" for name in (
    "frames=5", "height=24", "width=32", "solver.steps=1", "prompts=[smoke]")]  # fmt: skip


def config_for(run, latents, *overrides):
    samples = ["callbacks.samples=null"] if not any("samples" in o for o in overrides) else []
    return composed(
        run, "experiment=dit_joint", f"data.latents={latents}", *SMALL, *samples, *overrides
    )


@pytest.fixture(scope="module")
def run(cached_joint, tmp_path_factory):
    """Folder, task and losses of a run of four steps, with a validation and samples at its end."""
    folder = tmp_path_factory.mktemp("run")
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=4"]
    _, task, record = fit(config_for(folder, cached_joint, *steps, *SAMPLED))
    return folder, task, record


def test_the_cache_says_its_scheme(cached, cached_joint):
    one, both = (json.loads((x / MANIFEST).read_text()) for x in (cached[0], cached_joint))
    assert both["scheme"] == both["made_by"]["settings"]["scheme"] == "joint"
    assert "scheme" not in {*one, *one["made_by"]["settings"]}
    assert both["buckets"].keys() == one["buckets"].keys()
    (frames, *grid), (twice, *same) = (
        manifest["shards"][0]["samples"][0]["shape"] for manifest in (one, both)
    )
    assert (twice, same) == (2 * frames, grid)


def test_error_is_that_of_both_streams_at_one_level(tmp_path, cached_joint):
    config = config_for(tmp_path, cached_joint)
    task, data = instantiate(config.task), instantiate(config.data)
    data.setup()
    task.configure_model()
    batch = next(iter(data.train_dataloader()))
    draws = ClipDraws(batch["key"], 0, "x", device=torch.device("cpu"))
    noise, ids = draws.normal(batch["latents"].shape[1:]), torch.tensor([30, 800])
    with torch.no_grad():
        ours = task.errors(batch, noise, ids, batch["context"])
        sigma = flow.schedule().sigmas[ids][:, None, None, None, None]
        z = batch["latents"]
        x_t = sigma * noise + (1 - sigma) * z
        v = task.transformer(x_t, 1000 * sigma.flatten(), batch["context"], return_dict=False)[0]
    assert_close(ours, (v - (noise - z)).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_resume_is_exact(tmp_path, cached_joint, run):
    _, whole, losses = run
    fit(config_for(tmp_path, cached_joint, "trainer.max_steps=2", "task.decay_steps=4"))
    _, rest, after = fit(
        config_for(tmp_path, cached_joint, "trainer.max_steps=4"),
        resume=tmp_path / "checkpoints/last.ckpt",
    )
    assert after.losses == losses.losses[2:]
    trained = trainable_state(whole)
    assert any(value.abs().sum() > 0 for name, value in trained.items() if "alpha_embed" in name)
    for (name, one), other in zip(trained.items(), trainable_state(rest).values(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_holds_what_trains(run):
    folder, task, _ = run
    file = folder / "checkpoints/last.safetensors"
    trained = read_trained(str(file))
    assert trained.kind == "dit_joint" and "mean_shift" not in trained.facts
    assert trained.facts["rgb_attends_alpha"] is True
    with safe_open(file, "pt") as held:
        assert set(held.keys()) == trainable_state(task).keys()
    assert list(folder.glob("samples/step_00000004/sheet.png"))


@pytest.fixture
def pipeline(run):
    dora = str(run[0] / "checkpoints/last.safetensors")
    size = {
        "dora": dora,
        "rgba_vae": None,
        "frames": 5,
        "height": 24,
        "width": 32,
        "steps": 2,
        "device": "cpu",
    }
    return lambda **more: RGBAPipeline.load(**{**size, **more})


@pytest.mark.slow
def test_its_clips_have_colour_and_alpha(run, pipeline):
    model = pipeline()
    one, other = model(["a red disc", "smoke"], seed=3)
    assert (one.rgb.shape, one.alpha.shape) == ((3, 5, 24, 32), (1, 5, 24, 32))
    assert not torch.equal(one.alpha, other.alpha)
    (again,) = model("smoke", seed=4)
    assert_close(again.alpha, other.alpha, rtol=0, atol=1e-3)  # sums of another order
    task = run[1]
    x, timestep = torch.randn(1, 16, 4, 6, 8), torch.tensor([500.0])
    context = torch.randn(1, 64, task.transformer.config.text_dim)
    with torch.no_grad():
        assert_close(
            *(t(x, timestep, context).sample for t in (model.transformer, task.transformer)),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.slow
def test_what_a_joint_model_cannot_take_is_named(pipeline, cached, dora):
    for model, settings, message in (
        (pipeline(), {"guide": EllipsePath()}, r"last\.safetensors is a joint model: .*no guide"),
        (pipeline(mean_shift=0.5), {}, r"joint model: its noise has no mean shift.*Leave guide"),
        (pipeline(rgba_vae=str(cached[1])), {}, r"joint model, .*plain VAE\. Give rgba_vae=null"),
        (pipeline(few_step={"lora": "x"}), {}, r"few_step\.lora=x: .*joint model\. Leave it out"),
        (pipeline(dora=str(dora)), {}, r"rgba_vae=null is the plain VAE, .*dit_joint alone"),
    ):
        with pytest.raises(ValueError, match=message):
            model("smoke", **settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rgba_vae=outputs/demo",
            "rgba_vae=outputs/demo: a joint model reads latents of the plain",
        ),
        ("task.mean_shift=0.5", r"task\.mean_shift=0\.5: .*Set 0, or train experiment=dit_dora"),
    ],
)
def test_settings_of_the_other_scheme_are_refused(tmp_path, override, message):
    with pytest.raises(Exception, match=message):
        instantiate(config_for(tmp_path, "x", override).task)


@pytest.mark.slow
def test_either_cache_is_refused_by_the_other(tmp_path, cached, cached_joint):
    latents, adapters = cached
    with pytest.raises(ValueError, match=r"scheme=rgba, .*those of scheme=joint\. Give those of"):
        fit(config_for(tmp_path, latents, "trainer.max_steps=1"))
    wrong = [f"data.latents={cached_joint}", f"rgba_vae={adapters}", "callbacks.samples=null"]
    dora = composed(tmp_path, "experiment=dit_dora", "trainer.max_steps=1", *SMALL, *wrong)
    with pytest.raises(ValueError, match=r"scheme=joint, .*those of scheme=rgba\. Give those of"):
        fit(dora)
    same = SameBase(TINY, str(adapters))
    with pytest.raises(ShardError, match=r"scheme=joint, .*rgba_vae=.* is given\. Train exp"):
        fit(dora, extra=[same])
    fit(config_for(tmp_path, cached_joint, "trainer.max_steps=1"), extra=[SameBase(TINY, None)])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"rgba_vae": "x", "scheme": "joint"}, "rgba_vae=x: scheme=joint encodes with the plain"),
        ({"rgba_vae": None}, r"rgba_vae has no value: .*Give rgba_vae=RUN, or scheme=joint"),
    ],
)
def test_sources_that_do_not_fit_their_scheme(sources, message):
    from data_prep.latent_encoder import Sources

    rest = {"vae": "v", "text_encoder": "t", "prompt_length": 8, "frozen_dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        Sources(**rest, **sources)


def test_exports_that_can_hold_it(tmp_path, run):
    checkpoint = f"checkpoint={run[0]}/checkpoints/last.ckpt"
    for other in ("wan-alpha", "comfyui", "diffusers"):
        with pytest.raises(ValueError, match=rf"to={other} cannot hold .*last\.ckpt, a dit_joint"):
            export(tmp_path / other, checkpoint, f"to={other}")
        assert not (tmp_path / other).exists()
    export(tmp_path / "own", checkpoint, "to=acetate")
    held, own = (
        read_trained(str(path))
        for path in (run[0] / "checkpoints/last.ckpt", tmp_path / "own/dit_joint.safetensors")
    )
    assert held.state.keys() == own.state.keys()
    for name, value in own.state.items():
        assert torch.equal(value, held.state[name]), name
