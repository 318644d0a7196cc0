"""Exports of both experts: one folder, in which diffusers' own pipeline samples as we do."""

import json

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from acetate.assembly import put_dora
from acetate.formats.names import original_dit_name
from acetate.models.loading import load_transformer
from acetate.models.text import TextEncoder
from acetate.sampling import LowNoise, Solver, sample_latents
from tests.commands.exported import export
from tests.conftest import TINY
from tests.experts import BOUNDARY, doras, of_two, two_experts  # noqa: F401  (fixtures)


@pytest.fixture
def settings(two_experts, doras):
    return [*of_two(two_experts), f"checkpoint={doras['high']}", f"checkpoint_2={doras['low']}"]


@pytest.mark.slow
@pytest.mark.long
def test_diffusers_samples_both_experts_as_we_do(tmp_path, two_experts, doras, settings, cached):
    out = export(tmp_path / "out", "to=diffusers", f"rgba_vae={cached[1]}", "shift=12", *settings)
    index = json.loads((out / "model_index.json").read_text())
    assert index["boundary_ratio"] == BOUNDARY
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert (out / "adapter").is_dir() and (out / "adapter_2").is_dir()
    pipe = WanPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = pipe(
        prompt="a red disc", num_frames=5, height=32, width=32, num_inference_steps=6,
        guidance_scale=4.0, guidance_scale_2=3.0, latents=noise, max_sequence_length=64,
        output_type="latent",
    ).frames  # fmt: skip
    text = TextEncoder(TINY, 64, dtype="float32")
    models = {}
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        models[expert] = load_transformer(str(two_experts), part=part)
        put_dora(models[expert], str(doras[expert]), expert)
    solver = Solver(steps=6, guidance=4.0, shift=12.0, guidance_2=3.0)
    low = LowNoise(models["low"], BOUNDARY)
    assert 0 < low.first(solver.scheduler("cpu").timesteps) < 6
    context, negative = text.context(["a red disc"]), text.context([""])
    ours = sample_latents(models["high"], noise, context, negative, solver, low=low)
    assert_close(latents, ours, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_comfyui_files_say_whose_they_are(tmp_path, two_experts, doras, settings):
    out = export(tmp_path / "out", "to=comfyui", *settings)
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        merged = load_transformer(str(two_experts), part=part)
        put_dora(merged, str(doras[expert]), expert)
        expected = {original_dit_name(name): value for name, value in merged.state_dict().items()}
        state = load_file(out / f"dit_{expert}_noise.safetensors")
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


def test_one_expert_alone(tmp_path, two_experts, doras):
    for to, suffix in (("acetate", "dit_dora"), ("wan-alpha", "t2v")):
        out = export(tmp_path / to, f"to={to}", f"checkpoint={doras['low']}", *of_two(two_experts))
        assert (out / f"{suffix}_low_noise.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["to=diffusers", "rgba_vae=x", "checkpoint_2=null"],
            "both experts, and checkpoint_2=null",
        ),
        (["to=comfyui", "checkpoint={low}"], "was trained on the low-noise expert, and stands in"),
        (["to=comfyui", "checkpoint_2={high}"], "was trained on the high-noise expert, and stands"),
        (["to=comfyui", "wan.transformer_2=null"], "checkpoint_2=.* is for the second expert"),
        (
            ["to=comfyui", "wan.transformer_2=null", "checkpoint={low}", "checkpoint_2=null"],
            r"of the low-noise expert; wan\.transformer_2=null is one DiT",
        ),
    ],
)
def test_wrong_pairs_say_what_to_do(tmp_path, doras, settings, overrides, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "out", *settings, *(text.format(**doras) for text in overrides))
    assert not (tmp_path / "out").exists()
