"""Pictures as first and last frames, on the shipped base with adapters of two steps."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from acetate.clips import Clip
from acetate.commands.follow_pictures import through_vae
from acetate.data.transforms import containing_box
from acetate.guides import read_still
from acetate.media.clip import MediaError
from acetate.models.dit import velocity
from acetate.pipeline import RGBAPipeline
from acetate.sampling import Solver, decode, initial_noise
from tests.compose import called
from tests.conftest import TINY, cache_demo
from tests.formats.test_names import wan21_i2v
from tests.looking_base import write_dit
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


@pytest.fixture(scope="module")
def trained_both(shards, tmp_path_factory):
    """The same of first and last frames, after steps that move every weight."""
    folder = tmp_path_factory.mktemp("trained_both")
    cached = cache_demo(shards, folder, condition="first_last")
    fast = ["task.lr=0.05", "task.warmup_steps=0", "trainer.max_steps=3"]
    fit(config_for(folder, cached, *fast))
    return str(folder / "checkpoints/last.safetensors"), str(cached[1])


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:30, 10:30] = (200, 30, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


@pytest.fixture(scope="module")
def two_looking(tmp_path_factory):
    """Two experts that read a condition, as Wan2.2's I2V-A14B, of random weights."""
    folder = tmp_path_factory.mktemp("two_looking")
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(f"{TINY}/{part}")
    write_dit(folder / "transformer")
    write_dit(folder / "transformer_2", seed=5)
    return str(folder)


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


def test_the_first_frame_is_held(pipeline, trained, picture):
    """To what the RGBA-VAE makes of the picture, whatever the prompt; and the others see it."""
    held = pipeline(["a disc", "smoke"], image=picture, **SIZE)
    loose = RGBAPipeline.load(
        trained[0], rgba_vae=trained[1], device="cpu", wan="tiny", hold=False
    )("a disc", image=picture, **SIZE)[0]
    rgb, alpha = read_still(picture, 32, 32)
    again = through_vae(pipeline.vae, Clip(rgb, alpha), "cpu")
    for clip in held:
        assert_close(clip.alpha[:, :1], again.alpha, rtol=0, atol=1e-3)
        assert_close(clip.rgb[:, :1], again.rgb, rtol=0, atol=1e-3)
    assert (loose.alpha[:, :1] - again.alpha).abs().max() > 0.05
    assert (loose.alpha[:, 1:] - held[0].alpha[:, 1:]).abs().max() > 1e-3


@pytest.mark.slow
def test_a_last_picture_is_sampled_too(trained_both, picture, tmp_path):
    with Image.open(picture) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "right.png")
    dora, vae = trained_both
    small = [f"{name}={value}" for name, value in SIZE.items()]
    last = {"same": picture, "right": tmp_path / "right.png", "none": "null"}
    frames = {}
    for name, file in last.items():
        called(
            "sample", f"dora={dora}", f"rgba_vae={vae}", "prompt=disc", f"image={picture}",
            f"last_image={file}", f"out={tmp_path / name}", "formats=[png]", "device=cpu", *small,
        )  # fmt: skip
        (made,) = (tmp_path / name).glob("*.json")
        assert json.loads(made.read_text())["last_image"] == (None if name == "none" else str(file))
        stills = sorted((tmp_path / name).glob("*_png/*.png"))
        assert len(stills) == 5
        frames[name] = np.asarray(Image.open(stills[-1])).astype(int)
    for one, other in (("same", "right"), ("right", "none")):
        assert np.abs(frames[one] - frames[other]).max() > 2
    pipeline = RGBAPipeline.load(dora, rgba_vae=vae, device="cpu", wan="tiny")
    condition, (guide,) = pipeline.condition(picture, last["right"], 1, (5, 32, 32))
    assert condition[0, :4, 0].all() and condition[0, 3, 1].all()  # the mask: four times, and once
    assert not condition[0, :3, 1].any()
    assert guide.alpha[0, 0, :, :16].sum() > guide.alpha[0, 0, :, 16:].sum()
    assert guide.alpha[0, -1, :, :16].sum() < guide.alpha[0, -1, :, 16:].sum()


@torch.no_grad()
def test_both_experts_read_the_picture(two_looking, trained, picture):
    """A step of Euler's each, by hand."""
    parts = ("vae", "transformer", "transformer_2", "text_encoder")
    pair = RGBAPipeline.load(
        None, rgba_vae=trained[1], device="cpu", wan="tiny", hold=False,
        **{f"wan.{part}": two_looking for part in parts}, **{"wan.boundary": 0.9},
    )  # fmt: skip
    solver = Solver("euler", 2, 1.0, 5.0)
    size = {name: SIZE[name] for name in ("frames", "height", "width")}
    (clip,) = pair("a", image=picture, seed=3, solver=solver, **size)
    condition, _ = pair.condition(picture, None, 1, (5, 32, 32))
    context = pair.embed(["a"])[0]["a"][None]
    sigmas = [1.0, 5 / 6, 0.0]  # 5 u / (1 + 4 u) of 1, 1/2, 0: 0.9 lies between the steps
    x = initial_noise([3], (16, 2, 8, 8), None, 0.0, "cpu")
    for model, now, then in zip(
        (pair.transformer, pair.low_noise.transformer), sigmas, sigmas[1:], strict=False
    ):
        t = torch.tensor([1000 * now])
        x = x + (then - now) * velocity(model, x, t, context, condition)
        assert (velocity(model, x, t, context, condition) - velocity(model, x, t, context)).any()
    ((rgb, alpha),) = decode(pair.vae, x)
    assert_close(clip.rgb, rgb, rtol=0, atol=1e-3)
    assert_close(clip.alpha, alpha, rtol=0, atol=1e-3)


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
    with pytest.raises(
        ValueError, match=r"wan-tiny: .* trained on text alone and takes no picture"
    ):
        text("a disc", image=picture, **SIZE)


def test_a_wrong_picture_is_told_before_anything_is_loaded(trained, picture, tmp_path, monkeypatch):
    """The base of a run takes minutes to load, where it is a large one."""
    fresh = RGBAPipeline.load(trained[0], rgba_vae=trained[1], device="cpu", wan="tiny")
    monkeypatch.setattr(fresh, "embed", lambda prompts: pytest.fail("it loads the text encoder"))
    Image.new("RGB", (32, 32)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (32, 32)).save(tmp_path / "empty.png")
    for name, why in (("opaque", "mode RGB has no alpha channel"), ("empty", "all of it is trans")):
        with pytest.raises(MediaError, match=rf"image=.*{name}\.png: {why}.* Give one file with"):
            fresh("a disc", image=tmp_path / f"{name}.png", **SIZE)
    with pytest.raises(MediaError, match=r"last_image=.*empty\.png"):
        fresh("a disc", image=picture, last_image=tmp_path / "empty.png", **SIZE)


def test_an_opaque_picture_is_said(pipeline, tmp_path):
    Image.new("RGBA", (32, 32), (9, 9, 9, 255)).save(tmp_path / "full.png")
    with pytest.warns(UserWarning, match=r"full\.png is opaque throughout"):
        pipeline("a disc", image=tmp_path / "full.png", **SIZE)


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
    folder = tmp_path / "comfyui"
    code, printed = program(
        tmp_path / "log", "acetate.commands.export", f"checkpoint={trained[0]}", "to=comfyui",
        "dit=merged", f"out={folder}",
    )  # fmt: skip
    assert code == 0, printed[-2000:]
    held = load_file(folder / "dit.safetensors")
    table = wan21_i2v(128, 256, None, layers=8, text=64, freq=64)
    assert {name: tuple(value.shape) for name, value in held.items()} == table
    for to, more in (("wan-alpha", []), ("comfyui", ["dit=svd-lora"])):
        code, printed = program(
            tmp_path / "log", "acetate.commands.export", f"checkpoint={trained[0]}", f"to={to}",
            f"out={tmp_path}/no", *more,
        )  # fmt: skip
        assert code != 0 and "holds a wider patch embedding" in printed
        assert not (tmp_path / "no").exists()
