"""Runs to export, and what their exports are held against."""

import json
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from acetate.commands.export import main
from acetate.formats.names import original_dit_name, original_vae_name
from acetate.models.adapters import ADAPTER_SCHEMA, load_trainable, trainable_state
from acetate.models.dit import add_dora, velocity
from acetate.models.loading import load_transformer, load_vae, transformer_sha256
from acetate.models.rgba_vae import RGBAVAE
from tests.compose import composed
from tests.paths import ROOT

BASE = str(ROOT / "assets/wan-tiny")
QUIET = ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false",
    "trainer.max_steps=2",
         "trainer.val_check_interval=2", "data.num_workers=0", "data.val_clips=1",
         "data.batch_size=2",
         "task.lr=0.05", "task.warmup_steps=0"]  # fmt: skip


def fit(run, *overrides):
    """A run of two large steps, so that everything that trains has moved."""
    config = composed(run, *QUIET, *overrides)
    task, data = instantiate(config.task), instantiate(config.data)
    callbacks = [
        instantiate(config.callbacks[name])
        for name in ("checkpoint", "ema")
        if config.callbacks.get(name)
    ]
    instantiate(config.trainer, callbacks=callbacks, logger=False).fit(task, data)
    return task


@pytest.fixture(scope="module")
def vae_run(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("vae_run")
    small = [
        "data.frames=5",
        "data.height=16",
        "data.width=16",
        "model.lora_rank=2",
        "model.lora_alpha=4.0",
    ]
    fit(
        run,
        "experiment=vae_rgba",
        "callbacks=ema",
        f"data.shards={shards}",
        "loss.diffusion.mode=off",
        *small,
    )
    return run


@pytest.fixture(scope="module")
def dit_run(cached, tmp_path_factory):
    """alpha is twice the rank, so that a scale that is left out shows."""
    run, (latents, adapters) = tmp_path_factory.mktemp("dit_run"), cached
    rank = ["task.rank=2", "task.alpha=4", "task.caption_dropout=0"]
    fit(
        run,
        "experiment=dit_dora",
        f"data.latents={latents}",
        f"rgba_vae={adapters}",
        "callbacks.samples=null",
        *rank,
    )
    return run


@pytest.fixture(scope="module")
def trained_dit(dit_run):
    """The DiT as it was in training, adapters and all."""
    transformer = load_transformer(BASE)
    add_dora(transformer, 2, 4)
    state = load_file(dit_run / "checkpoints/last.safetensors")
    load_trainable(
        transformer,
        {name.removeprefix("transformer."): value for name, value in state.items()},
        "run",
    )
    return transformer


def export(out, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose(
            "command/export", [f"paths.root={ROOT}", f"out={out}", "dtype=float32", *overrides]
        )
    main(config)
    return out


def metadata(path):
    with safe_open(path, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


def assert_same(state, expected, atol=0.0):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


def inputs(channels=16, width=64):
    generator = torch.Generator().manual_seed(0)
    x, context = (
        torch.randn(shape, generator=generator) for shape in ((1, channels, 2, 4, 6), (1, 5, width))
    )
    return x, torch.tensor([700.0]), context


@torch.no_grad()
def assert_same_output(ours, theirs, width=64):
    x, t, context = inputs(width=width)
    expected = velocity(ours, x, t, context)
    assert_close(theirs(x, t, context, return_dict=False)[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def assert_decodes_the_same(model, rgb, alpha):
    """rgb, alpha: diffusers' own VAEs, which clamp."""
    raw = 0.3 * torch.randn(
        1, model.geometry.channels, 2, 4, 6, generator=torch.Generator().manual_seed(0)
    )
    rgb_hat, alpha_hat = model.decode(raw)
    assert_close(rgb.decode(raw).sample, rgb_hat.clamp(-1, 1), rtol=0, atol=1e-5)
    three = model.decoder_alpha(raw)
    assert_close((three.mean(1, keepdim=True) + 1) / 2, alpha_hat, rtol=0, atol=1e-5)
    assert_close(alpha.decode(raw).sample, three.clamp(-1, 1), rtol=0, atol=1e-5)


def vae_file(folder, base):
    """An adapter file as experiment=vae_rgba writes it, every trained tensor away from its
    start."""
    torch.manual_seed(0)
    settings = {"merge_init": "scratch", "lora_rank": 2, "lora_alpha": 4.0, "average_alpha": True}
    vae = RGBAVAE(vae=load_vae(base), **settings)
    facts = {
        "schema": ADAPTER_SCHEMA,
        "kind": "rgba_vae",
        "base": base,
        "base_sha256": vae.base_sha256,
        **settings,
    }
    state = {
        f"vae.{name}": p + 0.1 * torch.randn_like(p) for name, p in trainable_state(vae).items()
    }
    state = {name: value.detach() for name, value in state.items()}
    save_file(
        state,
        folder / "vae.safetensors",
        {name: json.dumps(value) for name, value in facts.items()},
    )
    return folder / "vae.safetensors"


@pytest.fixture(scope="module")
def originals(make_vae, make_transformer, tmp_path_factory):
    """A VAE and a DiT as Wan's original release names them, and adapters trained on both."""
    folder = tmp_path_factory.mktemp("originals")
    vae = {original_vae_name(name): value for name, value in make_vae("wan21").state_dict().items()}
    torch.save(vae, folder / "Wan2.1_VAE.pth")
    dit = {
        original_dit_name(name): value for name, value in make_transformer().state_dict().items()
    }
    save_file(dit, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 2}))
    transformer = load_transformer(str(folder))
    facts = {"schema": ADAPTER_SCHEMA, "kind": "dit_dora", "base": str(folder), "rank": 2,
        "alpha": 4,
             "mean_shift": 0.5, "transformer_sha256": transformer_sha256(transformer)}  # fmt: skip
    add_dora(transformer, 2, 4)
    with torch.no_grad():
        for parameter in trainable_state(transformer).values():
            parameter += 0.1 * torch.randn_like(parameter)
    (folder / "adapters").mkdir()
    state = {
        f"transformer.{name}": value.detach()
        for name, value in trainable_state(transformer).items()
    }
    save_file(
        state,
        folder / "adapters/dit.safetensors",
        {name: json.dumps(value) for name, value in facts.items()},
    )
    return SimpleNamespace(
        folder=folder,
        wan=[f"wan.vae={folder}/Wan2.1_VAE.pth", f"wan.transformer={folder}"],
        transformer=transformer,
        vae=vae_file(folder / "adapters", f"{folder}/Wan2.1_VAE.pth"),
        dit=folder / "adapters/dit.safetensors",
    )
