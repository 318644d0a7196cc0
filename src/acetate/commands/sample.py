"""acetate sample prompt="..." [name=value ...]: text to RGBA clips in the formats editors open."""

import json
import platform
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from acetate.cli import run
from acetate.commands.recorded import metadata, run_of
from acetate.commands.runs import new_folder
from acetate.guides import ClipGuide, Guide, MaskGuide, draw, read_still
from acetate.models.adapters import read_adapters
from acetate.pipeline import RGBAPipeline, solver_of
from acetate.replacing import write_json
from acetate.sampling import EllipsePath, Solver
from acetate.video_out import SUFFIXES, write_clip

ON_SHEET = 8  # clips
OF_THE_CALL = (
    "prompts", "count", "batch_size", "offload", "device", "out", "overwrite", "settings", "paths",
)  # fmt: skip


def check_settings(config: DictConfig) -> None:
    """Raises ValueError for an output folder that is a file, before anything is loaded."""
    if config.out is not None:
        out = Path(config.out).expanduser()
        file = next(
            (path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None
        )
        if file is not None:
            raise ValueError(
                f"out={config.out}: {file} is a file. Give a folder, which need not exist."
            )


def read_prompts(config: DictConfig) -> list[str]:
    if (config.prompt is None) == (config.prompts is None):
        raise ValueError('Give either prompt="..." or prompts=FILE with one prompt per line.')
    if config.prompt is not None:
        return [mended(str(config.prompt))]
    path = Path(config.prompts).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={path} does not exist; it is a text file with one prompt per line."
        )
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts={path} is not UTF-8 ({error}). Save it as UTF-8 text."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path} is empty; it is a text file with one prompt per line.")
    return prompts


def mended(text: str) -> str:
    """Replaces bytes of a command line that are no text, which no file could hold, by question
    marks."""
    return text.encode(errors="replace").decode()


def file_name(number: int, prompt: str, seed: int) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-")
    return f"{number:03d}-{words or 'empty'}-seed{seed}"


def targets(names: Sequence[str], formats: Sequence[str]) -> list[str]:
    """Returns all files and folders that clips of these names are written to."""
    suffixes = [".json", *(suffix for name in formats for suffix in SUFFIXES[name])]
    return [f"{name}{suffix}" for name in names for suffix in suffixes]


def check_new(out: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raises FileExistsError that names a file of another call in the folder, and the settings that
    differ."""
    found = next((out / name for name in names if (out / name).exists()), None)
    if found is None:
        return
    try:
        before = json.loads(
            next(out / name for name in names if name.endswith(".json")).read_text()
        )
        changed = [
            f"{name} {before[name]}, now {settings[name]}"
            for name in sorted((before.keys() & settings.keys()) - {"prompt", "seed", "mean_shift"})
            if before[name] != settings[name]
        ]
    except (OSError, ValueError, AttributeError):
        changed = []
    why = f", made with {'; '.join(changed)[:300]}" if changed else ""
    raise FileExistsError(
        f"{found} exists{why}. Nothing is overwritten unasked: give another out= or seed=, leave "
        "out= away for a new folder, or overwrite=true."
    )


def folder_for(config: DictConfig) -> Path:
    """Returns out=, or a folder of this call alone."""
    if config.out is not None:
        return Path(config.out).expanduser()
    return new_folder(Path("samples") / time.strftime("%Y-%m-%d_%H-%M-%S"))


def origin(source: Any, *kinds: str) -> dict[str, Any]:
    """Returns file, run and step of weights, as far as they say."""
    try:
        file = read_adapters(source, *kinds)[0] if isinstance(source, str) else None
    except (FileNotFoundError, ValueError):  # released files, which were read as what they are
        file = None
    if file is None:
        return {"file": source}
    run, facts = run_of(str(file)), metadata(file)
    return {"file": str(file), "run": None if run is None else str(run), "step": facts.get("step"),
            "averaged": facts.get("averaged")}  # fmt: skip


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("acetate", "torch", "diffusers")
    }


def main(config: DictConfig) -> None:
    check_settings(config)
    prompts = [prompt for prompt in read_prompts(config) for _ in range(config.count)]
    guide, solver = guide_from(config.guide), solver_of(config)
    settings = {
        **{name: value for name, value in OmegaConf.to_container(config,
        resolve=True).items()  # type: ignore
           if name not in OF_THE_CALL},
        "solver": solver.name, "steps": solver.steps, "guidance": solver.guidance,
        "guidance_2": solver.guidance_2, "shift": solver.shift,
    }  # fmt: skip
    names = [
        file_name(n // config.count, prompt, config.seed + n) for n, prompt in enumerate(prompts)
    ]
    if config.out is not None and not config.overwrite:
        check_new(Path(config.out).expanduser(), targets(names, config.formats), settings)
    # Lightning: seconds, which a wrong setting need not wait for
    from acetate.callbacks.panels import save_picture
    from acetate.callbacks.samples import contact_sheet

    pipeline = RGBAPipeline(config)
    out: Path | None = None
    shown: list[tuple[str, Tensor, Tensor]] = []
    made_with: dict[str, Any] = {}
    started = time.perf_counter()
    clips = pipeline.stream(
        prompts, guide=guide, solver=solver, image=config.image, last_image=config.last_image
    )
    for name, clip in zip(names, clips, strict=True):
        if out is None:
            out, made_with = folder_for(config), origins(pipeline, guide)
        files = write_clip(out / name, clip.rgb, clip.alpha, clip.fps, config.formats, clip.guide)
        own = {"prompt": clip.prompt, "seed": clip.seed, "mean_shift": pipeline.mean_shift}
        write_json(out / f"{name}.json", {**settings, **own, "made_with": made_with})
        shown = [
            *shown,
            (f"seed {clip.seed}: {clip.prompt or '(empty prompt)'}", clip.rgb, clip.alpha),
        ][:ON_SHEET]
        tqdm.write(f"{files[0]} ({time.perf_counter() - started:.1f} s)")
        started = time.perf_counter()
    assert out is not None
    sheet = sheet_name(out, config.overwrite)
    given = [] if config.image is None else [read_still(Path(config.image), *clip.rgb.shape[-2:])]
    title = f"{out.name}: {title_of(config, solver)}"
    save_picture(contact_sheet(shown, title, clip.guide, given * len(shown)), sheet)
    print(f"sheet       {sheet}")


def guide_from(settings: DictConfig) -> Guide | None:
    """Builds the guide of `guide.*`: a mask file, an alpha clip, an ellipse, or none. Raises
    ValueError for two of them."""
    given: dict[str, Any] = {name: value for name,
        value in OmegaConf.to_container(settings).items()  # type: ignore
                             if value is not None}  # fmt: skip
    for name, kind in (("mask", MaskGuide), ("clip", ClipGuide)):
        if name in given:
            if others := [other for other in given if other != name]:
                raise ValueError(
                    f"guide.{name} and guide.{others[0]} are both given; the guide is one of them."
                )
            return kind(Path(given[name]))
    if not given:
        return None
    return EllipsePath(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
    )


def origins(pipeline: RGBAPipeline, guide: Guide | None) -> dict[str, Any]:
    """Returns the sources of the clips, for the JSON beside them, and says what the DoRA's file
    decided."""
    config, facts = pipeline.config, pipeline.facts
    if "mean_shift" in facts and config.mean_shift is None:
        ellipse = facts.get("ellipse", "of the defaults")
        print(f"mean_shift={pipeline.mean_shift}, ellipse {ellipse}, as {facts['file']} says")
    drawn = None
    if guide is not None:
        size = (config.frames, config.height, config.width)
        drawn = draw(guide, size, pipeline.vae.geometry, facts.get("ellipse", {}))[1][0].tolist()
    adapters = config.rgba_vae
    adapters = list(adapters) if OmegaConf.is_config(adapters) else adapters
    made_with = {
        "versions": versions(), "device": pipeline.device,
        "dora": None if config.dora is None else origin(config.dora, "dit_dora", "dit_joint"),
        "rgba_vae": origin(adapters, "rgba_vae"), "ellipses": drawn,
    }  # fmt: skip
    if config.dora_2 is not None:
        made_with["dora_2"] = origin(config.dora_2, "dit_dora")
    if config.settings is not None:
        warn_of_others(Path(config.settings).expanduser(), made_with)
    return made_with


def warn_of_others(path: Path, made_with: Mapping[str, Any]) -> None:
    """Warns where weights or versions are not those that the clip of this JSON was made with."""
    before = json.loads(path.read_text()).get("made_with", {})
    for name in ("dora", "rgba_vae", "versions", "device"):
        if before.get(name) != made_with[name]:
            warnings.warn(
                f"{path}: {name} was {before.get(name)}, is {made_with[name]} now.", stacklevel=2
            )


def sheet_name(out: Path, overwrite: bool) -> Path:
    """Returns the name of this call's contact sheet: one of an earlier call stays."""
    names = (
        out / ("sheet.png" if number == 1 else f"sheet_{number}.png") for number in range(1, 10**6)
    )
    return out / "sheet.png" if overwrite else next(path for path in names if not path.exists())


def title_of(config: DictConfig, solver: Solver) -> str:
    return (
        f"{solver.name}, {solver.steps} steps, guidance {solver.guidance:g}, "
        f"{config.height}x{config.width}"
    )


if __name__ == "__main__":
    run("sample")
