"""Procedural RGBA clips as clip shards: exact straight colour and alpha, no download, the same bytes for a seed."""

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from tqdm import tqdm

from acetate.data import drawing, synthetic
from acetate.data.shards import (
    MANIFEST,
    ShardError,
    ShardWriter,
    assign_splits,
    encode_clip,
    read_manifest,
    stable_hash,
)

CONF = str(Path(__file__).parents[1] / "conf")


def sha256_of_code(*modules: ModuleType) -> str:
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


def synthesize(
    *,
    out: Path,
    clips: int,
    frames: int,
    sizes: list[int],
    seed: int,
    val_fraction: float,
    max_clips: int,
    max_bytes: int,
) -> dict[str, Any]:
    """Writes the shards and returns their manifest; kinds take turns, and so do sizes after each round of kinds.

    A folder that already holds these very clips is left as it is; ShardError if it holds others.
    """
    for name, value in (("clips", clips), ("frames", frames), *(("size", size) for size in sizes)):
        if value < 1:
            raise ValueError(f"{name}={value}; must be at least 1")
    made_by = {
        "command": "data_prep.synthesize",
        "settings": {
            "clips": clips, "frames": frames, "sizes": sizes, "seed": seed, "val_fraction": val_fraction,
            "max_clips": max_clips, "max_bytes": max_bytes,
            # The drawing code decides the pictures as much as the seed does.
            "synthetic_sha256": sha256_of_code(synthetic, drawing),
        },
    }  # fmt: skip
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest["made_by"] == made_by:
            return manifest
        raise ShardError(f"{out} holds shards that were made otherwise. Name another folder or remove it first.")
    kinds = [synthetic.KINDS[i % len(synthetic.KINDS)] for i in range(clips)]
    keys = [f"{kind}-{i:06d}" for i, kind in enumerate(kinds)]
    splits = assign_splits({key: key for key in keys}, val_fraction)
    with ShardWriter(out, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by) as writer:
        for i, (key, kind) in enumerate(zip(tqdm(keys, unit="clip"), kinds, strict=True)):
            if key in writer:
                continue
            size = sizes[i // len(synthetic.KINDS) % len(sizes)]
            clip = synthetic.render(kind, stable_hash("synthesize", seed, i) % 2**31, frames, size, size)
            writer.add(
                key,
                encode_clip(to_uint8(clip), drawing.FPS),
                split=splits[key],
                prompt=clip.prompt,
                source="acetate.data.synthetic",
                licence="CC0-1.0",
                lossy=False,
                premultiplied_source=False,
            )
    return read_manifest(out)


def to_uint8(clip: synthetic.SyntheticClip) -> NDArray[np.uint8]:
    """(T, H, W, 4), straight colour; black where nothing is drawn, which FFV1 stores in next to no space."""
    rgb = ((clip.rgb + 1) / 2).masked_fill(clip.alpha == 0, 0)
    frames = torch.cat((rgb, clip.alpha)).permute(1, 2, 3, 0)
    return (frames * 255).round().to(torch.uint8).numpy()


@hydra.main(version_base=None, config_path=CONF, config_name="prep/synthesize")
def main(cfg: DictConfig) -> None:
    # Sums over threads round differently from machine to machine; small pictures gain nothing from them.
    torch.set_num_threads(1)
    manifest = synthesize(
        out=Path(cfg.out),
        clips=cfg.clips,
        frames=cfg.frames,
        sizes=[cfg.size] if isinstance(cfg.size, int) else list(cfg.size),
        seed=cfg.seed,
        val_fraction=cfg.val_fraction,
        max_clips=cfg.max_clips,
        max_bytes=int(cfg.max_mb * 2**20),
    )
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    print(f"{cfg.out}: {train} clips to train and {val} to validate on, {manifest['frames']} frames")


if __name__ == "__main__":
    main()
