"""acetate evaluate run=outputs/mine: a checkpoint beside what it started from, and the ceiling.

Of an RGBA-VAE three rows on the same validation clips: the frozen base VAE on the same composites
as plain RGB (the ceiling), the untrained RGBA-VAE (step 0), and the checkpoint. Of a DoRA two: the
base DiT, and the checkpoint.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from acetate.cli import run
from acetate.commands import strata
from acetate.commands.checkpointing import settled
from acetate.commands.recorded import OF_THE_MACHINE, recorded_config
from acetate.commands.runs import LAST, RECORD, checkpoint_to_resume
from acetate.data.datamodule import ShardDataModule
from acetate.formats.checkpoints import read_trained
from acetate.formats.resumable import check_optimizers, check_resumable
from acetate.lightning_seams import guard_resume
from acetate.models.loading import load_vae
from acetate.redaction import redacted
from acetate.replacing import standing, write_json
from acetate.tasks.dit import DoRATask
from acetate.tasks.vae import PlainVAETask, RGBAVAETask

COLUMNS = {
    "rgb/psnr": "PSNR over 8 colours, dB",
    "rgb/ssim": "SSIM",
    "rgb/lpips": "LPIPS",
    "alpha/psnr": "alpha PSNR, dB",
    "alpha/mae": "alpha MAE",
    "alpha/mae_opaque": "opaque",
    "alpha/mae_mixed": "mixed",
    "alpha/mae_empty": "empty",
    "alpha/mae_of_mean": "MAE of the mean alpha",
}


def table(rows: dict[str, dict[str, float]]) -> Table:
    """Returns the figures in COLUMNS; where there are none, the loss and its parts."""
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    names = names or [*dict.fromkeys(name for row in rows.values() for name in row)]
    view = Table("", *(COLUMNS.get(name, name) for name in names))
    for row, values in rows.items():
        cells = [
            f"{values[name]:.2f}"
            if name.endswith("psnr")
            else f"{values[name]:.4f}"
            if name in values
            else ""
            for name in names
        ]
        view.add_row(row, *cells)
    return view


def checkpoint_of(config: DictConfig) -> str | None:
    """Returns the path of the checkpoint that is asked for; None for step 0 alone. Raises
    FileNotFoundError and ValueError."""
    run = Path(config.paths.run)
    if config.run is None:
        return checkpoint_to_resume(config.resume, run)
    if config.checkpoint == "last":
        path = standing(run / LAST)
        if not path.exists():
            raise FileNotFoundError(
                f"checkpoint=last: no {LAST} in {run}. Train it, or give checkpoint=PATH."
            )
        return str(path)
    if config.checkpoint == "best":
        return str(read_trained(f"{run}@best").path)
    return checkpoint_to_resume(str(config.checkpoint), run)


def changed_data(config: DictConfig, run: Path) -> list[str]:
    """Returns the `data` settings that decide which clips are measured and differ from those of the
    run."""
    if not (run / RECORD / "config.yaml").is_file():
        return []
    before, now = (
        redacted(OmegaConf.to_container(part, resolve=True))
        for part in (recorded_config(run).data, config.data)
    )
    assert isinstance(before, dict) and isinstance(now, dict)
    names = [name for name in now if name not in OF_THE_MACHINE and not str(name).startswith("_")]
    return [f"data.{name}={now[name]} ({before.get(name)} of the run)" for name in names
            if _places(now[name]) != _places(before.get(name))]  # fmt: skip


def _places(value: Any) -> Any:
    """Returns local folders in one form, whatever way they are written."""
    if isinstance(value, str) and "://" not in value:
        return str(Path(value).expanduser().resolve())
    if isinstance(value, list):
        return [_places(item) for item in value]
    return {_places(key): item for key, item in value.items()} if isinstance(value, dict) else value


def file_for(
    folder: Path, checkpoint: str | None, config: DictConfig, changed: Sequence[str]
) -> Path:
    """Returns evaluation.json for the last checkpoint on the run's own data; for others, a name
    that says what they are."""
    parts = []
    if checkpoint is not None and Path(checkpoint).stem.removeprefix(".old-") != "last":
        parts.append(Path(checkpoint).stem)
    held = redacted(OmegaConf.to_container(config.data, resolve=True))
    data = held.get("shards", held.get("latents"))
    for text in changed:
        name = text.partition("=")[0].removeprefix("data.")
        value = data if name in ("shards", "latents") else f"{name}-{config.data[name]}"
        places = [value] if isinstance(value, str) else value
        text = "_".join(Path(str(place)).name for place in places)
        parts.append(re.sub(r"[^\w.-]+", "_", text)[:60])
    return folder / "_".join(["evaluation", *parts, ""]).rstrip("_")


def measure(
    config: DictConfig, checkpoint: str | None, each: bool = False
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, strata.Figures]]]:
    """Returns rows of figures by name; each: and those of every clip, by row and key, of the base
    and of the checkpoint. Raises ValueError for a task that has no such evaluation."""
    if OmegaConf.select(config, "task.context_parallel"):
        config.task.context_parallel = 1  # without a backward pass a clip is no GPU's too long
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    if each:
        config.data.val_batch_size = 1
    data, task = instantiate(config.data), instantiate(settled(config, False).task)
    average = instantiate(config.callbacks.get("ema"))  # validations of the run see it, too
    trainer = instantiate(config.trainer, callbacks=[] if average is None else [average], **quiet)
    guard_resume(trainer, check_resumable, check_optimizers)
    rows, clips = {}, {}
    if isinstance(task, RGBAVAETask):
        base = PlainVAETask(vae=load_vae(config.wan.vae), lpips=config.task.lpips)
        # nothing of the base is sharded
        plain = instantiate(config.trainer, strategy="auto", **quiet)
        row = "base VAE, plain RGB"
        rows[row], clips[row] = _figures(plain, base, data, each)
        untrained, trained = "RGBA-VAE, step 0", "RGBA-VAE"
    elif each:
        raise ValueError(
            f"by_stratum=true and experiment={config.name}: strata are those of clips that an "
            "RGBA-VAE gives back. Leave it out."
        )
    elif isinstance(task, DoRATask):
        joint = task.scheme == "joint"
        untrained = "base DiT, without LoRA" if joint else "base DiT, without DoRA"
        trained = "joint LoRA" if joint else "DoRA"
    else:
        raise ValueError(
            f"experiment={config.name} trains a base, which evaluate does not measure: its figures "
            "are in the run's metrics.csv. Give a run of experiment=vae_rgba or dit_dora."
        )
    alone = each and checkpoint is None
    rows[untrained], clips[untrained] = _figures(trainer, task, data, alone)
    if checkpoint is not None:
        figures = _figures(trainer, task, data, each, ckpt_path=checkpoint, weights_only=True)
        averaged = ", average" if average and average.average else ""  # read with the checkpoint
        row = f"{trained}, {Path(checkpoint).name}{averaged}"
        rows[row], clips[row] = figures
    return rows, {row: found for row, found in clips.items() if found}


def _figures(
    trainer: Trainer, task: LightningModule, data: LightningDataModule, each: bool, **of: Any
) -> tuple[dict[str, float], dict[str, strata.Figures]]:
    """Returns the figures of one validation; each: and of every clip. Raises BadDataError where no
    clip could be read."""
    clips = strata.ClipFigures()
    trainer.callbacks += [clips] if each else []  # pyright: ignore[reportAttributeAccessIssue]
    found = trainer.validate(task, data, verbose=False, **of)[0]
    if each:
        trainer.callbacks.remove(clips)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(data, ShardDataModule):
        data.check_read("validate")
    figures = {name.removeprefix("val/"): value for name, value in found.items()}
    return figures, clips.of_all_ranks() if each else {}


def main(config: DictConfig) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    checkpoint = checkpoint_of(config)
    folder = Path(config.paths.run) if checkpoint is None else Path(checkpoint).parents[1]
    changed = changed_data(config, folder)
    path = file_for(folder, checkpoint, config, changed).with_suffix(".json")
    if changed:
        print(
            f"WARNING: not the data of {folder}: {'; '.join(changed)}. The figures go to "
            f"{path.name}."
        )
    lightning.seed_everything(0, verbose=False)
    rows, clips = measure(config, checkpoint, config.by_stratum)
    write_json(path, rows)
    written = [path]
    console = Console(width=180)
    console.print(table(rows))
    if clips:
        found = {row: strata.by_stratum(figures) for row, figures in clips.items()}
        written.append(path.with_name(f"{path.stem}_strata.json"))
        strata.write(written[-1], found)
        console.print(strata.table(found, next(iter(clips.values()))))
    for part in ("panels", "samples"):
        if (folder / part).is_dir():
            console.print(f"{part:11s} {folder / part}", soft_wrap=True)
    for file in written:
        console.print(f"metrics     {file}", soft_wrap=True)
    console.print(f"checkpoint  {checkpoint}", soft_wrap=True)


if __name__ == "__main__":
    run("evaluate")
