"""Small real Wan modules with seeded weights, and a folder of them in diffusers layout."""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep import executor
from data_prep.synthesize import synthesize
from tests.paths import ROOT

TINY = str(ROOT / "assets/wan-tiny")

torch.set_num_threads(1)
# gRPC, which no emulator speaks; read when gcsfs is imported
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

VAE_LAYOUTS = {
    # Wan2.1's own shape: 8x8 pixels and 4 frames to a latent, time halved in the last two of three
    # stages
    "wan21": {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    },
    # The shipped base's: 4x4 pixels and 4 frames, here with 4 channels
    "tiny": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "latents_mean": [0.5, -0.25, 0.0, 1.0],
        "latents_std": [2.0, 0.5, 1.0, 1.5],
    },
}


def fill_(module: nn.Module, seed: int) -> None:
    """Weights scaled by fan-in, so that signals neither die out nor drown, and every gain and bias
    counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.2 * draw)
            elif parameter.ndim > 1:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * draw)


@pytest.fixture
def forked(monkeypatch):
    """Worker processes that begin in one that has imported torch and the rest, as those of
    tests.processes do; test_executor has those that import it themselves."""
    from tests import processes  # noqa: F401  (what is imported before)

    monkeypatch.setattr(executor, "START", "forkserver")


@pytest.fixture(scope="session")
def make_vae() -> Callable:
    from diffusers import AutoencoderKLWan

    def make(layout: str = "wan21", seed: int = 0) -> AutoencoderKLWan:
        vae = AutoencoderKLWan(**VAE_LAYOUTS[layout])
        fill_(vae, seed)
        return vae.eval()

    return make


@pytest.fixture(scope="session")
def make_transformer() -> Callable:
    from diffusers import WanTransformer3DModel

    def make(channels: int = 16, text_dim: int = 16, seed: int = 0) -> WanTransformer3DModel:
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_dim,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=64,
        )
        fill_(transformer, seed)
        return transformer.eval()

    return make


@pytest.fixture(scope="session")
def wan_folder(make_vae, make_transformer, tmp_path_factory) -> Path:
    """vae, transformer, text_encoder and tokenizer, as diffusers and transformers save them. Read
    only."""
    from transformers import UMT5Config, UMT5EncoderModel

    from acetate.tasks.wan_base import train_tokenizer

    folder = tmp_path_factory.mktemp("wan")
    make_vae("wan21").save_pretrained(folder / "vae")
    make_transformer().save_pretrained(folder / "transformer")
    tokenizer = train_tokenizer(["a red disc", "smoke over a blue sea"], vocabulary=300, length=8)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            num_heads=2,
            d_ff=32,
            num_layers=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    fill_(encoder, seed=1)
    encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    synthesize(
        out=out / "demo",
        clips=14,
        frames=9,
        sizes=[32],
        seed=0,
        val_fraction=0.2,
        max_clips=100,
        max_bytes=10**9,
    )
    return out / "demo"


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory):
    """With a validation clip for each of two ranks; `base` lies beside them."""
    out = tmp_path_factory.mktemp("many") / "demo"
    synthesize(
        out=out,
        clips=14,
        frames=5,
        sizes=[16],
        seed=0,
        val_fraction=0.4,
        max_clips=100,
        max_bytes=10**9,
    )
    shallow(out.parent)
    return out


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory) -> str:
    """wan.transformer=..., of a base as `shallow` makes it."""
    folder = tmp_path_factory.mktemp("two_blocks")
    shallow(folder)
    return f"wan.transformer={folder}/base"


def shallow(folder: Path) -> None:
    """Writes `folder`/base: the shipped DiT's first two of eight blocks, for runs that say nothing
    of its quality."""
    given = ROOT / "assets/wan-tiny/transformer"
    out = folder / "base/transformer"
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((given / "config.json").read_text()) | {"num_layers": 2}
    (out / "config.json").write_text(json.dumps(config))
    name = "diffusion_pytorch_model.safetensors"
    kept = {
        key: value
        for key, value in load_file(given / name).items()
        if not key.startswith("blocks.") or int(key.split(".")[1]) < 2
    }
    save_file(kept, out / name)


@pytest.fixture(scope="session")
def cached(shards, tmp_path_factory):
    """Latent shards of the demo clips on the shipped base, and the adapter file of the VAE that
    made them; `base` lies beside both."""
    return cache_demo(shards, tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="session")
def cached_joint(shards, tmp_path_factory):
    """The same clips as colour and alpha latents of the plain VAE."""
    folder = tmp_path_factory.mktemp("cached_joint")
    return cache_demo(shards, folder, scheme="joint", rgba_vae=None)[0]


def cache_demo(
    shards: Path, folder: Path, condition: str = "none", **sources: Any
) -> tuple[Path, Path]:
    """`cached`, of any shards, below a folder. sources: in the place of its own."""
    from acetate.models.adapters import ADAPTER_SCHEMA, trainable_state
    from acetate.models.loading import load_vae
    from acetate.models.rgba_vae import RGBAVAE
    from data_prep.cache_latents import cache_latents
    from data_prep.latent_encoder import Sources
    from data_prep.latent_plan import Settings

    shallow(folder)
    base = str(ROOT / "assets/wan-tiny")
    vae = RGBAVAE(vae=load_vae(base), merge_init="residual", lora_rank=2, lora_alpha=2.0)
    facts = {
        "schema": ADAPTER_SCHEMA, "kind": "rgba_vae", "base": base, "base_sha256": vae.base_sha256,
        "merge_init": "residual", "lora_rank": 2, "lora_alpha": 2.0, "average_alpha": True,
        "eps": 0.0,
    }  # fmt: skip
    adapters = folder / "last.safetensors"
    state = {
        f"vae.{name}": value.detach().contiguous() for name, value in trainable_state(vae).items()
    }
    save_file(state, adapters, {name: json.dumps(value) for name, value in facts.items()})
    ellipse = {"threshold": 0.1, "aligned": False, "raster": "exact", "enlargements": 64}
    cache_latents(
        shards=[shards],
        out=folder / "latents",
        sources=Sources(**{"vae": base, "rgba_vae": str(adapters), "text_encoder": base,
        "prompt_length": 64, "frozen_dtype": "float32", **sources}),
        settings=Settings(
            seed=0, variants=1, frames=(5,), area=24 * 24, max_aspect=1.0, sizes=None,
            space_multiple=None,
            dtype="float16", ellipse=ellipse, per_tar=64, condition=condition,
        ),
        allow_empty_buckets=False,
        bad_clip_budget=0,
        device="cpu",
        executor="local",
        workers=0,
        gpus=0,
    )  # fmt: skip
    return folder / "latents", adapters


@pytest.fixture
def small_disk():
    """No file may grow past 64 KiB: what a full disk does to a write, without filling one."""
    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="session")
def dora(cached, tmp_path_factory):
    """An adapter file as experiment=dit_dora writes it, with random adapters."""
    from acetate.formats.rgba_vae import load_rgba_vae
    from acetate.models.adapters import ADAPTER_SCHEMA, trainable_state
    from acetate.models.dit import add_dora
    from acetate.models.loading import load_transformer, transformer_sha256
    from acetate.models.text import TextEncoder

    transformer = load_transformer(TINY)
    facts = {"schema": ADAPTER_SCHEMA, "kind": "dit_dora", "base": TINY, "rank": 2, "alpha": 2,
        "mean_shift": 0.5,
             "transformer_sha256": transformer_sha256(transformer),
             "vae_sha256": load_rgba_vae(vae=TINY, adapters=str(cached[1])).latents_sha256(),
             "text_encoder_sha256": TextEncoder(TINY, 64).sha256(),
             "ellipse": {"threshold": 0.1}}  # fmt: skip
    add_dora(transformer, 2, 2)
    for parameter in trainable_state(transformer).values():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {
        f"transformer.{name}": value.detach().contiguous()
        for name, value in trainable_state(transformer).items()
    }
    path = tmp_path_factory.mktemp("dora") / "last.safetensors"
    save_file(state, path, {name: json.dumps(value) for name, value in facts.items()})
    return path
