"""A base that looks at given pictures with CLIP, as Wan2.1-I2V-14B does, of random weights."""

import os

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.conftest import TINY

WIDTH, SIDE = 24, 28  # of CLIP's embeddings; of the pictures that it reads


def write_clip(folder, width=WIDTH, seed=3):
    """image_encoder/ and image_processor/ as a release has them."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=SIDE, patch_size=14, projection_dim=16, initializer_factor=8.0,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size=size[0], crop_size=size[1]).save_pretrained(folder / "image_processor")


def write_dit(folder, seed=4, **config):
    """transformer/ that reads noise, mask and condition of the tiny VAE."""
    torch.manual_seed(seed)
    WanTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 36,
        "out_channels": 16, "text_dim": 64, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2,
        "rope_max_seq_len": 64, **config},
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="session")
def looking(tmp_path_factory):
    """The tiny VAE and text encoder beside a DiT and a CLIP encoder."""
    folder = tmp_path_factory.mktemp("looking")
    for part in ("vae", "text_encoder", "tokenizer"):
        os.symlink(f"{TINY}/{part}", folder / part)
    write_clip(folder)
    write_dit(folder / "transformer", image_dim=WIDTH, added_kv_proj_dim=32)
    return folder


def of(folder):
    """Settings that choose such a base."""
    parts = ("vae", "transformer", "text_encoder", "image_encoder")
    return [*(f"wan.{part}={folder}" for part in parts), "wan.prompt_length=512"]
