"""Small shards of latents whose values tell where they come from."""

from zlib import crc32

import pytest
import torch
from safetensors.torch import save, save_file

from acetate.data.latent_shards import EMPTY_PROMPT
from acetate.data.latents import LatentDataModule
from acetate.data.shards import MANIFEST, SCHEMA
from acetate.data.writer import ShardTar
from acetate.replacing import write_json

SETTINGS = {
    "batch_size": 2, "seed": 0, "num_workers": 0, "val_batch_size": 2, "val_clips": 100,
    "prompt_length": 6,
    "bad_clip_budget": 0,
}  # fmt: skip


WIDE, TALL, LONG = (2, 2, 4), (2, 4, 2), (3, 2, 2)


TRAIN = {"a": WIDE, "b": TALL, "c": WIDE, "d": LONG, "e": WIDE, "f": TALL, "g": WIDE}


VAL = {"v": WIDE, "w": WIDE, "x": TALL, "y": WIDE, "z": LONG}


VARIANTS = 3


def value(clip, variant):
    return float(ord(clip[0]) + variant / 8)  # exact in half precision


def write(
    out, clips=None, variants=VARIANTS, tokens=None, spoil=lambda clip, tensors: tensors, tars=2
):
    """Latent shards whose values tell clip and variant."""
    out.mkdir(parents=True, exist_ok=True)
    clips = (
        {**{c: ("train", s) for c, s in TRAIN.items()}, **{c: ("val", s) for c, s in VAL.items()}}
        if clips is None
        else clips
    )
    shards = []
    for number in range(tars):
        mine = sorted(clips)[number::tars]
        samples = []
        path = out / f"latents-{number:06d}.tar"
        with ShardTar(path, path.with_suffix(".tar.tmp")) as tar:
            for clip in mine:
                split, shape = clips[clip]
                count = (tokens or {}).get(clip, 3)
                for variant in range(variants):
                    tensors = {
                        "latents": torch.full(
                            (4, *shape), value(clip, variant), dtype=torch.float16
                        ),
                        "ellipse": torch.full((shape[0], 5), value(clip, 0)),
                        "prompt_embeds": torch.full(
                            (count, 8), value(clip, 0), dtype=torch.float16
                        ),
                        "prompt_mask": torch.ones(count, dtype=torch.bool),
                    }
                    data = save(spoil(clip, tensors))
                    key = f"{clip}-w000-v{variant}"
                    meta = b'{"prompt": "prompt of %s"}' % clip.encode()
                    tar.write({"__key__": key, "safetensors": data, "json": meta})
                    samples.append({"key": key, "clip": clip, "variant": variant, "split": split,
                        "shape": list(shape),
                                    "tokens": count, "crc32": crc32(data)})  # fmt: skip
            shards.append({**tar.finish(), "samples": samples})
    save_file({"embeds": torch.ones(1, 8, dtype=torch.float16)}, out / EMPTY_PROMPT)
    write_json(out / MANIFEST, {"schema": SCHEMA, "kind": "latents", "vae_sha256": "abc",
        "base_sha256": "b", "text_encoder_sha256": "t", "prompt_length": 6, "ellipse": {},
                                "geometry": {"channels": 4, "time_stride": 4, "space_stride": 4},
                                "shards": shards})  # fmt: skip
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents"))


def module(folder, **settings):
    return LatentDataModule(latents=str(folder), **(SETTINGS | settings))


def ready(folder, **settings):
    data = module(folder, **settings)
    data.setup()
    return data


def first(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]
