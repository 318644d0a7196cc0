"""Fills the templates of pages with what all of them share: style, filters and backgrounds."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from acetate.alpha import PALETTE, PALETTE_NAMES

HERE = Path(__file__).parent
SLOT = re.compile(r"<!-- slot:(\w+) -->")
COLORS = {name: "#" + "".join(f"{round(255 * (x + 1) / 2):02x}" for x in rgb.tolist())
           for name, rgb in zip(PALETTE_NAMES, PALETTE, strict=True)}  # fmt: skip


def filled(template: str, title: str, parts: Mapping[str, str]) -> str:
    """Fills the slots of a template, a file of this folder, with its parts and what all pages
    share."""
    style, filters, text = (
        (HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.svg", template)
    )
    shared = {"title": escape(title), "style": style, "filters": filters}
    slots = shared | {"grounds_css": grounds_css()} | dict(parts)
    return SLOT.sub(lambda match: slots[match[1]], text)


def grounds(extra: Sequence[str] = ("alpha", "eight colours")) -> str:
    """Returns a choice of backgrounds; extra: other ways to look, named by their first word."""
    named = {"checker": "checkerboard", **{text.split()[0]: text for text in extra}}
    parts = []
    for value in (*named, *COLORS):
        checked = " checked" if value == "checker" else ""
        inside = named.get(value, "")
        look = "" if inside else f' class="swatch" style="--ground:{COLORS[value]}"'
        parts.append(
            f'<label title="{value}"><input type="radio" name="ground" value="{value}" '
            f'aria-label="{value}"{checked}>'
            f"<span{look}>{inside}</span></label>"
        )
    return "".join(parts)


def grounds_css() -> str:
    return "\n".join(
        f".cards[data-ground={name}] {{ --ground: {code}; }}" for name, code in COLORS.items()
    )
