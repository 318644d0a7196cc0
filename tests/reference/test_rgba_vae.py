"""The RGBA-VAE and the whole released training step, through the real task under
reproduce=upstream."""

import json

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file
from torch.testing import assert_close

from acetate import flow
from acetate.alpha import harden, over, palette_colors
from acetate.formats.names import original_vae_name, vae_name
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.formats.wan_alpha import trainable_from_wan_alpha, trainable_to_wan_alpha
from acetate.losses.diffusion import DiffusionLoss
from acetate.models.adapters import load_trainable, trainable_state
from acetate.models.text import prompt_cache
from acetate.tasks.vae import Draw
from tests.compose import composed


@pytest.fixture
def task(golden, tmp_path):
    """The task as `train.py experiment=vae_rgba reproduce=upstream` builds it, on the golden
    weights' own files."""
    torch.save(golden("wan_vae").under("weights"), tmp_path / "Wan2.1_VAE.pth")
    dit, rgba = golden("dit"), golden("rgba_vae")
    (tmp_path / "dit").mkdir()
    save_file(dit.under("weights"), tmp_path / "dit/diffusion_pytorch_model.safetensors")
    (tmp_path / "dit/config.json").write_text(
        json.dumps({key: dit.metadata[key] for key in ("num_heads", "eps")})
    )
    save_file(golden("recon_losses").under("weights"), tmp_path / "vgg16.safetensors")
    context = golden("vae_training_step")["context"]
    cache = prompt_cache("", "text", context.shape[1], str(tmp_path))
    save_file({"embeds": context.contiguous()}, cache)
    overrides = [
        "experiment=vae_rgba",
        "reproduce=upstream",
        f"wan.vae={tmp_path}/Wan2.1_VAE.pth",
        f"wan.transformer={tmp_path}/dit",
        "wan.text_encoder=text",
        f"wan.prompt_length={context.shape[1]}",
        "wan.dtype=float32",
        f"loss.perceptual.weights={tmp_path}/vgg16.safetensors",
        f"model.lora_rank={rgba.metadata['lora_rank']}",
        f"model.lora_alpha={rgba.metadata['lora_alpha']}",
    ]
    task = instantiate(composed(tmp_path, *overrides).task)
    task.diffusion.levels = flow.schedule()  # the golden step was run without rounding its timestep
    task.configure_model()
    load_trainable(
        task.vae, trainable_from_wan_alpha(rgba.under("weights")), "rgba_vae.safetensors"
    )
    return task


def inputs(golden):
    file = golden("rgba_vae")
    return file["video_fgr"], (file["video_pha"] + 1) / 2


def test_encoder_input(golden):
    file = golden("rgba_vae")
    rgb, alpha = inputs(golden)
    background = palette_colors(torch.full((len(rgb),), file.metadata["background_index"]))
    assert_close(over(rgb, harden(alpha), background), file["encoder_input"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1])
def test_encode_and_decode(golden, task, chunk):
    file, vae = golden("rgba_vae"), task.vae
    _, alpha = inputs(golden)
    vae.chunk = chunk
    with torch.no_grad():
        features = vae.encoder(
            torch.cat([file["encoder_input"], (alpha * 2 - 1).expand(-1, 3, -1, -1, -1)]), chunk
        )
        raw = vae.encode(file["encoder_input"], alpha)
        rgb_hat, alpha_hat = vae.decode(file["latents_raw"])
    expected = torch.cat([file["features_fgr"], file["features_pha"]])
    assert_close(features, expected, rtol=0, atol=1e-4)
    assert_close(raw, file["latents_raw"], rtol=0, atol=3e-5)
    assert_close(vae.normalise(raw), file["infer/latents_normalised"], rtol=0, atol=3e-5)
    assert_close(vae.denormalise(vae.normalise(raw)), raw, rtol=0, atol=3e-5)
    assert_close(rgb_hat, file["decoded_fgr"], rtol=0, atol=1e-4)
    assert_close(alpha_hat * 2 - 1, file["decoded_pha"], rtol=0, atol=1e-4)
    assert_close(rgb_hat[:1].clamp(-1, 1), file["infer/decoded_fgr"], rtol=0, atol=1e-4)


def test_merged_weights(golden, task):
    """What the parametrised convolutions run with is what the released inference merges."""
    file = golden("rgba_vae")
    for key, expected in file.under("merged").items():
        probe = trainable_from_wan_alpha(
            {f"{key.removesuffix('.weight')}.lora_A.default.weight": torch.empty(1, 1)}
        )
        (name,) = probe
        conv = task.vae.get_submodule(name.split(".parametrizations")[0])
        assert_close(conv.weight, expected, rtol=0, atol=1e-6)


def test_released_file_comes_out_as_it_went_in(golden):
    """Every name, shape and bit of what trains; and the VAE's own names are the released ones."""
    released = golden("rgba_vae").under("weights")
    ours = trainable_to_wan_alpha(
        trainable_from_wan_alpha(released), golden("rgba_vae").metadata["lora_alpha"]
    )
    assert ours.keys() == released.keys()
    for name, value in ours.items():
        assert_close(value, released[name], rtol=0, atol=0, msg=name)
    wan = golden("wan_vae").under("weights")
    assert {original_vae_name(vae_name(name)) for name in wan} == wan.keys()


def test_whole_training_step(golden, task, monkeypatch):
    file = golden("vae_training_step")
    rgb, alpha = inputs(golden)
    count = len(rgb)

    def background(name):
        return palette_colors(torch.full((count,), file.metadata[f"{name}_background"][0]))

    seen = {}
    forward = DiffusionLoss.forward

    def spy(self, latents, alpha, noise, ids, velocity_field, *strides):
        def recorded(x_t, timestep):
            seen["x_t"], seen["timestep"] = x_t, timestep
            seen["prediction"] = velocity_field(x_t, timestep)
            return seen["prediction"]

        return forward(self, latents, alpha, noise, ids, recorded, *strides)

    monkeypatch.setattr(DiffusionLoss, "forward", spy)
    ids = torch.full((count,), file.metadata["timestep_id"])
    draw = Draw(background("encoder"), background("soft"), background("hard"), file["noise"], ids)
    loss, parts, *_ = task.step({"rgb": rgb, "alpha": alpha, "key": list("ab")}, draw)
    loss.backward()

    logged = file.metadata["logged"]
    views = {"alpha": "pha", "soft": "fgr_soft", "hard": "fgr_hard"}
    terms = {"l1": "l1", "perceptual": "per", "edge": "sobel"}
    for view, their_view in views.items():
        for term, their_term in terms.items():
            expected = logged[f"loss_{their_term}_{their_view}"]
            assert parts[f"{view}/{term}"].item() == pytest.approx(expected, rel=1e-5), (view, term)
    assert parts["diffusion"].item() == pytest.approx(logged["loss_t2v"], rel=1e-5)
    assert loss.item() == pytest.approx(logged["total_loss"], rel=1e-5)
    assert_close(seen["x_t"], file["noisy_latents"], rtol=0, atol=3e-5)
    assert_close(seen["timestep"], file["timestep"].expand(count), rtol=0, atol=1e-4)
    assert_close(seen["prediction"], file["dit_prediction"], rtol=0, atol=1e-4)

    parameters = trainable_state(task.vae)
    for key, expected in file.under("grad").items():
        ((name, like),) = trainable_from_wan_alpha({key: expected}).items()
        assert_close(
            parameters[name].grad, like, rtol=0, atol=1e-4 * expected.abs().max().item(), msg=key
        )
    for key, norm in file.metadata["grad_norms"].items():
        (name,) = trainable_from_wan_alpha({key: torch.empty(1, 1)})
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), key
    assert len(parameters) == len(file.metadata["grad_norms"])


def released(golden, folder, layout):
    """The golden weights in a file of the layout, beside Wan2.1_VAE.pth: (base, what load_rgba_vae
    is given)."""
    wan, rgba = golden("wan_vae").under("weights"), golden("rgba_vae")
    torch.save(wan, folder / "Wan2.1_VAE.pth")
    trained = rgba.under("weights")
    frozen = {name: wan[key] for name, key in rgba.metadata["frozen_from_wan_vae"].items()}
    lora = {name: value for name, value in trained.items() if ".lora_" in name}
    file = folder / {
        "flat": "pytorch_model.bin",
        "lightning": "last.ckpt",
        "decoder.bin": "decoder.bin",
    }.get(layout, "")
    if layout == "flat":
        torch.save(frozen | trained, file)
    elif layout == "lightning":
        torch.save({"state_dict": frozen | trained, "epoch": 0}, file)
    elif layout == "decoder.bin":
        torch.save(lora, file)
    else:
        for channel, part in (("rgb", "vae_fgr"), ("alpha", "vae_pha")):
            whole = dict(wan)
            for name, down in lora.items():
                if name.startswith(part) and ".lora_A." in name:
                    up = lora[name.replace(".lora_A.", ".lora_B.")]
                    key = (
                        name.removeprefix(f"{part}.").split(".lora_A")[0].removesuffix(".conv3D")
                        + ".weight"
                    )
                    delta = (up.flatten(1) @ down.flatten(1)).view_as(wan[key])
                    whole[key] = wan[key] + rgba.metadata["lora_scale"] * delta
            for key, expected in rgba.under("merged").items():
                if key.startswith(part):
                    assert_close(whole[key.removeprefix(f"{part}.")], expected, rtol=0, atol=1e-6)
            save_file(whole, folder / f"wan_alpha_2.1_vae_{channel}_channel.safetensors")
    return str(folder), str(file)


@pytest.mark.parametrize("layout", ["flat", "lightning", "decoder.bin", "comfyui"])
def test_inference_from_released_files(golden, tmp_path, layout):
    """What the released inference computes: normalised latents, and both decodes clamped."""
    file = golden("rgba_vae")
    base, adapters = released(golden, tmp_path, layout)
    vae = load_rgba_vae(vae=base, adapters=adapters)
    latents = file["infer/latents_normalised"]
    with torch.no_grad():
        rgb_hat, alpha_hat = vae.decode(vae.denormalise(latents[:1]))
        # the released inference averages the channels of its files, not of its model
        vae.average_alpha = False
        _, channels = vae.decode(vae.denormalise(latents))
        if layout in ("flat", "lightning"):
            raw = vae.encode(file["encoder_input"], inputs(golden)[1])
            assert_close(vae.normalise(raw), latents, rtol=0, atol=3e-5)
    assert_close(rgb_hat.clamp(-1, 1), file["infer/decoded_fgr"], rtol=0, atol=1e-4)
    assert_close(
        channels[:1].mul(2).sub(1).clamp(-1, 1), file["infer/decoded_pha"], rtol=0, atol=1e-4
    )
    assert_close(channels * 2 - 1, file["decoded_pha"], rtol=0, atol=1e-4)
    assert_close(
        alpha_hat, (file["decoded_pha"][:1].mean(1, keepdim=True) + 1) / 2, rtol=0, atol=1e-4
    )
