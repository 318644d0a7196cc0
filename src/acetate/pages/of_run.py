"""The page of a run: the same clips at every validation, to play side by side or as a wipe."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from acetate.pages.clips import Shown, page
from acetate.replacing import written

PAGE = "clips.html"  # in a run's folder
CURVES = "curves.png"  # beside it
KEPT = ".clips"  # what it is made of
SOURCE = "source"
SHOWN = 6  # validations on the page: the first, the last, and some between


def keep(run: Path, step: int, clips: Sequence[tuple[str, Shown]], source: bool = False) -> None:
    """Keeps what a validation made of the run's clips, (name, clip) of each, and writes the page
    anew. source: whether they are the true clips, of all steps. A fault is said and stops nothing.
    """
    folder = run / KEPT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / f"{SOURCE if source else f'step_{step:08d}'}.json") as file:
            file.write(json.dumps([(name, _as_json(shown)) for name, shown in clips]))
    except OSError as error:
        rank_zero_warn(f"{run / PAGE} is not written: {error}")
    if not source:
        write(run)


def write(run: Path) -> None:
    """Writes the page of what is kept, with the curves as they stand; without clips there is none.
    A fault is said and stops nothing."""
    try:
        _write(run, run / KEPT)
    except OSError as error:
        rank_zero_warn(f"{run / PAGE} is not written: {error}")


def _write(run: Path, folder: Path) -> None:
    steps = sorted(folder.glob("step_*.json"))
    if not steps:
        return
    places = np.unique(np.linspace(0, len(steps) - 1, min(SHOWN, len(steps))).round().astype(int))
    files = [folder / f"{SOURCE}.json", *(steps[place] for place in places)]
    systems = {_title(file.stem): _read(file) for file in files if file.exists()}
    names = list(dict.fromkeys(name for clips in systems.values() for name in clips))
    cards = [(name, [clips.get(name) for clips in systems.values()]) for name in names]
    with written(run / PAGE) as file:
        file.write(page("/".join(run.absolute().parts[-2:]), [*systems], cards, _curves(run)))


def _curves(run: Path) -> str:
    file = run / CURVES
    if not file.exists():
        return ""
    picture = base64.b64encode(file.read_bytes()).decode()
    return (
        "<details><summary>Losses and metrics</summary>"
        f'<img class="curves" alt="{CURVES}" src="data:image/png;base64,{picture}"></details>'
    )


def _title(stem: str) -> str:
    return f"step {int(stem.removeprefix('step_')):,}" if stem != SOURCE else stem


def _as_json(shown: Shown) -> Mapping[str, object]:
    return asdict(shown) | {"sheet": base64.b64encode(shown.sheet).decode()}


def _read(file: Path) -> dict[str, Shown]:
    clips = json.loads(file.read_text())
    return {
        name: Shown(
            **facts | {"sheet": base64.b64decode(facts["sheet"]), "size": (*facts["size"],)}
        )
        for name, facts in clips
    }
