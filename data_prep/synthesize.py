"""Procedural RGBA clips as clip shards: exact straight colour and alpha, no download, the same
bytes for a seed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.data import drawing, synthetic
from acetate.data.shards import read_head
from acetate.data.splits import split_rule
from acetate.data.transforms import to_uint8
from acetate.data.writer import EncodedClip, ShardWriter, encode_clip
from acetate.draws import stable_hash
from data_prep.executor import check, progress
from data_prep.folders import check_folder, making
from data_prep.turns import Plan, sha256_of_files, sides, squares


@dataclass(frozen=True)
class Drawn:
    key: str
    clip: EncodedClip
    prompt: str


def draw(plan: Plan, index: int) -> Drawn:
    # Sums over threads round differently from machine to machine; small pictures gain nothing from
    # them.
    torch.set_num_threads(1)
    seed = stable_hash("synthesize", plan.seed, index) % 2**31
    clip = synthetic.render(plan.kind(index), seed, plan.frames, *plan.size(index))
    return Drawn(plan.key(index), encode_clip(stored(clip), drawing.FPS), clip.prompt)


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
    """Writes the shards and returns their manifest without its list of clips. sizes: sides, or
    (height, width).

    The clips of finished tars are kept when a run was interrupted. A folder that already holds
    these very clips is left as it is; one that holds others is made anew with `replace`, else
    ShardError. The memory that this takes does not depend on the number of clips.
    """
    check(executor, workers)
    check_folder(out)
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
    with making(out, made_by, replace) as folder:
        if folder:
            with ShardWriter(
                folder, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by
            ) as writer:
                fill(writer, plan, val_fraction, executor, workers)
    return read_head(out)


def fill(writer: ShardWriter, plan: Plan, val_fraction: float, executor: str, workers: int) -> None:
    """Adds the clips that come after those that the writer has."""
    split_of = split_rule(map(plan.key, range(plan.clips)), val_fraction)
    todo = range(writer.clips, plan.clips)
    run = {"executor": executor, "workers": workers, "done": writer.clips}
    with progress(partial(draw, plan), todo, **run) as results:
        for _, drawn in results:
            writer.add(
                drawn.key,
                drawn.clip,
                split=split_of(drawn.key),
                prompt=drawn.prompt,
                source="acetate.data.synthetic",
                licence="CC0-1.0",
                lossy=False,
                premultiplied_source=False,
            )


def print_preview(plan: Plan, workers: int) -> None:
    """Draws one clip of each kind, and prints what the whole would take at their rate."""
    table = Table("key", "height x width", "KiB", "ms", "prompt")
    seconds, stored, count = 0.0, 0, min(plan.clips, len(synthetic.KINDS))
    for index in tqdm(range(count), unit="clip"):
        start = time.perf_counter()
        drawn = draw(plan, index)
        took = time.perf_counter() - start
        size = len(drawn.clip.media)
        seconds, stored = seconds + took, stored + size
        sides = "x".join(map(str, plan.size(index)))
        table.add_row(drawn.key, sides, f"{size / 2**10:.1f}", f"{1000 * took:.0f}", drawn.prompt)
    console = Console(markup=False, highlight=False)
    console.print(table)
    total = plan.clips / count * plan.area()  # both time and bytes go with the area
    hours = total * seconds / max(1, workers) / 3600
    text = (
        f"{plan.clips} clips: about {total * stored / 2**30:.3g} GiB, {hours:.3g} hours. Nothing "
        "was written."
    )
    console.print(text, soft_wrap=True)


def stored(clip: synthetic.SyntheticClip) -> NDArray[np.uint8]:
    """Returns (T, H, W, 4), straight colour; black where nothing is drawn, which FFV1 stores in
    next to no space."""
    return to_uint8(clip.rgb.masked_fill(clip.alpha == 0, -1), clip.alpha).numpy()


def main(cfg: DictConfig) -> None:
    sizes = OmegaConf.to_container(cfg.size) if OmegaConf.is_list(cfg.size) else [cfg.size]
    if cfg.preview:
        print_preview(Plan(cfg.clips, cfg.frames, squares(sizes), cfg.seed), cfg.workers)
        return
    same = (
        "clips",
        "frames",
        "seed",
        "val_fraction",
        "max_clips",
        "executor",
        "workers",
        "replace",
    )
    own = {name: cfg[name] for name in same}
    head = synthesize(out=Path(cfg.out), sizes=sizes, max_bytes=int(cfg.max_mb * 2**20), **own)
    train, val = head["splits"]["train"], head["splits"]["val"]
    print(f"{cfg.out}: {train} clips to train and {val} to validate on, {head['frames']} frames")


if __name__ == "__main__":
    run("prep synthesize")
