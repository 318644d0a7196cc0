"""Physically based RGBA clips as clip shards: Blender's Cycles, whose alpha is exact."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.data import drawing
from acetate.data.shards import read_head
from acetate.data.splits import split_rule
from acetate.data.writer import EncodedClip, ShardWriter, encode_clip
from acetate.draws import stable_hash
from data_prep import light, scenes
from data_prep.blender import SCENES, Blender, interpreter
from data_prep.executor import check, progress
from data_prep.folders import check_folder, making
from data_prep.turns import Plan, sha256_of_files, sides, squares

LICENCE = "CC0-1.0"


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


@dataclass(frozen=True)
class Rendered:
    key: str
    clip: EncodedClip
    prompt: str
    done: dict[str, str]


def start(python: str, threads: int, _: int) -> Blender:
    return Blender(python, threads)


def render(shot: Shot, blender: Blender, index: int) -> Rendered:
    facts = shot.facts(index)
    frames = light.straight(blender.render(facts))
    how = f"Cycles of Blender {shot.version}, {shot.samples} samples, seed {facts['seed']}"
    done = {
        "rendered": how,
        "kind": facts["kind"],
        "stratum": facts["stratum"],
        "scene": json.dumps({name: facts[name] for name in ("subject", "light", "camera")}),
    }
    return Rendered(shot.plan.key(index), encode_clip(frames, drawing.FPS), facts["prompt"], done)


def code_sha256() -> str:
    """Returns a hash of what decides the pictures as much as the seed does."""
    here = [Path(scenes.__file__), Path(light.__file__), Path(drawing.__file__)]
    return sha256_of_files([*here, *sorted(SCENES.glob("*.py"))])


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns the kinds, all of them where none is named. Raises ValueError for one that there is
    not, or twice."""
    unknown = [kind for kind in kinds if kind not in scenes.KINDS]
    if unknown:
        raise ValueError(f"kinds={unknown}; known kinds: {', '.join(scenes.KINDS)}")
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
    """Writes the shards and returns their manifest without its list of clips. sizes: sides, or
    (height, width). blender: an interpreter that has bpy; None: the one that is made at first use.

    The clips of finished tars are kept when a run was interrupted. A folder that already holds
    these very clips is left as it is; one that holds others is made anew with `replace`, else
    ShardError. BlenderError where Blender cannot be started.
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
    with making(out, made_by, replace) as folder:
        if folder:
            with ShardWriter(
                folder, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by
            ) as writer:
                fill(writer, Shot(plan, samples, version), python, val_fraction, executor, workers)
    return read_head(out)


def fill(
    writer: ShardWriter, shot: Shot, python: str, val_fraction: float, executor: str, workers: int
) -> None:
    """Adds the clips that come after those that the writer has."""
    plan = shot.plan
    split_of = split_rule(map(plan.key, range(plan.clips)), val_fraction)
    todo = range(writer.clips, plan.clips)
    run = {"executor": executor, "workers": workers, "done": writer.clips,
        "setup": partial(start, python, cores_of(workers)), "name": plan.key}  # fmt: skip
    with progress(partial(render, shot), todo, **run) as results:
        for _, rendered in results:
            writer.add(
                rendered.key,
                rendered.clip,
                split=split_of(rendered.key),
                prompt=rendered.prompt,
                source="data_prep.render",
                licence=LICENCE,
                lossy=False,
                premultiplied_source=False,
                done=rendered.done,
            )


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
    console = Console(markup=False, highlight=False)
    console.print(table)
    hours = plan.clips * plan.frames * plan.area() * seconds / count / 3600
    text = f"{plan.clips} clips: about {hours:.3g} hours on these cores. Nothing was written."
    console.print(text, soft_wrap=True)


def main(cfg: DictConfig) -> None:
    sizes = OmegaConf.to_container(cfg.size) if OmegaConf.is_list(cfg.size) else [cfg.size]
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
    train, val = head["splits"]["train"], head["splits"]["val"]
    print(f"{cfg.out}: {train} clips to train and {val} to validate on, {head['frames']} frames")


if __name__ == "__main__":
    run("prep render")
