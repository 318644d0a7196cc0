"""Other ways to alpha in the latents: where they start, and what trains of them."""

import pytest
import torch
from torch.testing import assert_close

from acetate.formats.rgba_vae import load_rgba_vae
from acetate.models.adapters import trainable_state
from acetate.models.alternatives import DecodersAlone, OpaqueInit
from tests.tasks.test_vae import config_for, fit

SETTINGS = {"merge_init": "residual", "lora_rank": 2, "lora_alpha": 2.0}


@pytest.fixture(scope="module")
def rgb():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, 5, 16, 24, generator=generator) * 2 - 1


@torch.no_grad()
def test_four_channels_start_as_the_base_on_opaque_clips(make_vae, rgb):
    base, vae = make_vae(), OpaqueInit(vae=make_vae(), **SETTINGS)
    latents = base.encode(rgb).latent_dist.mean
    opaque = torch.ones(1, 1, *rgb.shape[2:])
    assert_close(vae.encode(rgb, opaque), latents, rtol=0, atol=1e-5)
    assert_close(vae.encode(rgb, opaque * 0.3), latents, rtol=0, atol=1e-5)
    rgb_hat, alpha_hat = vae.decode(latents)
    assert_close(rgb_hat.clamp(-1, 1), base.decode(latents).sample, rtol=0, atol=1e-5)
    assert_close(alpha_hat, opaque, rtol=0, atol=0)


def test_what_trains_of_four_channels(make_vae, rgb):
    vae = OpaqueInit(vae=make_vae(), **SETTINGS)
    trained = trainable_state(vae)
    whole = {name for name in trained if not name.endswith((".A", ".B"))}
    assert whole == {
        f"{part}.net.{conv}.{of}"
        for part, conv in (("encoder_four", "conv_in"), ("decoder_rgb", "conv_out"))
        for of in ("weight", "bias")
    }
    rgb_hat, alpha_hat = vae.decode(vae.encode(rgb, torch.full((1, 1, *rgb.shape[2:]), 0.5)))
    (rgb_hat.square().mean() + alpha_hat.square().mean()).backward()
    assert all(value.grad is not None for value in trained.values())
    fourth = trained["decoder_rgb.net.conv_out.weight"].grad[3]
    assert fourth.abs().max() > 0


def test_decoders_alone_know_only_color(make_vae, rgb):
    vae = DecodersAlone(vae=make_vae(), **SETTINGS)
    assert {name.partition(".")[0] for name in trainable_state(vae)} == {
        "decoder_rgb", "decoder_alpha",
    }  # fmt: skip
    alphas = (torch.full((1, 1, *rgb.shape[2:]), level) for level in (0.2, 0.9))
    one, other = (vae.encode(rgb, alpha) for alpha in alphas)
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="Leave it residual"):
        DecodersAlone(vae=make_vae(), **SETTINGS | {"merge_init": "scratch"})


@pytest.mark.parametrize("model", ["decoders_alone", "opaque_init"])
def test_a_run_of_each_goes_on_and_is_no_rgba_vae(tmp_path, shards, model):
    more = [f"model={model}", "trainer.val_check_interval=1", "trainer.max_steps=2"]
    _, _, record = fit(config_for(tmp_path / "whole", shards, *more))
    fit(config_for(tmp_path / "parts", shards, *more, "trainer.max_steps=1"))
    last = tmp_path / "parts/checkpoints/last.ckpt"
    _, _, again = fit(config_for(tmp_path / "parts", shards, *more), resume=str(last))
    assert again.losses == record.losses[1:]
    with pytest.raises(ValueError, match=f"kind 'rgba_vae_{model}'"):
        load_rgba_vae(vae="assets/wan-tiny/vae", adapters=str(tmp_path / "whole"))
