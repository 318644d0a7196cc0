"""Procedural RGBA clips as clip shards: exact straight colour and exact alpha, no download, the same bytes for a seed."""

from pathlib import Path

import hydra
import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from tqdm import tqdm

from acetate.data.shards import MANIFEST, ShardError, ShardWriter, assign_splits, read_manifest, stable_hash
from acetate.data.synthetic import FPS, KINDS, SyntheticClip, render


def to_uint8(clip: SyntheticClip) -> NDArray[np.uint8]:
    """(T, H, W, 4), straight colour."""
    rgb = (clip.rgb + 1) / 2
    frames = np.concatenate((rgb.numpy(), clip.alpha.numpy())).transpose(1, 2, 3, 0)
    return np.round(frames * 255).astype(np.uint8)


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
) -> dict:
    """Writes `clips` clips, kinds and sizes in turn, and returns the manifest; finished work is not repeated."""
    made_by = {"command": "data_prep.synthesize", "settings": {
        "clips": clips, "frames": frames, "sizes": sizes, "seed": seed, "val_fraction": val_fraction,
        "max_clips": max_clips, "max_bytes": max_bytes}}  # fmt: skip
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest["made_by"] == made_by:
            return manifest
        raise ShardError(
            f"{out} holds shards that were made otherwise; name another folder or remove it first."
        )
    # A kind keeps its share of every size: the size changes once per round of kinds.
    todo = [(f"{KINDS[i % len(KINDS)]}-{i:06d}", KINDS[i % len(KINDS)], sizes[i // len(KINDS) % len(sizes)])
            for i in range(clips)]  # fmt: skip
    splits = assign_splits({key: key for key, _, _ in todo}, val_fraction)
    with ShardWriter(out, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by) as writer:
        for key, kind, size in tqdm(todo, unit="clip"):
            if key in writer:
                continue
            clip = render(kind, stable_hash("synthesize", seed, key) % 2**31, frames, size, size)
            writer.add(
                key,
                to_uint8(clip),
                split=splits[key],
                prompt=clip.prompt,
                fps=FPS,
                source="acetate.data.synthetic",
                licence="CC0-1.0",
                lossy=False,
                premultiplied_source=False,
            )
    return read_manifest(out)


@hydra.main(version_base=None, config_path="../conf", config_name="prep/synthesize")
def main(cfg: DictConfig) -> None:
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
    splits = manifest["splits"]
    print(
        f"{cfg.out}: {manifest['clips']} clips ({splits['train']} train, {splits['val']} val), {manifest['frames']} frames"
    )


if __name__ == "__main__":
    main()
