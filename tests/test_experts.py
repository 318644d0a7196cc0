"""Two experts over the noise levels, as in Wan2.2's A14B: sampling switches at the boundary."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from acetate import RGBAPipeline
from acetate.models.dit import velocity
from acetate.models.loading import load_transformer
from acetate.pipeline import solver_of
from acetate.sampling import EllipsePath, LowNoise, Solver, sample_clips, sample_latents
from acetate.settings import SettingError
from tests.conftest import TINY
from tests.experts import BOUNDARY, doras, two_experts  # noqa: F401  (fixtures)

SMALL = {"frames": 5, "height": 24, "width": 32, "steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def pair(two_experts):
    return tuple(
        load_transformer(str(two_experts), part=part) for part in ("transformer", "transformer_2")
    )


def drawn():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 2, 4, 6), (2, 5, 64), (1, 5, 64))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("boundary", [0.001, BOUNDARY, 0.999])
def test_the_same_base_twice_is_the_base(pair, name, boundary):
    solver, (noise, context, negative) = Solver(name=name, steps=4, shift=12), drawn()
    alone = sample_latents(pair[0], noise, context, negative, solver)
    low = LowNoise(pair[0], boundary)
    assert torch.equal(sample_latents(pair[0], noise, context, negative, solver, low=low), alone)


@torch.no_grad()
def test_each_expert_has_its_steps_and_its_guidance(pair):
    """By hand, with Euler's steps."""
    high, low = pair
    solver, (noise, context, negative) = Solver("euler", 6, 4.0, 12.0, 3.0), drawn()
    sigmas = torch.linspace(1, 0, 7)
    sigmas = 12 * sigmas / (1 + 11 * sigmas)
    x, seen = noise, []
    for now, then in pairwise(sigmas):
        model, guidance = (high, 4.0) if 1000 * now >= 1000 * BOUNDARY else (low, 3.0)
        seen.append(guidance)
        t = (1000 * now).expand(len(x))
        v, without = (velocity(model, x, t, c.expand_as(context)) for c in (context, negative))
        x = x + (then - now) * (without + guidance * (v - without))
    assert seen == [4.0, 4.0, 4.0, 4.0, 3.0, 3.0]
    ours = sample_latents(high, noise, context, negative, solver, low=LowNoise(low, BOUNDARY))
    assert_close(ours, x, rtol=1e-4, atol=1e-4)
    swapped = sample_latents(low, noise, context, negative, solver, low=LowNoise(high, BOUNDARY))
    assert (ours - swapped).abs().max() > 0.01


def test_offloaded_experts_take_turns(pair, cached):
    """Each is moved away before the other comes; here all devices are the CPU."""
    moved = []
    models = dict(zip(("high", "low"), pair, strict=True))
    for name, model in models.items():
        model.cpu = lambda name=name: moved.append(f"{name} away")
        model.to = lambda device, name=name: moved.append(f"{name} here")
    vae = RGBAPipeline.load(None, rgba_vae=str(cached[1]), device="cpu").vae
    _, context, negative = drawn()
    low = LowNoise(models["low"], BOUNDARY)
    clips = sample_clips(
        models["high"], vae, context, negative, solver=Solver(steps=2, shift=3), offload=True,
        low=low, seeds=[0, 1], size=(5, 16, 16), guide=None, mean_shift=0.0, device="cpu",
    )  # fmt: skip
    assert len(list(clips)) == 2
    for model in models.values():
        del model.cpu, model.to
    assert moved == ["high here", "high away", "low here", "high away", "low away"]


@pytest.mark.slow
@pytest.mark.long
def test_the_pipeline_has_both(two_experts, doras, cached):
    parts = ("vae", "transformer", "transformer_2", "text_encoder")
    wan = {**dict.fromkeys(parts, str(two_experts)), "boundary": BOUNDARY}
    settings = {"rgba_vae": str(cached[1]), "wan": "tiny", **SMALL}
    settings |= {f"wan.{name}": value for name, value in wan.items()}
    high, low = (str(doras[name]) for name in ("high", "low"))
    both = RGBAPipeline.load(high, dora_2=low, **settings)
    guide = EllipsePath()
    (clip,) = both("a red disc", guide=guide)
    (half,) = RGBAPipeline.load(high, dora_2="base", **settings)("a red disc", guide=guide)
    assert (clip.rgb - half.rgb).abs().max() > 1e-3
    for wrong, message in (
        (RGBAPipeline.load(high, **settings), r"dora_2=null: the low-noise one would be without"),
        (RGBAPipeline.load(low, dora_2=high, **settings), "was trained on the low-noise expert"),
        (
            RGBAPipeline.load(high, dora_2=low, **settings | {"wan.transformer_2": None}),
            "wan.transformer_2=null: this base is one DiT",
        ),
        (
            RGBAPipeline.load(high, dora_2=low, **settings | {"wan.boundary": None}),
            "Wan2.2's T2V-A14B has 0.875",
        ),
        (
            RGBAPipeline.load(high, dora_2=low, **settings | {"wan.transformer_2": TINY}),
            r"has no transformer_2/ \(nor low_noise_model/\)",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            wrong("a red disc", guide=guide)
    with pytest.raises(SettingError, match=r"wan\.boundary=1: must be a number above 0, below 1"):
        RGBAPipeline.load(high, dora_2=low, **settings | {"wan.boundary": 1})


def test_published_settings_are_the_defaults():
    """As Wan's own code has them: wan_t2v_A14B.py gives guidance 3 of low, 4 of high noise."""
    config = RGBAPipeline.load(None, wan="wan22_a14b", device="cpu").config
    assert solver_of(config) == Solver("unipc", 40, 4.0, 12.0, 3.0)
    assert config.wan.boundary == 0.875
    assert solver_of(config, guidance=2.0) == Solver("unipc", 40, 2.0, 12.0, None)
    config = RGBAPipeline.load(None, wan="wan22_i2v_a14b", device="cpu").config
    assert solver_of(config) == Solver("unipc", 40, 3.5, 5.0, 3.5)  # wan_i2v_A14B.py
    assert (config.wan.boundary, config.wan.image_encoder) == (0.9, None)
    config = RGBAPipeline.load(None, wan="wan21_i2v_14b", device="cpu").config
    assert solver_of(config) == Solver("unipc", 40, 5.0, 3.0, None)  # generate.py of Wan2.1, 480p
    one = RGBAPipeline.load(None, wan="wan21_14b", device="cpu").config
    assert solver_of(one) == Solver("unipc", 50, 5.0, 5.0, None)


def test_original_folders_are_found(two_experts, tmp_path):
    for name, part in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        (tmp_path / name).symlink_to(two_experts / part)
        theirs = load_transformer(str(tmp_path), part=part).state_dict()
        ours = load_transformer(str(two_experts), part=part).state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
