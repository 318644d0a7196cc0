"""Four drawn clips, adapters, and their latents as the command caches them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import save_file

from acetate.data.shards import (
    MANIFEST,
)
from acetate.data.writer import ShardWriter, encode_clip
from acetate.models.adapters import ADAPTER_SCHEMA, trainable_state
from acetate.models.loading import load_vae
from acetate.models.rgba_vae import RGBAVAE
from data_prep.cache_latents import cache_latents
from data_prep.latent_encoder import Sources
from data_prep.latent_plan import Settings
from tests.conftest import fill_

ELLIPSE = {"threshold": 0.1, "aligned": False, "raster": "exact", "enlargements": 64}


SETTINGS = Settings(
    seed=0, variants=2, frames=(5,), area=32 * 32, max_aspect=4.0, sizes=None, space_multiple=None,
    dtype="float16",
    ellipse=ELLIPSE, per_tar=5,
)  # fmt: skip


EPS = 0.25


CLIPS = {  # frames, height, width, prompt
    "long": (12, 40, 40, "a red disc"),
    "short": (3, 20, 60, "smoke over a blue sea"),
    "still": (1, 32, 32, "a red disc"),
    "tall": (5, 60, 20, "a blue sea"),
}


def clip(name):
    frames, height, width, _ = CLIPS[name]
    picture = np.random.default_rng(len(name)).integers(
        0, 256, (frames, height, width, 4), dtype=np.uint8
    )
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2
    # soft all over
    picture[..., 3] = np.where(disc, np.maximum(picture[..., 3], 128), picture[..., 3] // 16)
    return picture


def write(out, prompts=None):
    with ShardWriter(out, max_clips=100, max_bytes=10**9, made_by={}) as writer:
        for name in CLIPS:
            writer.add(
                name,
                encode_clip(clip(name), 8),
                split="val" if name == "still" else "train",
                prompt=(prompts or {}).get(name, CLIPS[name][3]),
                source="nowhere",
                licence="CC0-1.0",
                lossy=False,
                premultiplied_source=False,
            )
    return out


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def adapters(wan_folder, tmp_path_factory):
    vae = RGBAVAE(vae=load_vae(str(wan_folder)), merge_init="residual", lora_rank=2, lora_alpha=2.0)
    fill_(vae.merge, seed=3)
    facts = {
        "schema": ADAPTER_SCHEMA, "kind": "rgba_vae", "base": vae.source,
        "base_sha256": vae.base_sha256,
        "merge_init": "residual", "lora_rank": 2, "lora_alpha": 2.0, "average_alpha": True,
        "eps": EPS,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("adapters") / "last.safetensors"
    state = {
        f"vae.{name}": value.detach().contiguous() for name, value in trainable_state(vae).items()
    }
    save_file(state, path, {name: json.dumps(value) for name, value in facts.items()})
    return path


@pytest.fixture(scope="module")
def sources(wan_folder, adapters):
    return Sources(
        vae=str(wan_folder), rgba_vae=str(adapters), text_encoder=str(wan_folder), prompt_length=16,
        frozen_dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def make(clips, sources):
    def make(out, shards=clips, sources=sources, allow_empty_buckets=False, bad_clip_budget=0,
        executor="local",
             workers=0, replace_old=False, **settings):  # fmt: skip
        return cache_latents(
            shards=[shards],
            out=out,
            sources=sources,
            settings=replace(SETTINGS, **settings),
            allow_empty_buckets=allow_empty_buckets,
            bad_clip_budget=bad_clip_budget,
            device="cpu",
            executor=executor,
            workers=workers,
            gpus=0,
            replace=replace_old,
        )

    return make


@pytest.fixture(scope="module")
def cached(make, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "l"
    make(out)
    return out


def manifest_of(out):
    return json.loads((out / MANIFEST).read_text())


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
