import pytest
import torch
from torch.testing import assert_close

from acetate import flow
from acetate.losses.diffusion import DiffusionLoss
from acetate.released.flow import schedule
from acetate.sampling import Solver


@pytest.fixture
def levels(golden):
    metadata = golden("flow_matching").metadata
    return flow.schedule(metadata["num_train_timesteps"], metadata["shift"])


def test_schedule(golden, levels):
    file = golden("flow_matching")
    assert_close(levels.sigmas, file["sigmas"], rtol=1e-6, atol=0)
    assert_close(levels.timesteps, file["timesteps"], rtol=0, atol=1e-4)
    assert_close(levels.weights, file["training_weights"], rtol=0, atol=1e-5)


def test_interpolate_and_velocity(golden, levels):
    file = golden("flow_matching")
    latents, noise = file["latents"], file["noise"]
    assert_close(flow.velocity(latents, noise), file["target"], rtol=1e-6, atol=1e-6)
    for step in file.metadata["ids"]:
        sigma = levels.sigmas[[step]].expand(len(latents))
        assert_close(
            flow.interpolate(latents, noise, sigma), file[f"add_noise/{step}"], rtol=1e-6, atol=1e-6
        )


def test_bfloat16_timesteps(golden):
    file = golden("flow_matching")
    ids = torch.arange(file.metadata["num_train_timesteps"])
    seen = schedule().rounded(ids)
    assert_close(seen, file["bf16/effective_id"].long())
    assert seen.unique().numel() == file.metadata["bf16_distinct_ids"]


def test_upstream_loss_and_gradient(golden, levels, monkeypatch):
    """The released clamp(weight * squared error * mask, 0, 1).mean(), with its map given."""
    file = golden("flow_matching")
    monkeypatch.setattr("acetate.released.judge.three_valued_map", lambda *_: file["rgb_mask"])
    loss = DiffusionLoss(
        mode="upstream",
        weight=1.0,
        margin=1.0,
        latents="raw",
        timestep_weight=True,
        eps=0.0,
        build_judge=None,
    )
    assert_close(loss.levels.sigmas, levels.sigmas, rtol=0, atol=0)
    for step in file.metadata["ids"]:
        prediction = file["prediction"].clone().requires_grad_()
        ids = torch.full((len(prediction),), step)
        value = loss(
            file["latents"], file["rgb_mask"], file["noise"], ids, lambda *_, p=prediction: p, 4, 8
        )
        (gradient,) = torch.autograd.grad(value, prediction)
        assert_close(value, file[f"vae_loss/{step}"].squeeze(), rtol=1e-5, atol=1e-7)
        expected = file[f"vae_loss_grad/{step}"]
        assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_mean_shift_and_dit_loss(golden, levels):
    """The released DiT stage: shifted noise is both in x_t and in the target; the loss is w(t)
    times the mean."""
    file = golden("flow_matching")
    guide, shift = file["gauss_mask"][None, None], file.metadata["mean_shift"]
    latents, prediction = file["latents"][:1], file["prediction"][:1]
    noise = flow.mean_shift(file["noise"][:1], guide, shift)
    assert_close(noise, file["shifted_noise"], rtol=0, atol=1e-6)
    target = flow.velocity(latents, noise)
    assert_close(target, file["shifted_target"], rtol=0, atol=2e-6)
    for step in file.metadata["ids"]:
        x_t = flow.interpolate(latents, noise, levels.sigmas[[step]])
        assert_close(x_t, file[f"dit_noisy_latents/{step}"], rtol=0, atol=2e-6)
        v = prediction.clone().requires_grad_()
        error = flow.squared_error(latents, noise, levels, torch.tensor([step]), lambda *_, v=v: v)
        loss = (levels.weights[[step]] * error.flatten(1).mean(1)).mean()
        (gradient,) = torch.autograd.grad(loss, v)
        assert_close(loss, file[f"dit_loss/{step}"].squeeze(), rtol=1e-5, atol=1e-7)
        expected = file[f"dit_loss_grad/{step}"]
        assert_close(
            gradient, expected, rtol=0, atol=1e-4 * max(expected.abs().max().item(), 1e-12)
        )


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_inference_levels(golden, name):
    """Euler takes the released noise levels; UniPC's, which diffusers sets, start and end close to
    them."""
    file = golden("flow_matching")
    for levels in (n for n in file.tensors if n.startswith("infer") and n.endswith("/sigmas")):
        steps = len(file[levels])
        scheduler = Solver(name=name, steps=steps, shift=file.metadata["shift"]).scheduler("cpu")
        tolerance = 1e-6 if name == "euler" else 0.01
        assert_close(scheduler.sigmas[:steps].float(), file[levels], rtol=0, atol=tolerance)
        assert scheduler.sigmas[steps] == 0
