"""The page that plays transparent clips over any background: of one system, or of several side by
side."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acetate.pages.templates import filled, grounds


@dataclass(frozen=True)
class Shown:
    """A clip of one system: a sheet of its pictures as WebP, and what is measured of it.

    columns: pictures in a row of the sheet. size: of a picture, width and height. frames: of the
    clip, `held` of them in the sheet.
    """

    sheet: bytes
    columns: int
    size: tuple[int, int]
    held: int
    frames: int
    fps: float
    prompt: str
    figures: dict[str, float] = field(default_factory=dict)


def shown(
    frames: NDArray[np.uint8],
    fps: float,
    prompt: str,
    figures: Mapping[str, float] | None = None,
    *,
    most: int = 81,
    side: int = 320,
    lossless: bool = False,
) -> Shown:
    """Draws the sheet of a clip of straight RGBA, (T, H, W, 4): at most so many pictures, evenly
    spread, of at most this longer side. lossless: whether the page holds them to the bit."""
    places = np.linspace(0, len(frames) - 1, min(most, len(frames))).round()
    pictures = [_small(frames[int(place)], side) for place in np.unique(places)]
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGBA", (columns * width, math.ceil(len(pictures) / columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    buffer = BytesIO()
    sheet.save(buffer, "WEBP", quality=90, alpha_quality=100, lossless=lossless, exact=True)
    return Shown(
        buffer.getvalue(), columns, (width, height), len(pictures), len(frames),
        fps * len(pictures) / len(frames), prompt, dict(figures or {}),
    )  # fmt: skip


def _small(frame: NDArray[np.uint8], side: int) -> Image.Image:
    """Scales a picture down, premultiplied, as PIL does with RGBA; small pictures stay as they
    are."""
    image = Image.fromarray(frame)
    scale = min(1.0, side / max(image.size))
    sides = [max(1, round(length * scale)) for length in image.size]
    return image.resize(sides, Image.Resampling.LANCZOS) if scale < 1 else image


def page(
    title: str,
    systems: Sequence[str],
    clips: Sequence[tuple[str, Sequence[Shown | str | None]]],
    below: str = "",
) -> str:
    """Returns the page. clips: name and, of each system, a Shown, a reason or None. below: HTML
    after them."""
    names = list(dict.fromkeys(
        name for _, made in clips for one in made if isinstance(one, Shown) for name in one.figures
    ))  # fmt: skip
    parts = {
        "grounds": grounds(extra=("light", "dark", "moving", "own picture")),
        "systems": json.dumps(list(systems)).replace("</", "<\\/"),
        "orders": "".join(f'<option value="{escape(n)}">{escape(n)}</option>' for n in names),
        "cards": "".join(_card(*clip) for clip in clips),
        "below": below,
    }
    return filled("view.html", title, parts)


def _card(name: str, made: Sequence[Shown | str | None]) -> str:
    held = [one for one in made if isinstance(one, Shown)]
    prompt = next((one.prompt for one in held if one.prompt), "")
    facts = [
        {
            "columns": one.columns, "size": one.size, "held": one.held, "frames": one.frames,
            "fps": one.fps, "figures": {
                n: float(f"{v:.4g}") for n, v in one.figures.items() if math.isfinite(v)
            },
        }
        if isinstance(one, Shown)
        else {"why": one or "not there"}
        for one in made
    ]  # fmt: skip
    sheets = "".join(
        f'<template data-of="{i}">{base64.b64encode(one.sheet).decode()}</template>'
        for i, one in enumerate(made)
        if isinstance(one, Shown)
    )
    return (
        f'<article class="card" data-name="{escape(name)}" data-text="{escape(name.lower())} '
        f'{escape(prompt.lower())}" data-facts="{escape(json.dumps(facts))}">{sheets}'
        f'<div class="stages"></div><div class="text"><h3 class="name">{escape(name)}</h3>'
        f'<p class="prompt">{escape(prompt)}</p><p class="about"></p></div></article>'
    )
