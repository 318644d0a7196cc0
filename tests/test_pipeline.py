"""The objects that Python users meet: RGBAPipeline, RGBAVAE, Clip."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from acetate import RGBAVAE, Clip, RGBAPipeline, over
from acetate.assembly import check_models
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.guides import ClipGuide, MaskGuide, draw
from acetate.models import rgba_vae
from acetate.models.wan import Geometry
from acetate.sampling import EllipsePath
from acetate.settings import SettingError
from tests.compose import called
from tests.conftest import TINY

SMALL = {"frames": 5, "height": 24, "width": 32, "steps": 1}


@pytest.fixture(scope="module")
def pipeline(dora, cached):
    return RGBAPipeline.load(str(dora), rgba_vae=str(cached[1]), device="cpu")


def moving(frames=5, height=24, width=32):
    """A red square that goes to the right."""
    rgb, alpha = torch.full((3, frames, height, width), -1.0), torch.zeros(1, frames, height, width)
    for t in range(frames):
        rgb[0, t, 8:16, 4 + t : 12 + t], alpha[0, t, 8:16, 4 + t : 12 + t] = 1, 1
    return Clip(rgb, alpha)


def test_importing_acetate_imports_nothing_heavy():
    code = (
        "import sys, acetate; print('torch' in sys.modules); from acetate import over; "
        "print(over.__module__)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["False", "acetate.alpha"]


@pytest.mark.slow
def test_the_pipeline_makes_what_the_command_makes(pipeline, dora, cached, tmp_path):
    path = EllipsePath(centre=(0.3, 0.5), axes=(0.6, 0.4), end_centre=(0.7, 0.5))
    one, two = pipeline(["a red disc", "blue smoke"], guide=path, seed=3, **SMALL)
    (alone,) = pipeline("blue smoke", guide=[path], seed=4, **SMALL)
    assert_close(alone.rgb, two.rgb, rtol=0, atol=1e-5)
    assert (one.prompt, one.seed, two.seed, one.fps) == ("a red disc", 3, 4, 16)
    assert (
        one.guide is not None
        and one.rgb.shape == (3, 5, 24, 32)
        and one.alpha.shape == (1, 5, 24, 32)
    )
    called(
        "sample", "prompt=blue smoke", f"dora={dora}", f"rgba_vae={cached[1]}", "seed=4",
        "device=cpu",
        "guide.centre=[0.3,0.5]", "guide.axes=[0.6,0.4]", "guide.end_centre=[0.7,0.5]",
        "formats=[png]",
        f"out={tmp_path}", *(f"{name}={value}" for name, value in SMALL.items()),
    )  # fmt: skip
    pictures = Clip.read(tmp_path / "000-blue-smoke-seed4_png")
    assert_close(pictures.alpha, alone.alpha.clamp(0, 1), rtol=0, atol=0.51 / 255)


def test_guides_count(pipeline):
    with pytest.raises(ValueError, match="2 guides for 3 prompts"):
        pipeline(["a", "b", "c"], guide=[EllipsePath(), EllipsePath()], **SMALL)


def test_wrong_settings_are_named(dora):
    with pytest.raises(SettingError, match="frames=6: must be one of 1, 5, 9"):
        RGBAPipeline.load(str(dora), frames=6)


def test_clips_over_colors():
    clip = moving()
    magenta = clip.over("magenta")
    assert magenta[:, 0, 0, 0].tolist() == [1, -1, 1] and magenta[:, 0, 10, 6].tolist() == [
        1,
        -1,
        -1,
    ]
    assert_close(clip.over("black"), over(clip.rgb, clip.alpha, torch.tensor(-1.0)))
    with pytest.raises(ValueError, match="background 'pink'; choose from key, blue"):
        clip.over("pink")


@pytest.mark.parametrize("name", ["a.mov", "a.webm", "a.webp", "a.apng", "a_png"])
def test_clips_are_saved_and_read(tmp_path, name):
    clip = moving()
    assert clip.save(tmp_path / "deep" / name) == tmp_path / "deep" / name
    again = Clip.read(tmp_path / "deep" / name)
    assert again.rgb.shape == clip.rgb.shape
    assert (again.alpha - clip.alpha).abs().mean() < 0.02
    with pytest.raises(
        ValueError, match=r"the end of the name says the format; it is one of _png, \.webm"
    ):
        clip.save(tmp_path / "a.gif")


def test_the_vae_encodes_and_decodes(cached):
    vae = RGBAVAE.load(str(cached[1]), device="cpu")
    clip = moving()
    latents = vae.encode(clip, "green")
    assert latents.shape == (1, *vae.model.geometry.latent_shape(5, 24, 32))
    model = load_rgba_vae(vae=TINY, adapters=str(cached[1]))
    green = torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1, 1)
    hard = over(clip.rgb[None], clip.alpha[None], green)
    with torch.no_grad():
        assert_close(latents, model.normalise(model.encode(hard, clip.alpha[None])))
    (decoded,) = vae.decode(latents, fps=24)
    assert (
        decoded.rgb.shape == clip.rgb.shape
        and decoded.alpha.shape == clip.alpha.shape
        and decoded.fps == 24
    )


def test_guides_are_drawn(tmp_path, make_vae):
    geometry, size = Geometry.of(make_vae("wan21")), (5, 32, 48)
    mask, ellipses = draw(EllipsePath(centre=(0.5, 0.25)), size, geometry, {})
    assert mask.shape == (1, 1, 2, 4, 6) and ellipses.shape == (1, 2, 5)
    assert_close(ellipses[0, :, :2], torch.tensor([[2.5, 0.5]] * 2, dtype=torch.float64))
    torch.save(mask[0, 0], tmp_path / "gauss_mask")
    assert_close(
        draw(MaskGuide(tmp_path / "gauss_mask"), size, geometry, {})[0], mask, rtol=0, atol=0
    )
    with pytest.raises(ValueError, match=r"has 2 frames, this clip 3 latent frames"):
        draw(MaskGuide(tmp_path / "gauss_mask"), (9, 32, 48), geometry, {})
    picture = Image.new("RGBA", (32, 32))
    picture.paste((255, 255, 255, 255), (16, 0, 32, 16))
    picture.save(tmp_path / "alpha.png")
    _, fitted = draw(ClipGuide(tmp_path / "alpha.png"), (5, 32, 32), geometry, {"threshold": 0.1})
    assert_close(fitted[0, :, :2], torch.tensor([[2.5, 0.5]] * 2, dtype=torch.float64))


def test_models_that_the_dora_was_trained_with(make_vae):
    vae = rgba_vae.RGBAVAE(vae=make_vae("tiny"), merge_init="scratch", lora_rank=1, lora_alpha=1.0)
    facts = {"vae_sha256": vae.latents_sha256(), "text_encoder_sha256": "t"}
    check_models(facts, vae, "t")
    with pytest.raises(ValueError, match="The DoRA's vae_sha256 is 1234"):
        check_models(facts | {"vae_sha256": "1234"}, vae, "t")
    decoders = rgba_vae.RGBADecoders(rgb=make_vae("tiny"), alpha=make_vae("tiny"))
    with pytest.warns(UserWarning, match="holds decoders only, which do not say"):
        check_models(facts, decoders, "t")
    with pytest.raises(ValueError, match="The DoRA's text_encoder_sha256"):
        check_models({"text_encoder_sha256": "t"}, decoders, "u")
