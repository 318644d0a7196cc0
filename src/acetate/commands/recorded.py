"""Reads the settings that a run recorded, for programs that are given its weights."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from acetate.cli import conf
from acetate.commands import root
from acetate.commands.runs import RECORD, newest, rank
from acetate.formats.layout import is_sharded
from acetate.redaction import redacted

PLACES = {
    "shards", "latents", "rgba_vae", "vae", "transformer", "transformer_2", "image_encoder",
    "text_encoder", "save_to", "init_from", "weights",
}  # fmt: skip
# Of `data`: what changes no clip
OF_THE_MACHINE = (
    "remote", "batch_size", "val_batch_size", "num_workers", "cache_mb", "bad_clip_budget",
    "shuffle_tars",
)  # fmt: skip
CHOSEN = re.compile(r"@(best|last)$")  # which checkpoint of a run, behind its path


def run_of(source: str) -> Path | None:
    """Returns the folder of the run that weights belong to: the source itself, that of a checkpoint
    in it, or the newest run below a folder.

    None where there is none that recorded its settings.
    """
    path = Path(CHOSEN.sub("", source)).expanduser()
    if path.is_dir() and not is_sharded(path) and not (path / RECORD).is_dir():
        found = sorted(path.glob("**/checkpoints/last.*"), key=lambda file: file.stat().st_mtime)
        path = found[-1] if found else path
    run = path if (path / RECORD).is_dir() else path.parent.parent
    return run if (run / RECORD / "config.yaml").is_file() else None


def recorded_config(run: Path) -> DictConfig:
    """Reads the config that a run was started with, and sets its present place in it."""
    config = OmegaConf.load(run / RECORD / "config.yaml")
    assert isinstance(config, DictConfig)
    config.paths.root, config.paths.run = root(), str(run)
    return config


def recorded_overrides(run: Path) -> list[str]:
    """Reads the overrides that a run was last started with, without those that chose its folder and
    its checkpoint.

    Callbacks that were added to it stay with the command that added them, as a profiler does. A
    relative path that only leads somewhere from where the run was started is made absolute.
    """
    records = list(run.glob(f"{RECORD}/**/overrides.yaml"))
    if not records:
        raise FileNotFoundError(
            f"{run / RECORD} has no overrides.yaml: what {run} was started with is not known."
        )
    # RECORD/TIME, later ones
    newest = max(records, key=lambda path: (path.parent.name != RECORD, path.parent.name))
    started = _started_in(newest.parent)
    found = []
    for override in map(str, OmegaConf.load(newest)):
        key, _, value = override.partition("=")
        if name_of(override) in ("resume", "init") or override.startswith("+callbacks."):
            continue
        moves = name_of(override).rpartition(".")[2] in PLACES or key.startswith("paths.")
        moved = moves and value and not Path(value).exists() and (started / value).exists()
        found.append(f"{key}={started / value}" if moved else override)
    return found


def _started_in(record: Path) -> Path:
    """Returns the folder in which a run was started."""
    return Path(_runtime(record, "cwd") or ".")


def _runtime(record: Path, name: str) -> str | None:
    """Returns what Hydra noted of a run's start, if it did."""
    notes = record / "hydra.yaml"
    if not notes.is_file():
        return None
    return OmegaConf.select(OmegaConf.load(notes), f"hydra.runtime.{name}")


def run_to_continue(outputs: str, name: str | None, resume: str | None) -> Path | None:
    """Returns the run whose settings a command with `resume` starts from; none for `auto`, which
    repeats its own command."""
    if resume in (None, "auto"):
        return None
    return newest(Path(outputs) / str(name)) if resume == "last" else run_of(resume)


def with_recorded(run: Path, arguments: Sequence[str]) -> list[str]:
    """Puts the arguments of a command after those that a run recorded, each setting once, and says
    what changes."""
    own = [argument for argument in arguments if not argument.startswith("-")]
    recorded = recorded_overrides(run)
    before = {name_of(override): override.partition("=")[2] for override in recorded}
    kept = without(recorded, own)
    if rank() == 0:
        if kept:
            print(f"settings of {run}: {' '.join(redacted(kept))}", file=sys.stderr)
        for name, value in ((name_of(text), text.partition("=")[2]) for text in own):
            was = before.get(name, "the default")
            part = name.removeprefix("data.").partition(".")[0]
            if (
                name.startswith(("data", "wan", "experiment"))
                and part not in OF_THE_MACHINE
                and was != value
            ):
                now, was = redacted([value, was])
                print(f"ATTENTION: {name} is now {now}, the run so far has {was}", file=sys.stderr)
    return [*kept, *arguments]


def name_of(override: str) -> str:
    """Returns the setting that an override names: `+data.shards=x` -> data.shards"""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def value_of(overrides: Iterable[str], name: str) -> str | None:
    """Returns the text of the last override of that name, without the quotes of a shell within a
    shell."""
    found = [text.partition("=")[2] for text in overrides if name_of(text) == name]
    return found[-1].strip("'\"") if found else None


def without(overrides: Iterable[str], given: Sequence[str]) -> list[str]:
    """Returns the overrides whose settings are not given."""
    names = {name_of(text) for text in given}
    return [text for text in overrides if name_of(text) not in names]


def quoted(value: Any) -> str:
    """Writes a value in the grammar of overrides, whatever it holds."""
    if isinstance(value, str):
        for sign, escaped in ((r"\$\{", r"\${"), ("'", r"\'"), (r"\Z", "")):
            value = re.sub(
                rf"(\\*){sign}", lambda match, end=escaped: 2 * match[1] + end, value, count=0
            )
        return f"'{value}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{quoted(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(quoted, value)) + "]"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def as_trained(
    source: str, setting: str, given: Sequence[str], also: Mapping[str, Sequence[str]]
) -> list[str]:
    """Returns overrides of `wan`, and of the settings `also`, as the run of `source` recorded them,
    but none of those that are given. Prints what is taken from where.

    setting: what `source` was given as. also: name -> places in the run's config, of which the
    first that has a value counts. Of a file without its run, the base that its metadata names.
    """
    run = run_of(source)
    wan_given = any(name_of(text) == "wan" for text in given)
    if run is None:
        return [] if wan_given else _base_of(source, setting, given)
    config = recorded_config(run)
    taken: dict[str, Any] = {}
    if not wan_given and config.get("wan"):
        taken = {f"wan.{name}": OmegaConf.select(config, f"wan.{name}") for name in config.wan}
    for name, places in also.items():
        values = (OmegaConf.select(config, place) for place in places)
        value = next((value for value in values if value is not None), None)
        # a joint model's run has none, and says so
        if value is not None or (name == "rgba_vae" and name in config):
            taken[name] = _in_place(value, run) if name == "rgba_vae" else _plain(value)
    overrides = without([f"{name}={quoted(value)}" for name, value in taken.items()], given)
    shown = [text for text in overrides if not text.startswith("wan.")]
    if any(text.startswith("wan.") for text in overrides):
        shown.insert(0, f"wan={_choice(run)}")
    if shown:
        print(
            f"{setting}={source}: {', '.join(shown).replace(chr(39), '')}, as recorded in "
            f"{run / RECORD}"
        )
    return overrides


def _plain(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _in_place(value: Any, run: Path) -> Any:
    """Makes a path as it was given to the run, which may have been started in another folder, valid
    here."""
    value = _plain(value)
    if not isinstance(value, str) or Path(CHOSEN.sub("", value)).expanduser().exists():
        return value
    there = _started_in(run / RECORD) / value
    return str(there) if Path(CHOSEN.sub("", str(there))).exists() else value


def _choice(run: Path) -> str:
    """Returns the choice of `wan=` that a run was started with."""
    return _runtime(run / RECORD, "choices.wan") or "that of the run"


def preset_of(base: str) -> str | None:
    """Returns the `wan=` whose weights have the name of a base: a hub name, or the last part of a
    path."""
    for file in sorted((conf() / "wan").glob("*.yaml")):
        sources = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if isinstance(sources, dict) and Path(base).name in (
            Path(str(sources[name])).name for name in ("vae", "transformer")
        ):
            return file.stem
    return None


def metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata of an adapter file; nothing of another file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError, RecursionError):  # its reader says what is wrong
        return {}


def _base_of(source: str, setting: str, given: Sequence[str]) -> list[str]:
    path = Path(CHOSEN.sub("", source)).expanduser()
    base = metadata(path).get("base")
    if not isinstance(base, str) or any(text.startswith("wan.") for text in given):
        return []
    preset = preset_of(base)
    if preset is not None:
        print(f"{setting}={source}: wan={preset}, the base that its metadata name")
        return [f"wan={preset}"]
    if not Path(base).is_dir():
        return []
    print(
        f"{setting}={source}: wan.vae, transformer and text_encoder {base}, the base that its "
        "metadata name"
    )
    looks = ["image_encoder"] * (Path(base) / "image_encoder").is_dir()
    return [f"wan.{part}={quoted(base)}" for part in ("vae", "transformer", "text_encoder", *looks)]
