"""A transparent clip in memory, which can be read from a file, laid over a colour and saved for
editors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from acetate.alpha import PALETTE, PALETTE_NAMES, over
from acetate.video_io import read_rgba
from acetate.video_out import SUFFIXES, write_clip

ALIASES = {"black": "key"}


@dataclass(frozen=True)
class Clip:
    """Straight colour and alpha, with the frame rate.

    rgb: (3, T, H, W) about [-1, 1]. alpha: (1, T, H, W) about [0, 1]. fps: frames a second. prompt
    and seed: of a sampled clip. guide: (T, N, 2), the outline that it was sampled with, drawn in
    previews alone.
    """

    rgb: Tensor
    alpha: Tensor
    fps: float = 16.0
    prompt: str = ""
    seed: int | None = None
    guide: Tensor | None = None

    @classmethod
    def read(cls, path: str | Path) -> "Clip":
        """Reads a file or an image sequence with alpha. Raises MediaError for one that cannot be
        read as RGBA."""
        read = read_rgba(Path(path).expanduser())
        pixels = torch.as_tensor(read.frames).permute(3, 0, 1, 2).float() / 255
        return cls(pixels[:3] * 2 - 1, pixels[3:], read.fps or 16.0)

    def over(self, background: str | Tensor) -> Tensor:
        """Returns the soft render over a colour, (3, T, H, W) in [-1, 1].

        background: a name of the training palette (red, green, blue, cyan, magenta, yellow, key or
        black, white), or a tensor in [-1, 1] that broadcasts against rgb. Raises ValueError for an
        unknown name.
        """
        if isinstance(background, str):
            background = background_of(background)
        return over(self.rgb.clamp(-1, 1), self.alpha.clamp(0, 1), background.to(self.rgb))

    def save(self, path: str | Path) -> Path:
        """Writes the clip in the format that the name's end says, whole or not at all; returns the
        path.

        .mov ProRes 4444, .webm VP9, .webp, .apng; NAME_png: a folder of pictures; NAME_preview.mp4:
        over a checkerboard; NAME_fgr.mp4: colour, with the matte beside it as NAME_pha.mp4. Raises
        ValueError for another end.
        """
        path = Path(path).expanduser()
        for name, suffixes in SUFFIXES.items():
            if path.name.endswith(suffixes[0]) and path.name != suffixes[0]:
                stem = path.with_name(path.name.removesuffix(suffixes[0]))
                return write_clip(stem, self.rgb, self.alpha, self.fps, [name], self.guide)[0]
        known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes[:1])
        raise ValueError(f"{path}: the end of the name says the format; it is one of {known}.")


def background_of(name: str) -> Tensor:
    """Returns a colour of the palette, (3, 1, 1, 1) in {-1, 1}. Raises ValueError for an unknown
    name."""
    name = ALIASES.get(name, name)
    if name not in PALETTE_NAMES:
        raise ValueError(
            f"background {name!r}; choose from {', '.join((*PALETTE_NAMES, *ALIASES))}, or give a "
            "tensor."
        )
    return PALETTE[PALETTE_NAMES.index(name)].view(3, 1, 1, 1)
