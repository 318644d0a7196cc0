"""Takes settings over from the run, or the clip, that a command is given; those of its own command
line win."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acetate.commands.recorded import (
    as_trained,
    name_of,
    quoted,
    recorded_overrides,
    run_of,
    value_of,
    without,
)
from acetate.commands.runs import RECORD

SIZE = {
    name: (f"callbacks.samples.{name}", f"wan.{name}")
    for name in ("frames", "height", "width", "fps")
}  # of a run's clips, in its config


def sample(given: Sequence[str]) -> list[str]:
    """Returns the settings in `settings=CLIP.json`, and those that the run of `dora=` or of
    `rgba_vae=` recorded."""
    first: list[str] = []
    file = value_of(given, "settings")
    if file not in (None, "null"):
        first = [
            f"{name}={quoted(value)}"
            for name, value in read_settings(Path(str(file)).expanduser()).items()
        ]
        first = without(first, given)
        given = [*first, *given]
    dora, vae = value_of(given, "dora") or _demo(given), value_of(given, "rgba_vae")
    if dora != "null":
        return [*as_trained(dora, "dora", given, {"rgba_vae": ("rgba_vae",), **SIZE}), *first]
    if vae is not None and not vae.startswith("["):
        return [*as_trained(vae, "rgba_vae", given, {}), *first]
    return first


def follow(given: Sequence[str]) -> list[str]:
    """Returns the settings that the run of `dora=` recorded."""
    dora = value_of(given, "dora") or _demo(given)
    size = {name: places for name, places in SIZE.items() if name != "fps"}
    if dora == "null":
        return []
    return as_trained(dora, "dora", given, {"rgba_vae": ("rgba_vae",), **size})


def evaluate(given: Sequence[str]) -> list[str]:
    """Returns the settings that `run=` was started with, and its folder. Raises FileNotFoundError
    and ValueError."""
    source = value_of(given, "run")
    if source in (None, "null"):
        return []
    clashing = [text for text in given if name_of(text) in ("experiment", "name", "resume")]
    if clashing:
        raise ValueError(
            f"run={source} and {clashing[0]} are both given. run= knows the others; leave them out."
        )
    run = run_of(str(source))
    if run is None:
        raise FileNotFoundError(
            f"run={source}: no run there that recorded its settings ({RECORD}/config.yaml). Give a "
            "run's folder or a name's, such as outputs/demo, or experiment=... name=... "
            "resume=last."
        )
    print(f"run={source}: settings as recorded in {run / RECORD}")
    # The folder in the place of a name's: what `last` and `best` mean must not change while this
    # runs
    return [*without(recorded_overrides(run), [*given, "run="]), f"paths.run={quoted(str(run))}"]


def export(given: Sequence[str]) -> list[str]:
    """Returns the base that the run of `checkpoint=` recorded."""
    checkpoint = value_of(given, "checkpoint")
    return [] if checkpoint is None else as_trained(checkpoint, "checkpoint", given, {})


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of the clip that this JSON stands beside. Raises FileNotFoundError and
    ValueError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"settings={path} does not exist; it is the .json beside a sampled clip."
        )
    try:
        held = json.loads(path.read_text())
        settings = {name: value for name, value in held.items() if name != "made_with"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"settings={path} is no JSON of a sampled clip ({error}). Give another one."
        ) from error
    if not {"prompt", "seed", "frames", "height", "width", "steps"} <= settings.keys():
        raise ValueError(
            f"settings={path} has no prompt, seed, frames, ...: it is not the JSON of a sampled "
            "clip."
        )
    return settings


def _demo(given: Sequence[str]) -> str:
    """Returns where `make demo` trained its adapters: `paths.outputs` is not composed yet."""
    outputs = value_of(given, "paths.outputs") or f"{os.environ.get('ACETATE_ROOT', '.')}/outputs"
    return f"{outputs}/demo_dit"
