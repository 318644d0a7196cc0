"""Does a sampled clip show what its prompt names? A small network that reads kind and color off
drawn clips, and the Frechet distance in its features."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file
from scipy.linalg import sqrtm
from torch import Tensor, nn
from tqdm import tqdm

from acetate.data import drawing, synthetic
from acetate.draws import generator_for
from acetate.metrics.intervals import interval
from acetate.replacing import new_mode, rename_over, write_tensors

SIDE = 48  # pixels that the network sees
FEATURES = 32  # fewer than clips, or their covariance has no full rank
# Places of named colors: around the circle of hues, whose twelve steps are those of the drawings,
# and from black to white. Two names are alike where they are at most one step apart: a plain
# figure runs from its color into the next one.
HUES = {name: float(place) for place, name in enumerate(drawing.COLORS)} | {
    "red": 0.5, "chestnut": 1.5, "blond": 3.0, "green": 4.5, "blue": 7.5,
}  # fmt: skip
GREYS = {"black": 0.0, "dark": 0.7, "grey": 1.7, "silver": 2.2, "white": 3.0}
NAMES = (*HUES, *GREYS)
Results = dict[str, float | list[float]]  # figures; three numbers: value, and its interval
NAMED = re.compile(r"\b(" + "|".join(sorted(NAMES, key=len, reverse=True)) + r")\b")
DRAWN, CHECKED = 4200, 420  # pictures that it learns from, and that are kept back
EPOCHS, BATCH, RATE = 8, 60, 6e-3
FIRST = 2 * 10**6  # numbers of the drawings; neither a demo shard nor `held_out` has them


class Reader(nn.Module):
    """Pictures (B, 4, 48, 48), color over grey and alpha, to logits of kinds and color names."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 16, 32, 48, 64)
        self.body = nn.Sequential(
            *(
                layer
                for inner, outer in pairwise(widths)
                for layer in (
                    nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(outer),
                    nn.ReLU(),
                )
            )
        )
        self.features = nn.Linear(2 * widths[-1], FEATURES)
        self.kinds = nn.Linear(FEATURES, len(synthetic.KINDS))
        self.colors = nn.Linear(FEATURES, len(NAMES))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, 32)."""
        maps = self.body(pictures)
        return self.features(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))


@dataclass(frozen=True)
class Seen:
    """The network's answers about clips: features (B, 32), kinds (B,), names of colors."""

    features: Tensor
    kinds: list[str]
    colors: list[str]


def colors_of(prompt: str) -> list[str]:
    """Returns the names of the subject's colors, without that of a bow in its hair."""
    return NAMED.findall(re.sub(r"with [\w ]+ bow", "", prompt.rpartition(": ")[2]))


def decided(clip: synthetic.SyntheticClip) -> bool:
    """Tells whether the prompt names all that the subject is colored with. Textures and sparks have
    a second color that it does not name, and no picture tells which of the two is the named one."""
    return clip.kind != "particles" and not any(
        texture in clip.prompt for texture in set(drawing.TEXTURES) - {"plain"}
    )


def alike(one: str, other: str) -> bool:
    """Tells whether two names are at most one step apart."""
    if one in HUES and other in HUES:
        way = abs(HUES[one] - HUES[other])
        return min(way, len(drawing.COLORS) - way) <= 1
    return one in GREYS and other in GREYS and abs(GREYS[one] - GREYS[other]) <= 1


def pictures(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Turns rgb (B, 3, H, W) in [-1, 1] and alpha (B, 1, H, W) in [0, 1] into what the network
    sees."""
    both = torch.cat([rgb * alpha, alpha], 1)
    return F.interpolate(both, (SIDE, SIDE), mode="area") if both.shape[-1] != SIDE else both


@torch.no_grad()
def see(reader: Reader, clips: Sequence[tuple[Tensor, Tensor]]) -> Seen:
    """Reads clips: rgb (3, T, H, W) and alpha (1, T, H, W) each. Features are means over the
    frames."""
    reader.eval()
    views = [
        pictures(rgb.transpose(0, 1).clamp(-1, 1), alpha.transpose(0, 1).clamp(0, 1))
        for rgb, alpha in clips
    ]
    return named(reader, torch.stack([reader(view).mean(0) for view in views]))


def named(reader: Reader, features: Tensor) -> Seen:
    """Returns what the network names in features (B, 32)."""
    kinds, names = reader.kinds(features).argmax(1), reader.colors(features).argmax(1)
    return Seen(
        features,
        [synthetic.KINDS[place] for place in kinds.tolist()],
        [NAMES[place] for place in names.tolist()],
    )


def agreement(seen: Seen, clips: Sequence[synthetic.SyntheticClip]) -> tuple[Tensor, Tensor]:
    """Tells whether the kind is that of the prompt's clip, (B,); and whether the color is one that
    the prompt names, or alike, of those clips whose prompts decide it."""
    kinds = [found == clip.kind for found, clip in zip(seen.kinds, clips, strict=True)]
    colors = [
        any(alike(found, name) for name in colors_of(clip.prompt))
        for found, clip in zip(seen.colors, clips, strict=True)
        if decided(clip)
    ]
    return torch.tensor(kinds), torch.tensor(colors)


def frechet(one: Tensor, other: Tensor) -> float:
    """Returns the squared distance of two normal distributions with the moments of features (B, D):
    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Frechet 1957, Heusel et al. 2017)."""
    a, b = one.double().numpy(), other.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(first @ second).real
    away = a.mean(0) - b.mean(0)
    return float(away @ away + np.trace(first + second - 2 * root))


def load_reader(cache: Path) -> tuple[Reader, dict[str, float]]:
    """Returns the network and its share of kept-back drawings that it reads right. It is trained
    at first use, in about a minute, and kept in the folder `cache` until drawings or training
    change."""
    code = b"".join(
        Path(str(file)).read_bytes() for file in (drawing.__file__, synthetic.__file__, __file__)
    )
    path = cache / f"reader-{hashlib.sha256(code).hexdigest()[:16]}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), mode=new_mode()):
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            write_tensors(train_reader().state_dict(), temporary, {})
            rename_over(temporary, path)
    reader = Reader()
    reader.load_state_dict(load_file(path))
    return reader, check_reader(reader)


def drawn(first: int, count: int) -> list[synthetic.SyntheticClip]:
    """Pictures of all kinds in turn, one frame each."""
    kinds = synthetic.KINDS
    return [
        synthetic.render(kinds[number % len(kinds)], number, 1, SIDE, SIDE)
        for number in tqdm(range(first, first + count), desc="drawings", leave=False)
    ]


def train_reader() -> Reader:
    """Trains on drawings at every size and place, a little blurred and noisy, as decoded clips
    are; the same network for the same code and machine."""
    clips = drawn(FIRST, DRAWN)
    images = torch.cat([pictures(clip.rgb[:, 0][None], clip.alpha[:, 0][None]) for clip in clips])
    kinds = torch.tensor([synthetic.KINDS.index(clip.kind) for clip in clips])
    names = torch.tensor(
        [[name in colors_of(clip.prompt) for name in NAMES] for clip in clips]
    ).float()
    known = torch.tensor([float(decided(clip)) for clip in clips])
    names = names / names.sum(1, keepdim=True) * known[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = Reader().train()
    generator = generator_for("reader")
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=1e-2)
    steps = EPOCHS * (DRAWN // BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    bar = tqdm(total=steps, desc="reader", leave=False)
    for _ in range(EPOCHS):
        for places in torch.randperm(DRAWN, generator=generator).split(BATCH):
            features = reader(varied(images[places], generator))
            loss = F.cross_entropy(reader.kinds(features), kinds[places])
            loss = loss + F.cross_entropy(reader.colors(features), names[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            bar.update()
    return reader.eval()


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Makes images smaller by down to 0.4 and somewhere on their canvas; half of them blurred;
    noisy."""
    scale, x, y, blur, noise = torch.rand(5, len(images), generator=generator)
    scale = 0.4 + 0.6 * scale
    room = 1 - scale
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, 0, 2], theta[:, 1, 2] = -room * (2 * x - 1) / scale, -room * (2 * y - 1) / scale
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    soft = F.avg_pool2d(moved, 3, stride=1, padding=1)
    moved = torch.where(blur[:, None, None, None] < 0.5, soft, moved)
    grain = torch.randn(moved.shape, generator=generator)
    return moved + 0.05 * noise[:, None, None, None] * grain


def check_reader(reader: Reader) -> dict[str, float]:
    """Returns the share of kept-back drawings, at every size and place, whose kind and color it
    reads right."""
    clips = drawn(FIRST + DRAWN, CHECKED)
    images = torch.cat([pictures(clip.rgb[:, 0][None], clip.alpha[:, 0][None]) for clip in clips])
    moved = varied(images, generator_for("reader", "check"))
    with torch.no_grad():
        seen = named(reader, reader.eval()(moved))
    kinds, colors = agreement(seen, clips)
    return {"kind": kinds.float().mean().item(), "color": colors.float().mean().item()}


def measure(
    reader: Reader,
    sampled: Sequence[tuple[Tensor, Tensor]],
    clips: Sequence[synthetic.SyntheticClip],
    held_out: Sequence[tuple[Tensor, Tensor]],
) -> Results:
    """Returns [value, low, high], 95 % intervals, of the shares of sampled clips whose kind and
    color are those of their prompts, and of the Frechet distance between them and as many held-out
    ones; and the share of each kind that is right, alone.

    clips: whose prompts they are. What needs more clips than there are is left out: the distance
    more than features, a share two.
    """
    seen, real = see(reader, sampled), see(reader, held_out).features
    results: Results = {}
    kinds, colors = agreement(seen, clips)
    for kind in dict.fromkeys(clip.kind for clip in clips):
        of_kind = torch.tensor([clip.kind == kind for clip in clips])
        results[f"kind, {kind}"] = kinds[of_kind].double().mean().item()
    for name, right in (("kind", kinds), ("color", colors)):
        if len(right) > 1:
            values = right.double().numpy()
            share = partial(_mean_at, values)
            results[name] = [share(slice(None)), *interval(len(values), share)]
    if len(real) > FEATURES:
        between = partial(_frechet_at, seen.features, real)
        low, high = interval(len(real), between, "basic")
        results["frechet"] = [between(slice(None)), max(0.0, low), high]
    return results


def _mean_at(values: np.ndarray, places: np.ndarray | slice) -> float:
    return float(values[places].mean())


def _frechet_at(one: Tensor, other: Tensor, places: np.ndarray | slice) -> float:
    return frechet(one[places], other[places])
