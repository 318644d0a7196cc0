import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.testing import assert_close

from acetate.alpha import harden, over, palette_colors
from acetate.models.adapters import add_lora, trainable_state
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.wan import WanDecoder

FRAMES, HEIGHT, WIDTH = 9, 16, 24


@pytest.fixture(scope="module")
def clip():
    """(rgb, alpha) with empty, soft and opaque parts."""
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(2, 3, FRAMES, HEIGHT, WIDTH, generator=generator) * 2 - 1
    alpha = (torch.rand(2, 1, FRAMES, HEIGHT, WIDTH, generator=generator) * 3 - 1).clamp(0, 1)
    return rgb, alpha


@pytest.fixture(params=["wan21", "tiny"])
def wan(make_vae, request):
    return make_vae(request.param)


@pytest.fixture
def build(make_vae):
    def build(layout="wan21", awake=False, **settings):
        """awake: adapters and the merge block moved away from their start."""
        torch.manual_seed(0)
        settings = {"merge_init": "residual", "lora_rank": 2, "lora_alpha": 2.0} | settings
        vae = RGBAVAE(vae=make_vae(layout), **settings)
        if awake:
            for name, parameter in trainable_state(vae).items():
                if name.endswith(".B") or "conv_out" in name:
                    nn.init.normal_(parameter, std=0.1)
        return vae

    return build


def rendered(rgb, alpha):
    return over(rgb, harden(alpha), palette_colors(torch.tensor([4, 1])))


def test_residual_starts_from_wans_own_latents(build, wan, clip):
    rgb, alpha = clip
    video = rendered(rgb, alpha)
    layout = "wan21" if wan.config.z_dim == 16 else "tiny"
    expected = wan.encode(video).latent_dist.mean
    with torch.no_grad():
        assert_close(build(layout).encode(video, alpha), expected, rtol=0, atol=1e-5)
        scratch = build(layout, merge_init="scratch").encode(video, alpha)
    assert scratch.shape == expected.shape
    assert (scratch - expected).abs().mean() > 0.1


def test_decoders_start_as_wans_own(build, wan):
    vae = build("wan21" if wan.config.z_dim == 16 else "tiny")
    shape = vae.geometry.latent_shape(FRAMES, HEIGHT, WIDTH)
    raw = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    expected = wan.decode(raw).sample
    with torch.no_grad():
        rgb_hat, alpha_hat = vae.decode(raw)
    assert_close(rgb_hat.clamp(-1, 1), expected, rtol=0, atol=1e-5)
    assert rgb_hat.abs().max() > 1  # not clamped
    assert alpha_hat.shape == (2, 1, FRAMES, HEIGHT, WIDTH)
    assert_close(alpha_hat, (rgb_hat.mean(1, keepdim=True) + 1) / 2)


def test_released_alpha_keeps_three_channels(build):
    raw = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, three = build(average_alpha=False).decode(raw)
        _, one = build().decode(raw)
    assert three.shape[1] == 3
    assert_close(three.mean(1, keepdim=True), one)


def test_alpha_reaches_the_latents(build, clip):
    rgb, alpha = clip
    vae = build(awake=True)
    with torch.no_grad():
        raw, other = vae.encode(rgb, alpha), vae.encode(rgb, 1 - alpha)
    assert (raw - other).abs().mean() > 0.01


def test_alpha_is_encoded_as_a_grey_picture(build, clip):
    """Empty is black, opaque is white."""
    rgb, alpha = clip
    vae = build(merge_init="scratch")
    grey = (alpha * 2 - 1).expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        expected = vae.merge(vae.encoder(rgb), vae.encoder(grey))
        assert_close(vae.encode(rgb, alpha), expected, rtol=0, atol=1e-5)


def test_only_merge_and_adapters_train(build):
    vae = build(lora_rank=3)
    names = trainable_state(vae)
    adapters = {name for name in names if name.endswith((".A", ".B"))}
    assert {name.partition(".")[0] for name in adapters} == {"decoder_rgb", "decoder_alpha"}
    assert names.keys() - adapters == {f"merge.{name}" for name, _ in vae.merge.named_parameters()}
    convolutions = [
        m for m in vae.decoder_rgb.net.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))
    ]
    size = sum(3 * (m.weight.shape[0] + m.weight[0].numel()) for m in convolutions)
    assert sum(names[name].numel() for name in adapters) == 2 * size


def test_published_size_of_the_adapters():
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    decoder = WanDecoder(vae).to_empty(device="cpu")  # its values do not matter
    convolutions = add_lora(decoder.net, rank=128, alpha=1.0)
    assert len(convolutions) == 38
    assert sum(p.numel() for p in trainable_state(decoder.net).values()) == 30_013_824


def backward(vae, clip):
    rgb, alpha = clip
    for parameter in vae.parameters():
        parameter.grad = None
    rgb_hat, alpha_hat = vae.decode(vae.encode(rendered(rgb, alpha), alpha))
    ((rgb_hat - rgb).square().mean() + (alpha_hat - alpha).square().mean()).backward()


def test_first_step_moves_what_starts_at_zero(build, clip):
    """B is zero, so A has to wait a step; the merge block waits for its last convolution."""
    vae = build()
    backward(vae, clip)
    for name, parameter in trainable_state(vae).items():
        first = name.endswith(".B") or name.startswith("merge.conv_out.")
        assert (parameter.grad.abs().max() > 0) == first, name


@pytest.mark.parametrize("layout", ["wan21", "tiny"])
def test_gradients_reach_all_that_trains_and_nothing_else(build, clip, layout):
    vae = build(layout, awake=True)
    backward(vae, clip)
    for name, parameter in vae.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("layout", ["wan21", "tiny"])
def test_chunks_change_nothing(build, clip, layout):
    rgb, alpha = clip
    vae = build(layout, awake=True).double()
    rgb, alpha = rgb.double(), alpha.double()
    whole = vae.encode(rgb, alpha)
    decoded = vae.decode(whole)
    for chunk in (1, 2):
        vae.chunk = chunk
        # Adapters add to weights in float32, once per clip or once per chunk.
        assert_close(vae.encode(rgb, alpha), whole, rtol=0, atol=1e-10)
        for ours, expected in zip(vae.decode(whole), decoded, strict=True):
            assert_close(ours, expected, rtol=0, atol=1e-10)


def test_checkpointing_changes_no_gradient(build, clip):
    gradients = []
    for checkpointing in (False, True):
        vae = build(awake=True, checkpointing=checkpointing)
        backward(vae, clip)
        gradients.append({name: p.grad for name, p in trainable_state(vae).items()})
    for name, expected in gradients[0].items():
        assert_close(
            gradients[1][name],
            expected,
            rtol=1e-5,
            atol=1e-6 * expected.abs().max().item(),
            msg=name,
        )


def test_the_two_decoders_share_nothing(build):
    vae = build()
    pointers = [
        {p.data_ptr() for p in d.parameters()} for d in (vae.decoder_rgb, vae.decoder_alpha)
    ]
    assert pointers[0].isdisjoint(pointers[1])


def test_bf16_base_keeps_fp32_what_trains(build, clip):
    rgb, alpha = clip
    vae, reference = build(awake=True, frozen_dtype="bfloat16"), build(awake=True)
    for name, parameter in vae.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), (
            name
        )
    raw = vae.encode(rgb, alpha)
    outputs = (raw, *vae.decode(raw))
    expected = reference.encode(rgb, alpha)
    for ours, exact in zip(outputs, (expected, *reference.decode(expected)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).square().mean() < 0.01 * exact.var()
    backward(vae, clip)
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for p in trainable_state(vae).values()
    )


def test_normalise_with_the_bases_constants(build):
    vae = build("tiny")
    raw = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    normalised = vae.normalise(raw)
    for channel, (mean, std) in enumerate(
        zip([0.5, -0.25, 0.0, 1.0], [2.0, 0.5, 1.0, 1.5], strict=True)
    ):
        assert_close(normalised[:, channel], (raw[:, channel] - mean) / std)
    assert_close(vae.denormalise(normalised), raw)
    assert_close(vae.normalise(vae.denormalise(raw)), raw)
