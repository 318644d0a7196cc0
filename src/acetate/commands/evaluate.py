"""python -m acetate.commands.evaluate experiment=vae_rgba resume=last: a checkpoint beside step 0 and the ceiling.

Takes the same arguments as train.py. Three rows on the same validation clips: the frozen base VAE on the same
composites as plain RGB (the ceiling), the untrained RGBA-VAE (step 0), and the checkpoint.
"""

import logging
from pathlib import Path

import lightning
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from acetate.commands.program import program
from acetate.commands.runs import checkpoint_to_resume
from acetate.data.shards import write_json
from acetate.models.loading import load_vae
from acetate.tasks.vae import PlainVAETask

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
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    view = Table("", *(COLUMNS[name] for name in columns))
    for row, values in rows.items():
        cells = [
            f"{values[name]:.2f}" if name.endswith("psnr") else f"{values[name]:.4f}" if name in values else ""
            for name in columns
        ]
        view.add_row(row, *cells)
    return view


@program("config")
def main(config: DictConfig) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    checkpoint = checkpoint_to_resume(config.resume, Path(config.paths.run))
    data, task = instantiate(config.data), instantiate(config.task)
    base = PlainVAETask(vae=load_vae(config.wan.vae), lpips=config.task.lpips)
    average = instantiate(config.callbacks.get("ema"))  # validations of the run see it, too
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    plain = instantiate(config.trainer, strategy="auto", **quiet)  # nothing of the base is sharded
    trainer = instantiate(config.trainer, callbacks=[] if average is None else [average], **quiet)
    rows = {"base VAE, plain RGB": plain.validate(base, data, verbose=False)[0]}
    rows["RGBA-VAE, step 0"] = trainer.validate(task, data, verbose=False)[0]
    if checkpoint is not None:
        found = trainer.validate(task, data, ckpt_path=checkpoint, verbose=False, weights_only=True)[0]
        rows[f"RGBA-VAE, {Path(checkpoint).name}{', average' if average and average.average else ''}"] = found
    rows = {row: {name.removeprefix("val/"): value for name, value in values.items()} for row, values in rows.items()}
    folder = Path(config.paths.run) if checkpoint is None else Path(checkpoint).parents[1]
    path = folder / "evaluation.json"
    write_json(path, rows)
    console = Console(width=180)
    console.print(table(rows))
    console.print(f"panels      {folder / 'panels'}\nmetrics     {path}\ncheckpoint  {checkpoint}", soft_wrap=True)


if __name__ == "__main__":
    lightning.seed_everything(0)
    main()
