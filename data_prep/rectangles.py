"""Finds colour and alpha in a packed video, by what is said of it or by its pictures."""

import json
from pathlib import Path

from acetate.media.clip import Limits
from acetate.media.packed import SURE, stated_packing
from acetate.media.sequences import is_sequence
from acetate.video_io import VIDEOS, Description, MediaError, Rect, measure_packing
from data_prep.candidates import Candidate
from data_prep.tables import column


def given_rectangles(candidate: Candidate, header: Description) -> tuple[Rect, Rect] | None:
    """Returns the rectangles of a .json entry, of a table's columns color_rect and alpha_rect, "x y
    width height", or as the file itself states them."""
    path, origin, row = candidate.files[0], candidate.origin, candidate.row
    if "alpha_rect" in origin:
        size = tuple(origin.get("packed_size", (header.width, header.height)))
        if size != (header.width, header.height):
            raise MediaError(
                f"{path} is {header.width}x{header.height}, its rectangles are for "
                f"{size[0]}x{size[1]}"
            )
        names = ("rgb_rect", "color_rect", "colour_rect")
        color = next((origin[name] for name in names if name in origin), None)
        texts = [color, origin["alpha_rect"]]
    elif column(row, "alpha_rect"):
        texts = [
            column(row, name).replace(",", " ").split() for name in ("color_rect", "alpha_rect")
        ]
    else:
        films = path.suffix.lower() in VIDEOS and not is_sequence(path)
        return stated_packing(path, (header.width, header.height)) if films else None
    try:
        (x, y, width, height), (right, down, wide, high) = (
            [int(number) for number in text] for text in texts
        )
    except (TypeError, ValueError) as error:
        raise MediaError(
            f"{path}: rectangles {json.dumps(texts)}; each is x, y, width, height in pixels"
        ) from error
    return (x, y, width, height), (right, down, wide, high)


def detected_rectangles(path: Path, limits: Limits) -> tuple[Rect, Rect] | None:
    """Returns the rectangles that the pictures show; None where they show none. Raises MediaError
    where they only seem to."""
    packing = measure_packing(path, limits)
    if packing is None:
        return None
    if packing.confidence < SURE:
        raise MediaError(
            f"{path} has no alpha of its own, and is perhaps packed: colour at "
            f"{list(packing.color)}, alpha at {list(packing.alpha)}, confidence "
            f"{packing.confidence:.2f} ({packing.reason}). Give the rectangles in a .json or a "
            "table if that is so"
        )
    return packing.color, packing.alpha
