"""The study of docs/ablation.md: figures of every run of sweeps on the clips kept back, as a table
and as a picture.

python docs/ablation.py SWEEP [SWEEP ...] out=FOLDER [picture=FILE.png shown=SHARDS]
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from acetate.alpha import PALETTE, one_channel, over
from acetate.commands.recorded import recorded_config
from acetate.commands.runs import FINISHED
from acetate.losses.diffusion import DiffusionLoss
from acetate.metrics.alpha import AlphaQuality
from acetate.metrics.rgb import CompositeQuality
from acetate.models.adapters import load_trainable
from acetate.replacing import write_json
from acetate.tasks.vae import RGBAVAETask

FIGURES = {  # name -> heading, digits
    "psnr": ("PSNR over 8 colours, dB", 2),
    "alpha": ("alpha MAE", 4),
    "mixed": ("of mixed cells", 4),
    "velocity": ("DiT's error, opaque cells", 3),
    "std": ("latents' deviation", 2),
}
RESIDUAL, SCRATCH = "merge block, residual", "merge block, scratch"
OPAQUE = "rendering + opaque"
CHANGES = {  # what changes -> from, to
    "rendering": ((RESIDUAL, "no rendering", "", ""), (RESIDUAL, "rendering", "", "")),
    "rendering, from scratch": ((SCRATCH, "no rendering", "", ""), (SCRATCH, "rendering", "", "")),
    "the judge": (
        (RESIDUAL, "rendering", "", ""), (RESIDUAL, OPAQUE, "normalised", ""),
    ),
    "the judge, from scratch": (
        (SCRATCH, "rendering", "", ""), (SCRATCH, OPAQUE, "normalised", ""),
    ),
    "it also pushes transparent cells away": (
        (RESIDUAL, OPAQUE, "normalised", ""),
        (RESIDUAL, "rendering + bidirectional", "normalised", ""),
    ),
    "it sees normalised latents, not raw": (
        (RESIDUAL, OPAQUE, "raw", ""), (RESIDUAL, OPAQUE, "normalised", ""),
    ),
    "merge block starts as a correction, not from scratch": (
        (SCRATCH, OPAQUE, "normalised", ""), (RESIDUAL, OPAQUE, "normalised", ""),
    ),
    "moments held": (
        (RESIDUAL, OPAQUE, "normalised", ""), (RESIDUAL, OPAQUE, "normalised", "held"),
    ),
    "no merge block": (
        (RESIDUAL, OPAQUE, "normalised", "held"),
        ("decoders alone", OPAQUE, "normalised", "held"),
    ),
    "one VAE of four channels": (
        (RESIDUAL, OPAQUE, "normalised", "held"),
        ("four channels, opaque init", OPAQUE, "normalised", "held"),
    ),
}  # fmt: skip
PICTURED = (
    (RESIDUAL, "no rendering", "", ""), (RESIDUAL, "rendering", "", ""),
    (RESIDUAL, OPAQUE, "normalised", ""), (SCRATCH, OPAQUE, "normalised", ""),
    (RESIDUAL, OPAQUE, "normalised", "held"), ("decoders alone", OPAQUE, "normalised", "held"),
    ("four channels, opaque init", OPAQUE, "normalised", "held"),
)  # fmt: skip
DRAWS, SHOWN, SIDE = 2000, 6, 96
Run = dict[str, Any]


def runs_of(sweeps: list[str]) -> list[Path]:
    """Returns the folders of the jobs that ended."""
    jobs = [job for sweep in sweeps for job in Path(sweep).iterdir() if job.name.isdigit()]
    return sorted(job for job in jobs if (job / FINISHED).exists())


def settings_of(config: DictConfig) -> dict[str, Any]:
    """Returns what the study varies, in words."""
    reconstruction, diffusion = config.loss.reconstruction, config.loss.diffusion
    rendered = not reconstruction._target_.endswith("UnrenderedVAELoss")
    judged = diffusion.mode != "off"
    name = config.model._target_.rpartition(".")[2]
    ways = {"DecodersAlone": "decoders alone", "OpaqueInit": "four channels, opaque init"}
    loss = "rendering" if rendered else "no rendering"
    return {
        "model": ways.get(name, f"merge block, {config.model.merge_init}"),
        "loss": f"{loss} + {diffusion.mode}" if judged else loss,
        "judged": diffusion.latents if judged else "",
        "moments": "held" if config.task.moment_weight else "",
    }


def clips_through(
    config: DictConfig, checkpoint: Path
) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, float]]]:
    """Yields (batch of one clip, reconstruction, figures) of the clips kept back."""
    task: RGBAVAETask = instantiate(config.task).eval()
    task.configure_model()
    load_trainable(task, torch.load(checkpoint, weights_only=True)["state_dict"], str(checkpoint))
    diffusion: DiffusionLoss = instantiate(
        config.loss.diffusion, mode="opaque", latents="normalised", weight=1.0
    )
    judge = diffusion.build_judge(mesh=None)
    data = instantiate(config.data, val_batch_size=1, num_workers=0)
    data.setup("validate")
    strides = task.vae.geometry.time_stride, task.vae.geometry.space_stride
    for batch in data.val_dataloader():
        draw = task.validation_draw(batch)
        _, _, rgb_hat, alpha_hat, latents = task.step(batch, draw)
        alpha_hat = one_channel(alpha_hat)
        colors, alphas = CompositeQuality(lpips=False), AlphaQuality(*strides)
        colors.update(rgb_hat, alpha_hat, batch["rgb"], batch["alpha"])
        alphas.update(alpha_hat, batch["alpha"])
        found = alphas.compute()
        velocity = diffusion(latents, batch["alpha"], draw.noise, draw.step_ids, judge, *strides)
        figures = {
            "psnr": colors.compute()["psnr"],
            "alpha": found["mae"],
            "mixed": found.get("mae_mixed", torch.nan),
            "velocity": velocity if "mae_opaque" in found else torch.nan,
            "std": latents.std(),
        }
        yield (
            batch,
            torch.cat([rgb_hat, alpha_hat], 1)[0],
            {name: float(value) for name, value in figures.items()},
        )


def measured(run: Path) -> Run:
    """Returns a run's settings, seed, steps and figures of each clip; kept in the run's folder."""
    kept = run / "ablation.json"
    if not kept.exists():
        config = recorded_config(run)
        with torch.no_grad():
            clips = {
                batch["key"][0]: figures
                for batch, _, figures in clips_through(config, run / "checkpoints/last.ckpt")
            }
        steps = config.trainer.max_steps
        facts = {**settings_of(config), "seed": config.seed, "steps": steps, "clips": clips}
        write_json(kept, facts)
    return json.loads(kept.read_text())


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns the mean of (seeds, clips) and the 95 % of a bootstrap that draws both."""
    rng, (seeds, clips) = np.random.default_rng(0), values.shape
    drawn = [
        np.nanmean(values[rng.integers(seeds, size=seeds)][:, rng.integers(clips, size=clips)])
        for _ in range(DRAWS)
    ]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.nanmean(values)), float(low), float(high)


def table(groups: dict[tuple[str, ...], list[Run]]) -> str:
    """Returns the table as Markdown, a row for each choice."""
    heads = ["model", "loss", "judge sees", "moments", "seeds", *(h for h, _ in FIGURES.values())]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for choice, runs in groups.items():
        cells = [*choice, str(len(runs))]
        cells += [f"{np.nanmean(values(runs, n)):.{d}f}" for n, (_, d) in FIGURES.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def values(runs: list[Run], name: str) -> NDArray[np.float64]:
    """Returns a figure of (seeds, clips)."""
    return np.array([[clip[name] for clip in run["clips"].values()] for run in runs])


def changes(groups: dict[tuple[str, ...], list[Run]]) -> str:
    """Returns what each change does to the same clips at the same seeds, as Markdown."""
    heads = ["change", *(head for head, _ in FIGURES.values())]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, (before, after) in CHANGES.items():
        cells = [name]
        for figure, (_, d) in FIGURES.items():
            apart = values(groups[after], figure) - values(groups[before], figure)
            mean, low, high = interval(apart)
            sure = "**" if low > 0 or high < 0 else ""
            cells.append(f"{sure}{mean:+.{d}f}{sure} ({low:+.{d}f} to {high:+.{d}f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(of_choice: dict[tuple[str, ...], list[Path]], shards: str, out: Path) -> None:
    """Draws clips of `shards`: a row for each choice, the source above; over magenta, and alpha."""
    rows: list[tuple[str, list[Tensor]]] = []
    for choice in PICTURED:
        run = of_choice[choice][0]
        config = recorded_config(run)
        config.data.shards = shards
        with torch.no_grad():
            made = list(clips_through(config, run / "checkpoints/last.ckpt"))[:SHOWN]
        if not rows:
            rows.append(("source", [torch.cat([b["rgb"], b["alpha"]], 1)[0] for b, _, _ in made]))
        rows.append((", ".join(part for part in choice if part), [clip for _, clip, _ in made]))
    width, label = 2 * SIDE * SHOWN, 18
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + label)), (24, 24, 24))
    for row, (name, clips) in enumerate(rows):
        y = row * (SIDE + label)
        ImageDraw.Draw(sheet).text((4, y + 3), name, fill=(230, 230, 230))
        for column, clip in enumerate(clips):
            rgb, alpha = (part[:, clip.shape[1] // 2] for part in clip.split([3, 1]))
            background = PALETTE[5].view(3, 1, 1)
            for n, tile in enumerate(
                (over(rgb, alpha, background), alpha.expand(3, -1, -1) * 2 - 1)
            ):
                pixels = ((tile.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
                large = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                sheet.paste(large, ((2 * column + n) * SIDE, y + label))
    sheet.save(out)


def main(*arguments: str) -> None:
    given = dict(text.split("=", 1) for text in arguments if "=" in text)
    folders = runs_of([text for text in arguments if "=" not in text])
    groups: dict[tuple[str, ...], list[Run]] = {}
    of_choice: dict[tuple[str, ...], list[Path]] = {}
    for folder in tqdm(folders, desc="runs"):
        run = measured(folder)
        choice = tuple(run[name] for name in ("model", "loss", "judged", "moments"))
        groups.setdefault(choice, []).append(run)
        of_choice.setdefault(choice, []).append(folder)
    out = Path(given.get("out", "."))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ablation.csv").open("w", newline="") as file:
        names = ["model", "loss", "judged", "moments", "seed", "steps", *FIGURES]
        rows = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        for run in (run for runs in groups.values() for run in runs):
            clips = run["clips"].values()
            means = {n: round(float(np.nanmean([c[n] for c in clips])), 5) for n in FIGURES}
            rows.writerow({**run, **means})
    groups = dict(sorted(groups.items(), key=lambda item: (item[0][0] != RESIDUAL, item[0])))
    for name, text in (("table", table(groups)), ("changes", changes(groups))):
        (out / f"ablation_{name}.md").write_text(text)
        print(text)
    if "picture" in given:
        picture(of_choice, given["shown"], Path(given["picture"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
