"""Wan's VAE and DiT from original files, executed our way."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from acetate.models.dit import VelocityField
from acetate.models.loading import load_transformer, load_vae
from acetate.models.wan import WanDecoder, WanEncoder, WanHead


@pytest.fixture
def vae(golden, tmp_path):
    file = golden("wan_vae")
    torch.save(file.under("weights"), tmp_path / "Wan2.1_VAE.pth")
    vae = load_vae(str(tmp_path / "Wan2.1_VAE.pth"))
    for ours, theirs in (("base_dim", "dim"), ("z_dim", "z_dim"), ("dim_mult", "dim_mult")):
        assert vae.config[ours] == file.metadata[theirs]
    assert vae.config.temperal_downsample == file.metadata["temperal_downsample"]
    assert vae.config.num_res_blocks == file.metadata["num_res_blocks"]
    return vae


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_vae(golden, vae, chunk):
    file = golden("wan_vae")
    encoder, head, decoder = WanEncoder(vae), WanHead(vae), WanDecoder(vae)
    for frames in file.metadata["T"]:
        part = f"T{frames}"
        with torch.no_grad():
            features = encoder(file[f"{part}/video"], chunk)
            mean, log_variance = head(features)
            decoded = decoder(file[f"{part}/latent"], chunk)
        assert_close(features, file[f"{part}/features"], rtol=0, atol=1e-4)
        assert_close(mean, file[f"{part}/mu"], rtol=0, atol=3e-5)
        assert_close(log_variance, file[f"{part}/log_var"], rtol=0, atol=3e-5)
        assert_close(decoded, file[f"{part}/decoded"], rtol=0, atol=1e-4)


def test_dit(golden, tmp_path):
    file = golden("dit")
    save_file(file.under("weights"), tmp_path / "diffusion_pytorch_model.safetensors")
    shape = {key: file.metadata[key] for key in ("num_heads", "eps")}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    transformer = load_transformer(str(tmp_path))
    for case in (f"case{i}" for i in range(file.metadata["n_cases"])):
        latents = file[f"{case}/latents"].requires_grad_()
        output = transformer(
            latents, file[f"{case}/timestep"], file[f"{case}/context"], return_dict=False
        )[0]
        (gradient,) = torch.autograd.grad(output.square().mean(), latents)
        expected = file[f"{case}/grad_latents_of_mean_square"]
        assert_close(output, file[f"{case}/output"], rtol=0, atol=1e-4)
        assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        one_prompt = VelocityField(transformer, file[f"{case}/context"][:1])
        alone = one_prompt(latents[:1], file[f"{case}/timestep"][:1])
        assert_close(alone, output[:1], rtol=0, atol=1e-4)
