"""Pictures as first and last frames, on the shipped base with adapters of two steps."""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch.testing import assert_close

from acetate.data.transforms import containing_box
from acetate.guides import read_still
from acetate.media.clip import MediaError
from acetate.pipeline import RGBAPipeline
from tests.conftest import cache_demo
from tests.processes import program
from tests.tasks.test_dit import fit
from tests.tasks.test_i2v import config_for

pytestmark = pytest.mark.xdist_group("pictures")  # whose run is made once


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """Adapters of an image-to-video run, and the RGBA-VAE."""
    folder = tmp_path_factory.mktemp("trained")
    cached = cache_demo(shards, folder, condition="first")
    fit(config_for(folder, cached, "trainer.max_steps=2"))
    return str(folder / "checkpoints/last.safetensors"), str(cached[1])


@pytest.fixture(scope="module")
def pipeline(trained):
    return RGBAPipeline.load(trained[0], rgba_vae=trained[1], device="cpu", wan="tiny")


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:30, 10:30] = (200, 30, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


SIZE = {"frames": 5, "height": 32, "width": 32, "steps": 2}


def test_a_still_of_another_aspect_gets_transparent_margins(picture):
    assert containing_box(40, 60, 32, 32) == (-10, 0, 60, 60)
    rgb, alpha = read_still(picture, 32, 32)
    assert rgb.shape == (3, 1, 32, 32)
    assert not alpha[..., :5, :].any() and not alpha[..., 28:, :].any()
    assert_close(alpha.sum() / 32**2, torch.tensor(400 / 60**2), rtol=0.1, atol=0)
    assert_close(rgb[:, 0, 13, 10], torch.tensor([200, 30, 30]) / 127.5 - 1, rtol=0, atol=0.01)


def test_the_picture_decides_the_clip_and_its_guide(pipeline, picture, tmp_path):
    with Image.open(picture) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "right.png")
    right = tmp_path / "right.png"
    one, other = pipeline(["a disc", "a disc"], image=[picture, right], seed=3, **SIZE)
    again = pipeline("a disc", image=picture, seed=3, **SIZE)[0]
    assert_close(again.rgb, one.rgb, rtol=0, atol=1e-3)
    assert one.guide[..., 0].mean() < 0.5 < other.guide[..., 0].mean()
    text = pipeline("a disc", seed=3, **SIZE)[0]
    assert text.guide is None and (text.rgb - one.rgb).abs().max() > 1e-3


def test_errors_say_the_way_out(pipeline, picture, trained, tmp_path):
    with pytest.raises(ValueError, match="trained with first frames alone"):
        pipeline("a disc", image=picture, last_image=picture, **SIZE)
    with pytest.raises(ValueError, match="last_image= without image="):
        pipeline("a disc", last_image=picture, **SIZE)
    with pytest.raises(ValueError, match="3 pictures for 2 prompts"):
        pipeline(["a", "b"], image=[picture] * 3, **SIZE)
    Image.new("RGB", (32, 32)).save(tmp_path / "opaque.png")
    with pytest.raises(MediaError, match="no alpha"):
        pipeline("a disc", image=tmp_path / "opaque.png", **SIZE)
    text = RGBAPipeline.load(None, rgba_vae=trained[1], device="cpu", wan="tiny")
    with pytest.raises(ValueError, match="trained on text alone and takes no picture"):
        text("a disc", image=picture, **SIZE)


@pytest.mark.slow
def test_the_command_writes_nothing_where_the_picture_is_refused(trained, picture, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "opaque.png")
    more = [f"dora={trained[0]}", f"rgba_vae={trained[1]}", "steps=2", "frames=5", "height=32",
            "width=32", "formats=[png]", "prompt=disc"]  # fmt: skip
    for name, expected in (("opaque", 1), ("disc", 0)):
        out = tmp_path / name
        code, printed = program(
            tmp_path / f"{name}.log", "acetate.commands.sample", f"out={out}",
            f"image={tmp_path}/{name}.png", *more,
        )  # fmt: skip
        assert (code != 0) == bool(expected), printed[-2000:]
        assert out.exists() == (not expected)


@pytest.mark.slow
def test_diffusers_loads_the_export(trained, tmp_path):
    code, printed = program(
        tmp_path / "log", "acetate.commands.export", f"checkpoint={trained[0]}", "to=diffusers",
        f"rgba_vae={trained[1]}", f"out={tmp_path}/export",
    )  # fmt: skip
    assert code == 0, printed[-2000:]
    loaded = WanImageToVideoPipeline.from_pretrained(str(tmp_path / "export"))
    assert loaded.transformer.config.in_channels == 36 and loaded.image_encoder is None
    for to, more in (("wan-alpha", []), ("comfyui", ["dit=svd-lora"])):
        code, printed = program(
            tmp_path / "log", "acetate.commands.export", f"checkpoint={trained[0]}", f"to={to}",
            f"out={tmp_path}/no", *more,
        )  # fmt: skip
        assert code != 0 and "holds a wider patch embedding" in printed
        assert not (tmp_path / "no").exists()
