import copy
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch.testing import assert_close

from acetate.models.wan import (
    Geometry,
    WanDecoder,
    WanEncoder,
    WanHead,
    causal_conv,
    replace_folder,
    save_vae,
)

SIZE = (16, 24)  # height, width


@pytest.fixture(scope="module", params=["wan21", "tiny"])
def vae(make_vae, request):
    return make_vae(request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def exact(vae):
    """The same in float64, where two orders of the same sums agree to the last digits."""
    return copy.deepcopy(vae).double()


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def video_for(vae, frames, dtype=torch.float32):
    return random(2, 3, frames, *SIZE, dtype=dtype).clamp(-1, 1)


def latents_for(vae, frames, dtype=torch.float32):
    return random(2, *Geometry.of(vae).latent_shape(frames, *SIZE), seed=1, dtype=dtype)


def test_geometry(make_vae):
    wan21, tiny = Geometry.of(make_vae("wan21")), Geometry.of(make_vae("tiny"))
    assert (wan21.channels, wan21.time_stride, wan21.space_stride) == (16, 4, 8)
    assert (tiny.channels, tiny.time_stride, tiny.space_stride) == (4, 4, 4)
    assert wan21.mean[0] == pytest.approx(-0.7571)
    assert tiny.std == (2.0, 0.5, 1.0, 1.5)
    assert wan21.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert tiny.latent_shape(1, 8, 12) == (4, 1, 2, 3)


@pytest.mark.parametrize(
    "setting", [{"is_residual": True}, {"patch_size": 2, "in_channels": 12, "out_channels": 12}]
)
def test_wan22_is_refused(setting):
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=8, **setting)
    with pytest.raises(ValueError, match=r"Wan2\.2"):
        Geometry.of(vae)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_encode_is_diffusers_own(vae, frames):
    video = video_for(vae, frames)
    expected = vae.encode(video).latent_dist
    mean, log_variance = WanHead(vae)(WanEncoder(vae)(video))
    assert mean.shape[1:] == Geometry.of(vae).latent_shape(frames, *SIZE)
    assert_close(mean, expected.mean, rtol=0, atol=1e-5)
    assert_close(log_variance.clamp(-30, 20), expected.logvar, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_decode_is_diffusers_own(vae, frames):
    latents = latents_for(vae, frames)
    expected = vae.decode(latents).sample
    video = WanDecoder(vae)(latents)
    assert video.shape == (2, 3, frames, *SIZE)
    assert video.abs().max() > 1  # theirs clamps, ours does not
    assert (expected.abs() < 1).float().mean() > 0.3
    assert_close(video.clamp(-1, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_agree_with_the_whole_clip(exact, frames, chunk):
    encoder, decoder = WanEncoder(exact), WanDecoder(exact)
    video, latents = (
        video_for(exact, frames, torch.float64),
        latents_for(exact, frames, torch.float64),
    )
    assert_close(encoder(video, chunk), encoder(video), rtol=0, atol=1e-11)
    assert_close(decoder(latents, chunk), decoder(latents), rtol=0, atol=1e-11)


def gradients(coder, x, **kwargs):
    """Of a random projection of the output: for the input and for every parameter that is used."""
    x = x.clone().requires_grad_()
    output = coder(x, **kwargs)
    parameters = [p for p in coder.net.parameters() if p.requires_grad]
    return torch.autograd.grad(
        (output * random(*output.shape, seed=2)).sum(), [x, *parameters], allow_unused=True
    )


def is_head(name):
    return name.startswith(("norm_out", "conv_out"))


@pytest.mark.parametrize("coder", [WanEncoder, WanDecoder])
def test_gradients_of_chunks_agree_with_the_whole_clip(exact, coder):
    coder = coder(copy.deepcopy(exact).requires_grad_(True))
    make = video_for if isinstance(coder, WanEncoder) else latents_for
    x = make(exact, 9, torch.float64)
    whole, chunked = gradients(coder, x), gradients(coder, x, chunk=2)
    names = ["input", *(name for name, _ in coder.net.named_parameters())]
    for name, expected, gradient in zip(names, whole, chunked, strict=True):
        if isinstance(coder, WanEncoder) and is_head(name):
            assert expected is gradient is None  # Wan's head is a module of its own
            continue
        assert expected.abs().max() > 0, name
        assert_close(
            gradient, expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("coder", [WanEncoder, WanDecoder])
def test_checkpointing_saves_memory_and_changes_no_gradient(exact, coder):
    trainable = copy.deepcopy(exact).requires_grad_(True)
    x = (video_for if coder is WanEncoder else latents_for)(exact, 5, torch.float64)
    results, saved = [], []
    for checkpointing in (False, True):
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            coder(trainable, checkpointing)(x.clone().requires_grad_())
        saved.append(sum(kept.values()))
        results.append(gradients(coder(trainable, checkpointing), x))
    assert saved[1] < saved[0] / 4
    for plain, recomputed in zip(*results, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            assert_close(recomputed, plain, rtol=0, atol=0)


def test_later_frames_never_reach_back(exact):
    """A prefix's latents are the clip's first latents; the same holds for decoded frames."""
    encoder, decoder = WanEncoder(exact), WanDecoder(exact)
    video, latents = video_for(exact, 17, torch.float64), latents_for(exact, 17, torch.float64)
    features, decoded = encoder(video), decoder(latents)
    for count in (1, 2, 4):
        frames = 1 + 4 * (count - 1)
        assert_close(encoder(video[:, :, :frames]), features[:, :, :count], rtol=0, atol=1e-11)
        assert_close(decoder(latents[:, :, :count]), decoded[:, :, :frames], rtol=0, atol=1e-11)


def test_earlier_frames_reach_forward(exact):
    """Or causality would hold for frames that do not see each other at all."""
    encoder, decoder = WanEncoder(exact), WanDecoder(exact)
    video, latents = video_for(exact, 9, torch.float64), latents_for(exact, 9, torch.float64)
    other_video, other_latents = video.clone(), latents.clone()
    other_video[:, :, 1], other_latents[:, :, 1] = 0, 0
    features = (encoder(other_video) - encoder(video)).abs().amax((0, 1, 3, 4))
    frames = (decoder(other_latents) - decoder(latents)).abs().amax((0, 1, 3, 4))
    assert features[0] == 0
    assert (features[1:] > 1e-6).all()
    assert (frames[:1] == 0).all()
    assert (frames[1:] > 1e-6).all()


def test_feature_maps_end_in_the_features(vae):
    encoder, video = WanEncoder(vae), video_for(vae, 5)
    maps = list(encoder.feature_maps(video))
    assert len(maps) == len(vae.encoder.down_blocks) + 2  # the first convolution and the middle too
    assert_close(maps[-1], encoder(video), rtol=0, atol=1e-6)
    assert [m.shape[1] for m in maps] == sorted(m.shape[1] for m in maps)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_causal_conv_is_the_module_itself(kernel, frames):
    torch.manual_seed(0)
    conv = WanCausalConv3d(3, 5, kernel, padding=kernel // 2)
    x = random(2, 3, frames, 4, 6)
    assert_close(causal_conv(conv, x, None), conv(x), rtol=0, atol=1e-6)


def test_causal_conv_hands_two_frames_over():
    torch.manual_seed(0)
    conv, x, state = WanCausalConv3d(3, 5, 3, padding=1), random(1, 3, 6, 4, 4), {}
    pieces = [causal_conv(conv, piece, state) for piece in x.split([1, 1, 3, 1], 2)]
    assert_close(torch.cat(pieces, 2), conv(x), rtol=0, atol=1e-6)
    assert_close(state[conv], x[:, :, -2:])


def test_save_vae(vae, tmp_path):
    """Half precision and the strides that it really has; an older folder is replaced."""
    folder = tmp_path / "wan" / "vae"
    folder.mkdir(parents=True)
    (folder / "old").touch()
    source = copy.deepcopy(vae)
    source.register_to_config(latents_std=[3.0] * vae.config.z_dim)
    save_vae(source, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["vae"]
    assert not (folder / "old").exists()
    config = json.loads((folder / "config.json").read_text())
    geometry = Geometry.of(vae)
    assert config["scale_factor_spatial"] == geometry.space_stride
    assert config["scale_factor_temporal"] == geometry.time_stride
    assert config["latents_std"] == [3.0] * geometry.channels
    saved = AutoencoderKLWan.from_pretrained(folder)
    for name, value in saved.state_dict().items():
        assert_close(value, vae.state_dict()[name].half().float(), rtol=0, atol=0)
    assert next(source.parameters()).dtype == torch.float32


def test_replace_folder_keeps_the_old_one_when_writing_fails(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "weights").write_text("old")

    def fail(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    assert (folder / "weights").read_text() == "old"


def test_replace_folder_puts_the_old_one_back_when_renaming_fails(tmp_path, monkeypatch):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "weights").write_text("old")
    rename = os.replace

    def fail(source, target):
        if target == folder and Path(source).name.startswith(".vae-"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_folder(folder, lambda path: (Path(path) / "weights").write_text("new"))
    assert (folder / "weights").read_text() == "old"
    monkeypatch.undo()
    replace_folder(folder, lambda path: (Path(path) / "weights").write_text("new"))
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
