"""python -m acetate.commands.follow [name=value ...]: does the DiT leave the border empty and follow its guide?"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from acetate import regions
from acetate.commands import device_of
from acetate.commands.program import program
from acetate.commands.recorded import as_trained, value_of
from acetate.commands.sample import SIZE, check_models, embed, load_dit, outputs_of
from acetate.data import synthetic
from acetate.draws import generator_for
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.metrics.alpha import border_mean, centre_of_mass, highest_cell
from acetate.replacing import check_out, write_json
from acetate.sampling import EllipsePath, Solver, check_size, decode, initial_noise, sample_latents

BORDER, SUBJECT = 0.1, 0.8  # alpha: at most on the border, at least in some cell


def held_out(
    paths: Sequence[EllipsePath], frames: int, height: int, width: int, space_stride: int
) -> list[synthetic.SyntheticClip]:
    """For each guide a clip that no demo shard holds, and that has a subject when it is as small as the guide.

    Sparks and thin glass often have no cell above 0.8, so that a sample that is true to their prompts has none either.
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


def placed(alpha: Tensor, path: EllipsePath) -> Tensor:
    """alpha (1, T, H, W) shrunk to the guide's length and moved to its centre."""
    height, width = alpha.shape[-2:]
    rows, columns = round(path.axes[0] * height), round(path.axes[0] * width)
    small = F.interpolate(alpha.transpose(0, 1), (rows, columns), mode="area").transpose(0, 1)
    left, top = round(path.centre[0] * width - columns / 2), round(path.centre[1] * height - rows / 2)
    return F.pad(small, (left, width - left - columns, top, height - top - rows))


def random_paths(count: int, seed: int) -> list[EllipsePath]:
    """Still ellipses, centres in the middle 40 % of the picture."""
    draws = torch.rand(count, 4, generator=generator_for("follow", seed), dtype=torch.float64)
    low, high = torch.tensor([0.3, 0.3, 0.4, 0.7]), torch.tensor([0.7, 0.7, 0.7, 1.0])
    rows = (low + (high - low) * draws).tolist()
    return [EllipsePath(centre=(x, y), axes=(long, long * ratio)) for x, y, long, ratio in rows]


def figures(alpha: Tensor, centres: Tensor, space_stride: int) -> dict[str, float]:
    """alpha (B, 1, T, H, W) in [0, 1]; centres (B, 2) of the guides as shares of width and height."""
    border, cell, mass = border_mean(alpha), highest_cell(alpha, space_stride), centre_of_mass(alpha)
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


def settings_first(given: Sequence[str]) -> list[str]:
    """What the run of `dora=` recorded."""
    dora = value_of(given, "dora") or f"{outputs_of(given)}/demo_dit"
    size = {name: places for name, places in SIZE.items() if name != "fps"}
    return [] if dora == "null" else as_trained(dora, "dora", given, {"rgba_vae": ("rgba_vae",), **size})


@program("command/follow", settings_first)
def main(config: DictConfig) -> None:
    if config.out is not None:
        check_out(Path(config.out))
    if config.count < 3:
        raise ValueError(f"count={config.count}; a correlation needs at least 3 clips.")
    device = device_of(config)
    vae = load_rgba_vae(vae=config.wan.vae, adapters=config.rgba_vae, frozen_dtype=config.wan.dtype).to(device)
    paths = random_paths(config.count, config.seed)
    clips = held_out(paths, config.frames, config.height, config.width, vae.geometry.space_stride)
    context, negative, text_sha256 = embed(config, [*(clip.prompt for clip in clips), ""], device)
    transformer, facts = load_dit(config, device)
    check_size(config.frames, config.height, config.width, vae.geometry, transformer.config.patch_size)
    check_models(facts, vae, text_sha256)
    mean_shift = facts.get("mean_shift", 0.0) if config.mean_shift is None else config.mean_shift
    shape = vae.geometry.latent_shape(config.frames, config.height, config.width)
    guides = regions.gaussian(torch.cat([path.ellipses(*shape[1:]) for path in paths]), *shape[2:])
    noise = torch.cat(
        [
            initial_noise(
                [config.seed + i],
                shape,
                guides[i : i + 1] if config.guided and mean_shift else None,
                mean_shift,
                device,
            )
            for i in range(config.count)
        ]
    )
    solver = Solver(name=config.solver, steps=config.steps, guidance=config.guidance, shift=config.shift)
    alphas = []
    for part, words in zip(noise.split(config.batch_size), context.split(config.batch_size), strict=True):
        latents = sample_latents(transformer, part, words.to(device), negative, solver)
        alphas += [alpha.clamp(0, 1) for _, alpha in decode(vae, latents)]
    centres = torch.tensor([path.centre for path in paths])
    results = figures(torch.stack(alphas), centres, vae.geometry.space_stride)
    table = Table(*results)
    table.add_row(*(f"{value:.3f}" for value in results.values()))
    Console(width=120).print(table)
    if config.out is not None:
        write_json(Path(config.out), results)


if __name__ == "__main__":
    main()
