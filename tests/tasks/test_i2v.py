"""Image to video on the shipped tiny DiT: a wider patch embedding, latents with a condition."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from acetate.assembly import load_dit
from acetate.models.adapters import trainable_state
from acetate.models.condition import given_mask, widen, with_mask
from acetate.models.dit import FrozenDiT, add_dora, merge_dora, velocity
from acetate.models.weights import read_weights
from tests.commands.test_sample import config_for as sample_config
from tests.compose import composed
from tests.paths import ROOT
from tests.tasks.test_dit import SMALL, fit

BASE = FrozenDiT(str(ROOT / "assets/wan-tiny"), "float32")


def inputs(transformer):
    draw = torch.Generator().manual_seed(0)
    channels = transformer.config.out_channels
    return (
        torch.randn(2, channels, 3, 6, 4, generator=draw),
        torch.tensor([10.0, 900.0]),
        torch.randn(2, 9, transformer.config.text_dim, generator=draw),
        torch.randn(2, 4 + channels, 3, 6, 4, generator=draw),
    )


def test_a_model_that_was_just_widened_is_the_text_model_to_the_bit():
    text, wide = BASE.load(), BASE.load()
    add_dora(wide, 4, 4)
    widen(wide, 20)
    assert wide.config.in_channels == 36
    *given, condition = inputs(text)
    with torch.no_grad():
        assert torch.equal(velocity(wide, *given, condition), velocity(text, *given))
        change = 0.05 * torch.randn(wide.patch_embedding.weight.shape)
        wide.patch_embedding.weight.add_(change)
        text.patch_embedding.weight.add_(change[:, :16])
        assert torch.equal(velocity(wide, *given), velocity(text, *given))  # text alone
        assert (velocity(wide, *given, condition) - velocity(text, *given)).abs().max() > 1e-3
    trained = trainable_state(wide)
    assert {"patch_embedding.weight", "patch_embedding.bias"} < trained.keys()


@pytest.mark.parametrize("last", [False, True])
def test_the_mask_is_diffusers_own(last):
    """As WanImageToVideoPipeline.prepare_latents folds it."""
    frames, stride = 9, 4
    mask = torch.zeros(1, 1, frames, 2, 3)
    mask[:, :, 0] = 1
    mask[:, :, -1] = float(last)
    first = mask[:, :, :1].repeat_interleave(stride, 2)
    mask = torch.cat([first, mask[:, :, 1:]], 2).view(1, -1, stride, 2, 3).transpose(1, 2)
    ours = given_mask("first_last" if last else "first", stride, (3, 2, 3))
    assert torch.equal(ours[None], mask)


@pytest.fixture(scope="module")
def conditioned(shards, tmp_path_factory):
    from tests.conftest import cache_demo

    return cache_demo(shards, tmp_path_factory.mktemp("conditioned"), condition="first_last")


def config_for(run, cached, *overrides):
    return composed(
        run, "experiment=i2v_dora", f"data.latents={cached[0]}", f"rgba_vae={cached[1]}",
        *SMALL, "callbacks.samples=null", *overrides,
    )  # fmt: skip


def test_the_cache_holds_the_condition(conditioned, tmp_path):
    data = instantiate(config_for(tmp_path, conditioned).data)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    condition, latents = batch["condition"], batch["latents"]
    assert condition.shape == latents.shape
    # the VAE is causal: the first latent frame knows no other
    assert_close(condition[:, :, 0], latents[:, :, 0], rtol=0, atol=2e-3)
    assert (condition[:, :, 1:] - latents[:, :, 1:]).abs().mean() > 0.05
    whole = with_mask(condition, "first_last", 4)
    assert whole.shape[1] == 4 + latents.shape[1]


def test_shares_see_no_picture_or_another_prompt(conditioned, tmp_path):
    names = [f"clip{n}" for n in range(400)]
    batch = {"key": names, "context": torch.arange(400.0)[:, None, None].expand(-1, 2, 3)}
    task = instantiate(config_for(tmp_path, conditioned, "task.caption_swap=0.5").task)
    seen, again = task.drawn(batch, 7), task.drawn(batch, 7)
    assert torch.equal(seen["context"], again["context"])
    places, without = seen["context"][:, 0, 0], seen["without"]
    own = places == torch.arange(400)
    assert torch.equal(places[~own], (torch.arange(400.0) - 1)[~own] % 400)
    assert own[without].all() and 20 < without.sum() < 65  # a tenth
    assert 0.4 < own[~without].float().mean() < 0.6
    plain = instantiate(config_for(tmp_path, conditioned, "task.caption_swap=0").task)
    assert torch.equal(plain.drawn(batch, 7)["without"], without)
    with pytest.raises(InstantiationException, match=r"task\.caption_swap 2\.0; a share"):
        instantiate(config_for(tmp_path, conditioned, "task.caption_swap=2.0").task)


def resumed_exactly(folder, cached, *more):
    """The task after four steps in `folder`/a, as after two and two in `folder`/b."""
    run = lambda name, *now: config_for(folder / name, cached, *more, *now)  # noqa: E731
    _, whole, losses = fit(run("a", "trainer.max_steps=4"))
    fit(run("b", "trainer.max_steps=2", "task.decay_steps=4"))
    _, resumed, rest = fit(
        run("b", "trainer.max_steps=4"), resume=folder / "b/checkpoints/last.ckpt"
    )
    assert rest.losses == losses.losses[2:]
    for name, value in trainable_state(whole).items():
        assert torch.equal(value, trainable_state(resumed)[name]), name
    return whole


@pytest.mark.slow
def test_resume_is_exact_and_export_holds_the_wide_embedding(conditioned, tmp_path):
    whole = resumed_exactly(tmp_path, conditioned)
    file = tmp_path / "a/checkpoints/last.safetensors"
    kept = load_file(file)["transformer.patch_embedding.weight"]
    assert kept.shape[1] == 36 and kept[:, 16:].abs().max() > 0
    with safe_open(file, "pt") as opened:
        assert '"widened": true' in opened.metadata()["condition"]
    merged, facts = load_dit(sample_config(f"dora={file}", f"rgba_vae={conditioned[1]}"), "cpu")
    assert facts["condition"] == {"given": "first_last", "channels": 20, "widened": True}
    *given, condition = inputs(merged)
    with torch.no_grad():
        merge_dora(whole.transformer)
        ours = velocity(whole.transformer.eval(), *given, condition)
        assert_close(velocity(merged, *given, condition), ours, rtol=0, atol=1e-5)
        # diffusers' own module, of the files that export writes
        merged.save_pretrained(tmp_path / "transformer")
        official = WanTransformer3DModel.from_pretrained(tmp_path / "transformer").eval()
        assert_close(velocity(official, *given, condition), ours, rtol=0, atol=1e-5)
    assert official.config.in_channels == 36
    assert read_weights(tmp_path / "transformer").keys() == dict(official.state_dict()).keys()


def test_dropped_conditions_are_drawn_by_seed_step_and_key(conditioned, tmp_path):
    for dropout in (0.0, 1.0):
        config = config_for(
            tmp_path, conditioned, f"task.condition_dropout={dropout}", "trainer.max_steps=1"
        )
        _, task, _ = fit(config)
        assert task.given == "first_last"
        seen = {"without": torch.tensor([dropout == 1, False])}
        latents = torch.ones(2, 16, 2, 4, 4)
        field = task.field({"latents": latents, "condition": latents, **seen})
        assert bool(field.keywords["condition"][0].any()) == (dropout == 0)
        assert field.keywords["condition"][1].any()


def test_latents_without_a_condition_are_refused(cached, tmp_path):
    with pytest.raises(ValueError, match=r"cached without a condition.*condition=first"):
        fit(config_for(tmp_path, cached, "trainer.max_steps=1"))
