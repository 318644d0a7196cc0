import contextlib
import os
import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import vgg16

from acetate.losses.perceptual import EncoderFeatures, LPIPSFeatures, VGGFeatures
from acetate.models.wan import WanEncoder
from acetate.vgg import load_vgg16

FILE = "vgg16-397923af.pth"


@pytest.fixture
def encoder(make_vae):
    return WanEncoder(make_vae("tiny").requires_grad_(False))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """The first layers of a VGG16 with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        features = vgg16(weights=None).features[:9]
    state = {f"features.{n}": torch.randn(v.shape) * 0.05 for n, v in features.state_dict().items()}
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(
        state | {"features.28.bias": torch.zeros(2), "classifier.0.bias": torch.zeros(2)}, file
    )
    return str(file)


@pytest.fixture(scope="module")
def vgg(vgg_file):
    """imagenet_norm -> VGGFeatures."""
    return {norm: VGGFeatures(imagenet_norm=norm, weights=vgg_file) for norm in (False, True)}


def video(seed=0):
    return torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_encoder_features_of_the_same_video_are_zero(encoder):
    assert EncoderFeatures(stages=3)(video(), video(), encoder.feature_maps).item() == 0


@pytest.mark.parametrize("stages", [1, 3])
def test_encoder_features_are_the_mean_over_stages(encoder, stages):
    x_hat, x = video(0), video(1)
    maps = zip(encoder.feature_maps(x_hat), encoder.feature_maps(x), strict=True)
    terms = [(a - b).abs().mean() for a, b in maps]
    assert len(terms) > stages
    value = EncoderFeatures(stages=stages)(x_hat, x, encoder.feature_maps)
    assert_close(value, torch.stack(terms[:stages]).mean())


def test_encoder_features_compute_no_stage_too_many(encoder):
    computed = []

    def counted(x):
        for maps in encoder.feature_maps(x):
            computed.append(maps.shape)
            yield maps

    EncoderFeatures(stages=3)(video(0), video(1), counted)
    assert len(computed) == 6  # prediction and target


def test_encoder_features_train_the_prediction_alone(encoder):
    x_hat, x = video(0).requires_grad_(), video(1).requires_grad_()
    EncoderFeatures(stages=2)(x_hat, x, encoder.feature_maps).backward()
    assert x_hat.grad.abs().max() > 0
    assert x.grad is None
    assert all(p.grad is None for p in encoder.parameters())


def test_encoder_features_of_a_bf16_encoder(make_vae):
    """The frozen base may be in bfloat16 while predictions are float32."""
    exact = WanEncoder(make_vae("tiny").requires_grad_(False))
    half = WanEncoder(make_vae("tiny").requires_grad_(False).bfloat16())
    x_hat, x = video(0).requires_grad_(), video(1)
    value = EncoderFeatures(stages=3)(x_hat, x, half.feature_maps)
    assert_close(
        value.float(), EncoderFeatures(stages=3)(x_hat, x, exact.feature_maps), rtol=0.02, atol=0
    )
    value.backward()
    assert x_hat.grad.dtype == torch.float32
    assert x_hat.grad.abs().max() > 0


def test_vgg_of_the_same_video_is_zero(vgg):
    assert vgg[True](video(), video(), None).item() == 0
    assert vgg[True](video(), video(1), None).item() > 0


def test_vgg_ends_at_relu2_2(vgg):
    features = vgg[True]._features(video())
    assert features.shape == (5, 128, 8, 8)  # one pooling
    assert features.min() == 0
    assert sum(isinstance(layer, nn.Conv2d) for layer in vgg[True].features) == 4


def test_imagenet_norm_is_an_affine_map_of_the_input(vgg):
    x_hat, x = video(0), video(1)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )

    def affine(video):
        return ((video + 1) / 2 - mean) / std * 2 - 1

    assert_close(vgg[True](x_hat, x, None), vgg[False](affine(x_hat), affine(x), None))
    assert (vgg[True](x_hat, x, None) - vgg[False](x_hat, x, None)).abs() > 1e-4


def test_vgg_trains_the_prediction_alone(vgg):
    x_hat, x = video(0).requires_grad_(), video(1).requires_grad_()
    vgg[True](x_hat, x, None).backward()
    assert x_hat.grad.abs().max() > 0
    assert x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in vgg[True].parameters())


def test_vgg_file_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"vgg\.pth do not exist.*loss\.perceptual\.weights"
    ):
        load_vgg16(str(tmp_path / "vgg.pth"), "choose another")


@pytest.mark.parametrize("build", [lambda: VGGFeatures(imagenet_norm=True), LPIPSFeatures])
def test_no_weights_and_no_network(tmp_path, monkeypatch, build):
    """The error says which file goes where."""

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        build()
    message = str(error.value)
    assert str(tmp_path / "hub" / "checkpoints" / FILE) in message
    assert f"https://download.pytorch.org/models/{FILE}" in message
    assert "loss/perceptual=encoder_features" in message


def test_cached_vgg_is_read_without_running_code(tmp_path, monkeypatch):
    """torch.hub unpickles by default."""
    target = tmp_path / "run"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"features.0.weight": Hostile()}, folder / FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with contextlib.suppress(Exception):  # it may be refused in any way
        load_vgg16(None, "choose another")
    assert not target.exists()
