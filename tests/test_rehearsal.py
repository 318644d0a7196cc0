"""Both stages on a GPU that is not there: what mixes devices raises, and what a GPU would be waited
for is counted. tests/test_fake_gpu.py shows that it would be."""

import pytest
import torch

from acetate import memory
from acetate.blank import blank_transformer, blank_vae
from acetate.models.rgba_vae import RGBAVAE, RGBADecoders
from acetate.regions import fit_ellipses
from acetate.sampling import SOLVERS, Solver, sample_clips
from data_prep.latent_encoder import Encoder, Run, Sources
from data_prep.latent_plan import Settings
from tests.compose import composed
from tests.conftest import TINY
from tests.fake_gpu import fake_gpu
from tests.rehearsal import batch_of, of_published_size, rehearse, with_numbers

SMALL = {
    "vae_rgba": ["loss.diffusion.mode=bidirectional", "model.checkpointing=true"],
    "dit_dora": ["data.latents=x", "rgba_vae=x", "task.checkpointing=true", "data.batch_size=2"],
}
PUBLISHED = {
    "vae_rgba_wan21": ["data.shards=x"],
}


def check(step):
    """Of a training step that does not log."""
    assert not step.waits
    assert step.attentions
    assert [attention for attention in step.attentions if not attention.fused] == []
    assert not step.softmaxes


@pytest.mark.parametrize("experiment", SMALL)
def test_a_step_and_a_validation(experiment, tmp_path, two_blocks):
    """Loaded, trained for a step and validated by Lightning's own loops."""
    config = composed(tmp_path, f"experiment={experiment}", *SMALL[experiment], two_blocks)
    batch, task = batch_of(config, text_width=64), with_numbers(config)
    with fake_gpu() as gpu:
        step, validation = rehearse(gpu, task, batch)
    check(step)
    assert validation is not None
    assert not [place for place in validation.waits if place.startswith("copy to the cuda")]


def test_a_step_with_the_kernel_of_norm_and_silu(tmp_path, two_blocks):
    """It takes and gives what a step without it does, in the layout of the convolutions."""
    pytest.importorskip("triton")
    config = composed(tmp_path, "experiment=vae_rgba", *SMALL["vae_rgba"], two_blocks)
    batch, steps = batch_of(config, text_width=64), []
    for fused in (False, True):
        config.task.fused_norm = fused
        with fake_gpu() as gpu:
            steps.append(rehearse(gpu, with_numbers(config), batch, validate=False)[0])
    check(steps[1])
    without, found = ([(c.flops, c.channels_last) for c in step.large(0)] for step in steps)
    assert found == without and len(found) > 100


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_step_of_the_published_size(experiment, tmp_path):
    config = composed(tmp_path, f"experiment={experiment}", *PUBLISHED[experiment])
    batch = batch_of(config, text_width=4096)
    with fake_gpu() as gpu:
        step, _ = rehearse(gpu, of_published_size(config), batch, validate=False)
    check(step)
    assert len(step.large()) > 100
    # but for what losses give back: of the pictures of two decoders, and of the latents
    assert len([c for c in step.large() if not c.channels_last]) == 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling(solver):
    """Waits for what leaves the GPU, twice a clip; UniPC also solves small systems."""
    halves = [blank_vae(TINY) for _ in range(2)]
    with fake_gpu() as gpu:
        vae = RGBADecoders(rgb=halves[0], alpha=halves[1], chunk=1)
        transformer = blank_transformer(TINY, torch.bfloat16)
        for model in (vae, transformer):
            memory.without_numbers(model, "cuda:0")
        context = torch.zeros(1, 16, transformer.config.text_dim)
        gpu.waits.clear()
        clips = list(
            sample_clips(
                transformer, vae, context, context[:1], seeds=[1], size=(5, 32, 32),
                guide=torch.zeros(1, 1, 2, 8, 8), mean_shift=0.5,
                solver=Solver(solver, steps=2), device="cuda:0", progress=False,
            )
        )  # fmt: skip
    assert [alpha.shape for _, alpha in clips] == [(1, 5, 32, 32)]
    small = ("copy to the cuda", "aten._linalg_solve_ex")
    away = {place: n for place, n in gpu.waits.items() if not place.startswith(small)}
    assert sum(away.values()) == 2, gpu.waits
    assert all(place.startswith("copy to the cpu at acetate/sampling.py") for place in away)


def test_caching(tmp_path):
    """Ellipses and latents of a clip, and of its first frame alone, in bf16 as the published recipe
    caches them."""
    base = blank_vae(TINY)
    vae = RGBAVAE(vae=base, merge_init="residual", lora_rank=2, lora_alpha=2.0, chunk=1)
    settings = Settings(
        seed=0, variants=1, frames=(9,), area=32 * 32, max_aspect=1.0, sizes=None,
        space_multiple=None, dtype="bfloat16", ellipse={}, per_tar=1, condition="first",
    )  # fmt: skip
    sources = Sources(TINY, "", TINY, prompt_length=16, frozen_dtype="bfloat16")
    run = Run(tmp_path, {"settings": {"eps": 0.0}}, sources, settings, kept=None)
    with fake_gpu():
        vae.cast_frozen("bfloat16")
        memory.without_numbers(vae, "cuda:0")
        rgb, alpha = (torch.zeros(1, c, 9, 32, 32, device="cuda:0") for c in (3, 1))
        made = Encoder(run, vae, "cuda:0").latents(rgb, alpha, 0)
        assert made.keys() == {"latents", "condition"}
        for latents in made.values():
            assert (latents.shape, latents.dtype) == ((16, 3, 8, 8), torch.bfloat16)
            assert latents.device.type == "cpu"
        assert fit_ellipses(alpha, 4, 4).device.type == "cuda"
