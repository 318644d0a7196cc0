"""Procedural RGBA clips as clip shards: exact straight colour and alpha, no download, the same
bytes for a seed."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.data import drawing, synthetic
from acetate.data.transforms import to_uint8
from acetate.data.writer import encode_clip
from acetate.draws import stable_hash
from data_prep.turns import (
    Made,
    Plan,
    print_tried,
    print_written,
    sha256_of_files,
    sides,
    sides_of,
    squares,
    write_clips,
)


def draw(plan: Plan, index: int) -> Made:
    # Sums over threads round differently from machine to machine; small pictures gain nothing from
    # them.
    torch.set_num_threads(1)
    seed = stable_hash("synthesize", plan.seed, index) % 2**31
    clip = synthetic.render(plan.kind(index), seed, plan.frames, *plan.size(index))
    return Made(plan.key(index), encode_clip(stored(clip), drawing.FPS), clip.prompt)


def synthesize(
    *,
    out: Path,
    clips: int,
    frames: int,
    sizes: Sequence[int | Sequence[int]],
    seed: int,
    val_fraction: float,
    max_clips: int,
    max_bytes: int,
    executor: str = "local",
    workers: int = 0,
    replace: bool = False,
) -> dict[str, Any]:
    """Writes the shards, as `write_clips`, and returns their manifest without its list of clips.
    sizes: sides, or (height, width)."""
    plan = Plan(clips, frames, squares(sizes), seed)
    made_by = {
        "command": "data_prep.synthesize",
        "settings": {
            "clips": clips, "frames": frames, "seed": seed, "val_fraction": val_fraction,
            "sizes": sides(plan.sizes),
            "max_clips": max_clips, "max_bytes": max_bytes,
            # The drawing code decides the pictures as much as the seed does.
            "synthetic_sha256": sha256_of_files(map(Path, (synthetic.__file__, drawing.__file__))),
        },
    }  # fmt: skip
    return write_clips(
        plan, partial(draw, plan), made_by=made_by, source="acetate.data.synthetic", out=out,
        executor=executor, workers=workers, replace=replace,
    )  # fmt: skip


def print_preview(plan: Plan, workers: int) -> None:
    """Draws one clip of each kind, and prints what the whole would take at their rate."""
    table = Table("key", "height x width", "KiB", "ms", "prompt")
    seconds, stored, count = 0.0, 0, min(plan.clips, len(synthetic.KINDS))
    for index in tqdm(range(count), unit="clip"):
        start = time.perf_counter()
        drawn = draw(plan, index)
        took = time.perf_counter() - start
        size = drawn.clip.size
        seconds, stored = seconds + took, stored + size
        sides = "x".join(map(str, plan.size(index)))
        table.add_row(drawn.key, sides, f"{size / 2**10:.1f}", f"{1000 * took:.0f}", drawn.prompt)
    total = plan.clips / count * plan.area()  # both time and bytes go with the area
    hours = total * seconds / max(1, workers) / 3600
    size = f"{total * stored / 2**30:.3g} GiB"
    print_tried(table, f"{plan.clips} clips: about {size}, {hours:.3g} hours.")


def stored(clip: synthetic.SyntheticClip) -> NDArray[np.uint8]:
    """Returns (T, H, W, 4), straight colour; black where nothing is drawn, which FFV1 stores in
    next to no space."""
    return to_uint8(clip.rgb.masked_fill(clip.alpha == 0, -1), clip.alpha).numpy()


def main(cfg: DictConfig) -> None:
    sizes = sides_of(cfg)
    if cfg.preview:
        print_preview(Plan(cfg.clips, cfg.frames, squares(sizes), cfg.seed), cfg.workers)
        return
    same = (
        "clips", "frames", "seed", "val_fraction", "max_clips", "executor", "workers", "replace",
    )  # fmt: skip
    own = {name: cfg[name] for name in same}
    head = synthesize(out=Path(cfg.out), sizes=sizes, max_bytes=int(cfg.max_mb * 2**20), **own)
    print_written(cfg.out, head)


if __name__ == "__main__":
    run("prep synthesize")
