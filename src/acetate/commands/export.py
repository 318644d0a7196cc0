"""acetate export checkpoint=... to=... [name=value ...]: trained weights in others' formats."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from acetate.cli import run
from acetate.commands.export_dit import (
    dit_to_comfyui,
    dit_to_diffusers,
    dit_to_wan_alpha,
    named,
    second_of,
)
from acetate.commands.export_vae import (
    Export,
    tensor_file,
    vae_to_comfyui,
    vae_to_diffusers,
    vae_to_wan_alpha,
)
from acetate.commands.recorded import run_of
from acetate.formats.checkpoints import Trained, read_trained
from acetate.formats.exported import MARK, check_replaceable, write_export
from acetate.models import experts

OF_A_KIND: dict[tuple[str, str], tuple[str, ...]] = {  # settings that change what is written
    ("wan-alpha", "rgba_vae"): ("decoder_only",),
    ("comfyui", "dit_dora"): ("dit", "rank", "dtype"),
    ("diffusers", "dit_dora"): ("dtype", "rgba_vae", "shift"),
}


def to_acetate(trained: Trained, config: DictConfig) -> Export:
    prefix, use = {
        "rgba_vae": ("vae.", "rgba_vae={file} of sample and cache_latents"),
        "dit_dora": ("transformer.", "dora={file} of sample and follow"),
        "dit_joint": ("transformer.", "dora={file} rgba_vae=null of sample and follow"),
    }[trained.kind]
    state = {f"{prefix}{name}": value for name, value in trained.state.items()}
    file = named(trained, f"{trained.kind}.safetensors")
    return Export({file: tensor_file(state, trained.facts)}, [f"{file}: {use.format(file='FILE')}"])


def of_two(trained: Trained, config: DictConfig) -> Export:
    """Returns the export of `checkpoint`, and beside it that of `checkpoint_2`, the other expert's.
    Raises ValueError where one is missing, or is the other's."""
    experts.check_own(trained.path, trained.facts, "high" if config.checkpoint_2 else None)
    two = config.wan.transformer_2 is not None and trained.kind == "dit_dora"
    if two and config.to == "diffusers" and config.rgba_vae and not config.checkpoint_2:
        raise ValueError(
            "rgba_vae= makes a whole pipeline, of both experts, and checkpoint_2=null. Give the "
            f"low-noise expert's DoRA as checkpoint_2= (the high one's as checkpoint=), or "
            f"checkpoint_2={experts.AS_IT_IS} for its weights as they are."
        )
    if config.checkpoint_2 and not two:
        raise ValueError(
            f"checkpoint_2={config.checkpoint_2} is for the second expert of a base with two, and "
            f"checkpoint= holds a {trained.kind} of one with wan.transformer_2=null. Leave it out, "
            "or choose wan=wan22_a14b."
        )
    first = EXPORTS[config.to, trained.kind](trained, config)
    whole = config.to == "diffusers" and config.rgba_vae is not None  # which holds both
    if whole or config.checkpoint_2 in (None, experts.AS_IT_IS):
        return first
    second = EXPORTS[config.to, trained.kind](second_of(config), config)
    writers = second.writers | first.writers
    notes = list(dict.fromkeys([*first.notes, *second.notes]))
    return Export(writers, notes, {**second.facts, **first.facts})


EXPORTS: dict[tuple[str, str], Callable[[Trained, DictConfig], Export]] = {
    ("acetate", "rgba_vae"): to_acetate,
    ("acetate", "dit_dora"): to_acetate,
    ("acetate", "dit_joint"): to_acetate,
    ("wan-alpha", "rgba_vae"): vae_to_wan_alpha,
    ("wan-alpha", "dit_dora"): dit_to_wan_alpha,
    ("comfyui", "rgba_vae"): vae_to_comfyui,
    ("comfyui", "dit_dora"): dit_to_comfyui,
    ("diffusers", "rgba_vae"): vae_to_diffusers,
    ("diffusers", "dit_dora"): dit_to_diffusers,
}


def default_folder(trained: Trained, config: DictConfig) -> Path:
    """Returns outputs/exports/NAME-TIME-step-00000500_FORMAT: NAME-TIME of the run, else the file's
    name."""
    run = run_of(str(trained.path))
    name = trained.path.stem if run is None else f"{run.parent.name}-{run.name}"
    if isinstance(trained.facts.get("step"), int):
        name += f"-step-{trained.facts['step']:08d}"
    name += "_average" if trained.facts["averaged"] else ""
    variant = f"-{config.dit}" if (config.to, trained.kind) == ("comfyui", "dit_dora") else ""
    return Path(config.paths.outputs) / "exports" / f"{name}_{config.to}{variant}"


def free_folder(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Returns the folder, or FOLDER_2, ...: the first that is not there, or holds an export of the
    same with the same settings, which is replaced."""
    for number in range(1, 10**6):
        path = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            before = json.loads((path / MARK).read_text())
        except (OSError, ValueError):
            before = None
        if not path.exists() or (isinstance(before, dict) and facts.items() <= before.items()):
            return path
    raise FileExistsError(f"{folder}: no name is free for a new folder. Give out=.")


def main(config: DictConfig) -> None:
    trained = read_trained(config.checkpoint, config.ema)
    if (config.to, trained.kind) not in EXPORTS:
        raise ValueError(
            f"to={config.to} cannot hold {trained.path}, a {trained.kind}: its LoRA acts on alpha "
            "tokens alone, which no other program has. Give to=acetate, and sample with acetate."
        )
    settings = {
        name: config[name] for name in ("to", *OF_A_KIND.get((config.to, trained.kind), ()))
    }
    if config.checkpoint_2:
        settings["checkpoint_2"] = config.checkpoint_2
    facts = {
        "checkpoint": str(trained.path),
        **trained.facts,
        "settings": settings,
        "to": config.to,
    }
    if config.out is None:
        out = free_folder(default_folder(trained, config).resolve(), json.loads(json.dumps(facts)))
    else:
        out = Path(config.out).expanduser().resolve()
    check_replaceable(out)  # before the work, too
    export = of_two(trained, config)
    facts = {**facts, **export.facts}
    sizes = write_export(out, export.writers, facts)
    weights = "the average" if trained.facts["averaged"] else "raw weights"
    print(
        f"{trained.kind} of {trained.path} ({weights}, step {trained.facts.get('step')}) -> {out}"
    )
    for name, size in sizes.items():
        print(f"  {size / 2**20:10.2f} MiB  {name}")
    print("\n".join(export.notes))


if __name__ == "__main__":
    run("export")
