"""acetate follow [name=value ...]: does the DiT leave the border empty, follow its guide, and show
what the prompt names?"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from acetate.alpha import border_mean
from acetate.callbacks.panels import save_picture
from acetate.callbacks.samples import contact_sheet
from acetate.cli import run
from acetate.commands.agreement import Results, load_reader, measure
from acetate.commands.follow_pictures import measure_pictures
from acetate.data import synthetic
from acetate.draws import generator_for
from acetate.metrics.alpha import centre_of_mass, highest_cell
from acetate.pipeline import RGBAPipeline
from acetate.replacing import check_out, write_json
from acetate.sampling import EllipsePath

BORDER, SUBJECT = 0.1, 0.8  # alpha: at most on the border, at least in some cell
SHOWN = 14  # clips on the sheet, two of a kind


def held_out(
    paths: Sequence[EllipsePath], frames: int, height: int, width: int, space_stride: int
) -> list[synthetic.SyntheticClip]:
    """Draws for each guide a clip that no demo shard holds, and that has a subject when it is as
    small as the guide.

    Sparks and thin glass often have no cell above 0.8, so that a sample that is true to their
    prompts has none either.
    """
    kinds, clips, number = synthetic.KINDS, [], count(10**6)
    for path in paths:
        solid = False
        while not solid:
            i = next(number)
            clip = synthetic.render(kinds[i % len(kinds)], i, frames, height, width)
            solid = bool(highest_cell(placed(clip.alpha, path)[None], space_stride) > SUBJECT)
        clips.append(clip)
    return clips


def placed(planes: Tensor, path: EllipsePath) -> Tensor:
    """Shrinks planes (C, T, H, W), such as alpha, to the guide's length and moves them to its
    centre."""
    height, width = planes.shape[-2:]
    rows, columns = round(path.axes[0] * height), round(path.axes[0] * width)
    small = F.interpolate(planes.transpose(0, 1), (rows, columns), mode="area").transpose(0, 1)
    left = round(path.centre[0] * width - columns / 2)
    top = round(path.centre[1] * height - rows / 2)
    return F.pad(small, (left, width - left - columns, top, height - top - rows))


def whole(clip: synthetic.SyntheticClip, path: EllipsePath) -> tuple[Tensor, Tensor]:
    """Returns rgb and alpha of a drawn clip, shrunk and moved as `placed` does."""
    alpha = placed(clip.alpha, path)
    premultiplied = placed((clip.rgb + 1) * clip.alpha, path)
    return premultiplied / alpha.clamp_min(1e-6) - 1, alpha


def random_paths(count: int, seed: int) -> list[EllipsePath]:
    """Draws still ellipses with centres in the middle 40 % of the picture."""
    draws = torch.rand(count, 4, generator=generator_for("follow", seed), dtype=torch.float64)
    low, high = torch.tensor([0.3, 0.3, 0.4, 0.7]), torch.tensor([0.7, 0.7, 0.7, 1.0])
    rows = (low + (high - low) * draws).tolist()
    return [EllipsePath(centre=(x, y), axes=(long, long * ratio)) for x, y, long, ratio in rows]


def figures(alpha: Tensor, centres: Tensor, space_stride: int) -> dict[str, float]:
    """Measures alpha (B, 1, T, H, W) in [0, 1] against centres (B, 2) of the guides as shares of
    width and height."""
    border = border_mean(alpha)
    cell = highest_cell(alpha, space_stride)
    mass = centre_of_mass(alpha)
    right = (border < BORDER) & (cell > SUBJECT)
    x, y = (torch.corrcoef(torch.stack([mass[:, i], centres[:, i]]))[0, 1].item() for i in (0, 1))
    return {
        "right": right.float().mean().item(),
        "empty border": (border < BORDER).float().mean().item(),
        "subject": (cell > SUBJECT).float().mean().item(),
        "border alpha": border.mean().item(),
        "correlation x": x,
        "correlation y": y,
    }


def main(config: DictConfig) -> None:
    if config.out is not None:
        check_out(Path(config.out))
    if config.count < 3:
        raise ValueError(f"count={config.count}; a correlation needs at least 3 clips.")
    pipeline = RGBAPipeline(config)
    measured = measure_prompts if config.pictures is None else measure_pictures
    found, sheet = measured(pipeline, config)
    show(found)
    if config.out is not None:
        picture = Path(config.out).with_suffix(".png")
        write_json(Path(config.out), found)
        save_picture(sheet, picture)
        print(f"figures     {config.out}\nsheet       {picture}")


def measure_prompts(pipeline: RGBAPipeline, config: DictConfig) -> tuple[Results, Image.Image]:
    """Returns the figures of `config.count` clips of held-out prompts, and a sheet of the first."""
    paths = random_paths(config.count, config.seed)
    clips = held_out(
        paths, config.frames, config.height, config.width, pipeline.vae.geometry.space_stride
    )
    guide = paths if config.guided and pipeline.mean_shift else None
    sampled = pipeline([clip.prompt for clip in clips], guide=guide)
    alphas = torch.stack([clip.alpha.clamp(0, 1) for clip in sampled])
    centres = torch.tensor([path.centre for path in paths])
    results: Results = {**figures(alphas, centres, pipeline.vae.geometry.space_stride)}
    reader, right = load_reader(Path(config.paths.cache))
    ours = [(clip.rgb, clip.alpha) for clip in sampled]
    real = [whole(clip, path) for clip, path in zip(clips, paths, strict=True)]
    results |= measure(reader, ours, clips, real)
    for name, value in measure(reader, real, clips, real).items():
        if name != "frechet" and not name.startswith("kind, "):
            results[f"{name}, own clips"] = value
    results |= {f"{name}, reader": value for name, value in right.items()}
    shown = [(clip.prompt, clip.rgb, clip.alpha) for clip in sampled[:SHOWN]]
    return results, contact_sheet(shown, "samples of held-out prompts")


def show(results: Results) -> None:
    table = Table("", "value", "95 % interval")
    for name, value in results.items():
        if isinstance(value, list):
            table.add_row(name, f"{value[0]:.3f}", f"{value[1]:.3f} to {value[2]:.3f}")
        else:
            table.add_row(name, f"{value:.3f}", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    run("follow")
