"""Physically based RGBA clips as clip shards: Blender's Cycles, whose alpha is exact."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.data import drawing
from acetate.data.writer import encode_clip
from acetate.draws import stable_hash
from data_prep import light, scenes
from data_prep.blender import SCENES, Blender, interpreter
from data_prep.executor import check
from data_prep.folders import check_folder
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


@dataclass(frozen=True)
class Shot:
    """A clip to render, and how. samples: light paths of a pixel."""

    plan: Plan
    samples: int
    version: str

    def facts(self, index: int) -> scenes.Facts:
        plan = self.plan
        seed = stable_hash("render", plan.seed, plan.kind(index), index // len(plan.kinds)) % 2**31
        return scenes.scene(plan.kind(index), seed, plan.frames, *plan.size(index), self.samples)


def start(python: str, threads: int, _: int) -> Blender:
    return Blender(python, threads)


def render(shot: Shot, blender: Blender, index: int) -> Made:
    facts = shot.facts(index)
    frames = light.straight(blender.render(facts))
    how = f"Cycles of Blender {shot.version}, {shot.samples} samples, seed {facts['seed']}"
    done = {
        "rendered": how,
        "kind": facts["kind"],
        "stratum": facts["stratum"],
        "scene": json.dumps({name: facts[name] for name in ("subject", "light", "camera")}),
    }
    return Made(shot.plan.key(index), encode_clip(frames, drawing.FPS), facts["prompt"], done)


def code_sha256() -> str:
    """Returns a hash of what decides the pictures as much as the seed does."""
    here = [Path(scenes.__file__), Path(light.__file__), Path(drawing.__file__)]
    return sha256_of_files([*here, *sorted(SCENES.glob("*.py"))])


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns the kinds, all of them where none is named. Raises ValueError for one named
    twice."""
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds={list(kinds)}; each kind once")
    return tuple(kinds) or scenes.KINDS


def cores_of(workers: int) -> int:
    """Threads for each of the processes."""
    return max(1, (os.cpu_count() or 1) // max(1, workers))


def render_clips(
    *,
    out: Path,
    clips: int,
    frames: int,
    sizes: Sequence[int | Sequence[int]],
    seed: int,
    kinds: Sequence[str],
    samples: int,
    blender: str | None,
    val_fraction: float,
    max_clips: int,
    max_bytes: int,
    executor: str = "local",
    workers: int = 0,
    replace: bool = False,
) -> dict[str, Any]:
    """Writes the shards, as `write_clips`, and returns their manifest without its list of clips.
    sizes: sides, or (height, width). blender: an interpreter that has bpy; None: the one that is
    made at first use. Raises BlenderError where Blender cannot be started.
    """
    check(executor, workers)
    check_folder(out)
    plan = Plan(clips, frames, squares(sizes), seed, check_kinds(kinds))
    python, version = interpreter(blender)
    made_by = {
        "command": "data_prep.render",
        "settings": {
            "clips": clips, "frames": frames, "seed": seed, "val_fraction": val_fraction,
            "sizes": sides(plan.sizes), "kinds": plan.kinds, "samples": samples,
            "max_clips": max_clips, "max_bytes": max_bytes,
            "blender": version, "scenes_sha256": code_sha256(),
        },
    }  # fmt: skip
    return write_clips(
        plan, partial(render, Shot(plan, samples, version)), made_by=made_by,
        source="data_prep.render", out=out, executor=executor, workers=workers, replace=replace,
        setup=partial(start, python, cores_of(workers)),
    )  # fmt: skip


def print_preview(plan: Plan, samples: int, blender: str | None, workers: int) -> None:
    """Renders one frame of one clip of each kind, and prints what the whole would take at their
    rate."""
    python, version = interpreter(blender)
    process, one = Blender(python, cores_of(workers)), replace(plan, frames=1)
    table = Table("key", "height x width", "s a frame", "stratum", "prompt")
    seconds, count = 0.0, min(plan.clips, len(plan.kinds))
    for index in tqdm(range(count), unit="clip"):
        begun = time.perf_counter()
        facts = Shot(one, samples, version).facts(index)
        process.render(facts)
        took = time.perf_counter() - begun
        seconds += took
        side = "x".join(map(str, plan.size(index)))
        table.add_row(plan.key(index), side, f"{took:.1f}", facts["stratum"], facts["prompt"])
    hours = plan.clips * plan.frames * plan.area() * seconds / count / 3600
    print_tried(table, f"{plan.clips} clips: about {hours:.3g} hours on these cores.")


def main(cfg: DictConfig) -> None:
    sizes = sides_of(cfg)
    kinds = list(cfg.kinds)
    if cfg.preview:
        plan = Plan(cfg.clips, cfg.frames, squares(sizes), cfg.seed, check_kinds(kinds))
        print_preview(plan, cfg.samples, cfg.blender, cfg.workers)
        return
    same = ("clips", "frames", "seed", "samples", "blender", "val_fraction", "max_clips",
        "executor", "workers", "replace")  # fmt: skip
    own = {name: cfg[name] for name in same}
    head = render_clips(
        out=Path(cfg.out), sizes=sizes, kinds=kinds, max_bytes=int(cfg.max_mb * 2**20), **own
    )
    print_written(cfg.out, head)


if __name__ == "__main__":
    run("prep render")
