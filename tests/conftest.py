"""Small real Wan modules with seeded weights, and a folder of them in diffusers layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.synthesize import synthesize

torch.set_num_threads(1)

VAE_LAYOUTS = {
    # Wan2.1's own shape: 8x8 pixels and 4 frames to a latent, time halved in the last two of three stages
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
    """Weights scaled by fan-in, so that signals neither die out nor drown, and every gain and bias counts."""
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
    """vae, transformer, text_encoder and tokenizer, as diffusers and transformers save them. Read only."""
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
