"""A find of ingest: a line of its manifest, and what such a line may say."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from acetate.data.keys import KEY
from acetate.documents import Schema, names, prose
from acetate.settings import flag, number, one_of, optional, place, several, text, whole
from acetate.video_io import Rect

Kind = Literal["still", "sequence", "video", "pair", "matte", "packed"]


@dataclass(frozen=True)
class Found:
    """One line of the manifest. files: one, or colour and alpha. The rectangles are of a packed
    video.

    kind: matte is a whole picture with its matte, whose foreground is estimated when shards are
    made.
    """

    key: str
    kind: Kind
    files: list[str]
    frames: int
    width: int
    height: int
    fps: float | None
    prompt: str
    licence: str
    source: str
    group: str  # clips of one group stay on one side of the split
    lossy: bool
    premultiplied: bool | None  # None: the format does not say, it is measured
    color_rect: Rect | None
    alpha_rect: Rect | None
    # Decisions.as_json; None: data_prep.shard measures the clip
    decisions: dict[str, Any] | None = None
    layer: str | None = None  # of an OpenEXR file; None: the one that has alpha
    # whether reading divides colour by alpha, where a person said so of linear light
    divide: bool | None = None
    notes: list[str] = field(default_factory=list)  # what reading did to the pictures


_size = whole(1, 2**24)
_rect = optional(several(whole(0, 2**24), 4, 4))
FOUND = Schema(
    {
        "key": KEY, "kind": one_of(*get_args(Kind)), "files": several(place, 1, 2),
        "frames": _size, "width": _size, "height": _size, "fps": optional(number(0, 1e6)),
        **dict.fromkeys(("prompt", "licence", "source", "group"), prose(100_000)), "lossy": flag,
        "premultiplied": optional(flag), "color_rect": _rect, "alpha_rect": _rect,
    },
    {"decisions": optional(names), "notes": several(prose(100_000), 0), "layer": optional(text),
     "divide": optional(flag)},
    open=False,
)  # fmt: skip
