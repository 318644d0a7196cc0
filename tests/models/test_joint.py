"""Colour and alpha in one sequence of the shipped tiny DiT: what colour tokens see, and what
not."""

import pytest
import torch
from torch.testing import assert_close

from acetate.alpha import harden, over
from acetate.models.dit import checkpoint_blocks, dora_layers, velocity
from acetate.models.joint import attach_joint, start_joint
from acetate.models.loading import load_transformer, load_vae
from acetate.models.plain_vae import PlainVAE
from tests.conftest import TINY

FRAMES = 3


def joint(rgb_attends_alpha, **of):
    model = load_transformer(TINY, prepare=lambda m: attach_joint(m, 4, 4, rgb_attends_alpha, **of))
    start_joint(model, seed=0)
    return model


def disturb_(model):
    """Gives adapters and the alpha embedding values of their own."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def given():
    """Colour and alpha latents of two clips, their timesteps and contexts; what the base gives for
    each alone."""
    generator = torch.Generator().manual_seed(0)
    base = load_transformer(TINY)
    rgb, alpha = torch.randn(2, 2, 16, FRAMES, 12, 12, generator=generator)
    context = torch.randn(2, 64, base.config.text_dim, generator=generator)
    timestep = torch.tensor([500.0, 200.0])
    with torch.no_grad():
        found = [velocity(base, x, timestep, context) for x in (rgb, alpha)]
    return rgb, alpha, timestep, context, *found


@torch.no_grad()
def parts(model, rgb, alpha, timestep, context):
    return velocity(model, torch.cat([rgb, alpha], 2), timestep, context).chunk(2, 2)


@pytest.mark.parametrize("trained", [False, True])
def test_colour_is_exactly_the_bases_own_where_it_does_not_see_alpha(given, trained):
    """With LoRA and the alpha embedding at zero, and with any values of theirs: ==."""
    rgb, alpha, timestep, context, wanted, _ = given
    model = disturb_(joint(False)) if trained else joint(False)
    assert torch.equal(parts(model, rgb, alpha, timestep, context)[0], wanted)


def test_colour_that_sees_alpha_starts_at_the_base(given):
    """The published mask. Attention over every token twice is attention over it once: where alpha
    shows the very colour, both streams are the base's, up to the order of sums. That holds only if
    both have the same positions, and the first test of LoRA that alpha alone passes it."""
    rgb, alpha, timestep, context, wanted, _ = given
    for found in parts(joint(True), rgb, rgb, timestep, context):
        assert_close(found, wanted, rtol=0, atol=2e-5)
    # what it sees matters
    other = parts(joint(True), rgb, alpha, timestep, context)[0]
    assert (other - wanted).abs().max() > 0.1


def test_alpha_sees_colour_and_itself(given):
    rgb, alpha, timestep, context, _, alone = given
    for sees in (False, True):
        model = joint(sees)
        _, found = parts(model, rgb, alpha, timestep, context)
        _, beside = parts(model, rgb.flip(0), alpha, timestep, context)
        assert min((found - x).abs().max() for x in (beside, alone)) > 0.1


def test_every_part_that_trains_has_a_gradient_and_nothing_else(given):
    rgb, alpha, timestep, context, *_ = given
    gradients = []
    for recompute in (False, True):
        model = disturb_(joint(True)).train()
        if recompute:
            checkpoint_blocks(model)
        velocity(model, torch.cat([rgb, alpha], 2), timestep, context).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    layers = dora_layers(model)
    assert len(layers) == 6 * len(model.blocks)
    assert not any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in layers)
    assert len(gradients[0]) == 2 * len(layers) + 1
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_two_calls_of_attention_are_the_mask_of_tokens(given):
    """Against the same model with the whole mask in the place of BlindColor."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Masked(WanAttnProcessor):
        def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, rotary=None):
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
            mask[: x.shape[1] // 2, x.shape[1] // 2 :] = False
            return super().__call__(attn, x, None, mask, rotary)

    rgb, alpha, timestep, context, *_ = given
    model = disturb_(joint(False))
    found = parts(model, rgb, alpha, timestep, context)
    for block in model.blocks:
        block.attn1.set_processor(Masked())
    for mine, wanted in zip(found, parts(model, rgb, alpha, timestep, context), strict=True):
        assert_close(mine, wanted, rtol=1e-4, atol=2e-5)


def test_the_plain_vae_keeps_colour_and_alpha_apart():
    vae = PlainVAE(vae=load_vae(TINY)).eval()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24), indexing="ij")
    alpha = ((0.8 - (x**2 + y**2).sqrt()) * 4).clamp(0, 1).expand(1, 1, 5, -1, -1)
    rgb = over(torch.stack([x, y, x * y])[None, :, None].expand(1, 3, 5, -1, -1), harden(alpha), -1)
    with torch.no_grad():
        raw = vae.encode(rgb, alpha)
        assert tuple(raw.shape[1:]) == vae.latent_shape(5, 24, 24) == (16, 4, 6, 6)
        rgb_hat, alpha_hat = vae.decode(raw)
        # either half is the plain VAE's, which knows nothing of the other
        grey = (alpha * 2 - 1).expand_as(rgb)
        assert_close(raw[:, :, 2:], vae.encode(grey, alpha)[:, :, :2], rtol=1e-4, atol=1e-4)
    assert (rgb_hat - rgb).abs().mean() < 0.15 and (alpha_hat - alpha).abs().mean() < 0.05
    assert vae.latents_sha256() != vae.base_sha256
