"""The moving picture of the README: clips, their reconstructions over changing colours, their
alpha.

python docs/hero.py outputs/demo data/demo assets/hero.webp
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from acetate import RGBAVAE, Clip
from acetate.alpha import PALETTE
from acetate.data.shards import index_shards, read_clip
from acetate.replacing import rename_over

SIDE, GAP, SHOWN = 176, 6, 4  # pixels, and how many clips
COLORS = (4, 6, 2, 3, 1, 5, 7, 0)  # of the palette, in the order of the wheel
BETWEEN = 6  # frames from one colour to the next


def main(run: str, shards: str, out: str) -> None:
    vae = RGBAVAE.load(run)
    refs = [ref for ref in index_shards([Path(shards)]) if ref.split == "val"]
    kinds = list(dict.fromkeys(ref.key.partition("-")[0] for ref in refs))
    chosen = [next(ref for ref in refs if ref.key.startswith(kind)) for kind in kinds][:SHOWN]
    rows = []
    for ref in chosen:
        pixels = torch.from_numpy(read_clip(ref).frames).permute(3, 0, 1, 2).float() / 255
        clip = Clip(pixels[:3] * 2 - 1, pixels[3:])
        rows.append((clip, vae.decode(vae.encode(clip))[0]))
    pictures = [picture(rows, n) for n in range(BETWEEN * len(COLORS))]
    path = Path(out)
    temporary = path.with_name(f".{path.name}")
    pictures[0].save(
        temporary,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=90,
        loop=0,
        quality=80,
    )
    rename_over(temporary, path)


def picture(rows: list[tuple[Clip, Clip]], n: int) -> Image.Image:
    """The n-th: a column for each clip, which goes to and fro; source, reconstruction, its
    alpha."""
    share = (n % BETWEEN) / BETWEEN
    one, two = (PALETTE[COLORS[(n // BETWEEN + k) % len(COLORS)]].view(3, 1, 1, 1) for k in (0, 1))
    background = 0.6 * ((1 - share) * one + share * two)
    sheet = Image.new("RGB", (GAP + len(rows) * (SIDE + GAP), GAP + 3 * (SIDE + GAP)), (24, 24, 24))
    for column, (source, made) in enumerate(rows):
        frames = source.rgb.shape[1]
        t = abs(n % (2 * frames - 2) - (frames - 1))
        alpha = made.alpha.clamp(0, 1).expand(3, -1, -1, -1) * 2 - 1
        for row, video in enumerate((source.over(background), made.over(background), alpha)):
            sheet.paste(tile(video[:, t]), (GAP + column * (SIDE + GAP), GAP + row * (SIDE + GAP)))
    return sheet


def tile(frame: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], enlarged."""
    large = F.interpolate(frame[None], (SIDE, SIDE), mode="bicubic").clamp(-1, 1)[0]
    return Image.fromarray(((large + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
