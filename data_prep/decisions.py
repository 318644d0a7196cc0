"""The decisions about a clip before it becomes part of a shard, as the lines of data_prep.ingest's
manifest hold them."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from PIL import ImageColor

from acetate.video_io import Rect

COLORS = ("straight", "black", "white", "matte")
Matte = Literal["normal", "empty", "full", "flickers"]
AUTO = "auto"
BACKDROP = re.compile("#[0-9a-f]{6}")


def respelled(value: Any) -> Any:
    """Renames `colour` in the JSON of older manifests to the names of today."""
    if isinstance(value, Mapping):
        return {name.replace("colour", "color"): respelled(inner) for name, inner in value.items()}
    return value


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """One clip's. Alpha is in 0..255, rectangles are x, y, width, height in the pixels of the
    decoded frames.

    A person may edit them in the manifest's line; `reasons` says why each one was taken.
    """

    # what colour is mixed with at alpha < 1: nothing (straight), black, white, another colour
    # (#rrggbb), or the scene of a picture (matte)
    color: str
    confidence: float  # of colour, in [0, 1]; 0: nothing speaks for it, and nothing against it
    alpha_low: int  # alpha up to this is a codec's noise around 0
    alpha_high: int  # and from this on around 255
    matte: Matte  # empty and full: over the whole clip; flickers: its coverage jumps to and fro
    crop: Rect | None  # the picture inside of black bars; None: there are none
    visible: Rect | None  # all that is ever above alpha_low; None: nothing is
    still: bool  # every frame shows the same
    cuts: tuple[int, ...]  # first frames of the second and later shots
    reasons: dict[str, str] = field(default_factory=dict)  # field -> why
    figures: dict[str, float] = field(default_factory=dict)  # that colour was decided by
    # the levels that stand for 0 and 255; None: these do
    alpha_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.color not in COLORS and not BACKDROP.fullmatch(self.color):
            raise ValueError(f"color={self.color!r}; {TAKES['color']}")
        for name, choices in (("matte", get_args(Matte)), ("still", (True, False))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r}; choose {', '.join(map(str, choices))}")
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence={self.confidence}; must be in [0, 1]")
        if not 0 <= self.alpha_low < self.alpha_high <= 255:
            raise ValueError(
                f"alpha_low={self.alpha_low}, alpha_high={self.alpha_high}; 0 <= alpha_low < "
                "alpha_high <= 255"
            )
        if self.alpha_range is not None and not (
            len(self.alpha_range) == 2 and 0 <= self.alpha_range[0] < self.alpha_range[1] <= 255
        ):
            raise ValueError(f"alpha_range={self.alpha_range}; {TAKES['alpha_range']}")
        for name in ("crop", "visible"):
            rect = getattr(self, name)
            if rect is not None and (len(rect) != 4 or min(rect[:2]) < 0 or min(rect[2:]) < 1):
                raise ValueError(f"{name}={rect}; a rectangle is x, y >= 0 and width, height >= 1")
        if list(self.cuts) != sorted(set(self.cuts)) or min(self.cuts, default=1) < 1:
            raise ValueError(
                f"cuts={list(self.cuts)}; first frames of the later shots, rising from 1"
            )

    @property
    def backdrop(self) -> tuple[int, int, int] | None:
        """Returns what colour is mixed with, as red, green, blue; None if with no one colour."""
        if self.color in ("straight", "matte"):
            return None
        red, green, blue = ImageColor.getrgb(self.color)[:3]
        return red, green, blue

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> "Decisions":
        """Reads what `as_json` wrote. Raises ValueError that names an unknown, missing or
        impossible entry."""
        value = respelled(value)
        known = {entry.name for entry in fields(cls)}
        # which older manifests lack
        wrong = sorted(value.keys() ^ known - ({"figures", "alpha_range"} - value.keys()))
        if wrong:
            raise ValueError(
                f"decisions: {', '.join(wrong)} unknown or missing; they are "
                f"{', '.join(sorted(known))}"
            )
        sequences = {
            name: None if value.get(name) is None else tuple(value[name])
            for name in ("crop", "visible", "cuts", "alpha_range")
        }
        return cls(**{**value, **sequences})

    def overridden(self, by: str, choices: Mapping[str, str]) -> "Decisions":
        """Returns the decisions with what a person chose in place of what was measured; `by` says
        where: "the table", "the command line".

        choices: field -> text. `auto` and empty leave a field as it is. colour: straight | black
        (or true) | white | matte | #rrggbb; alpha_range: false, or "16 235"; alpha_low, alpha_high:
        0..255; matte: normal | empty | full | flickers; crop: false, or "x y width height"; still:
        true | false; cuts: false, or "12 40".
        """
        changes: dict[str, Any] = {}
        for name, text in choices.items():
            text = str(text).strip().lower()
            if text not in ("", AUTO):
                changes[name] = _parse(name, text)
        if not changes:
            return self
        if "color" in changes:
            changes["confidence"] = 1.0
        said = {name: f"chosen by {by}" for name in changes if name != "confidence"}
        return replace(self, **changes, reasons={**self.reasons, **said})

    def as_json(self) -> dict[str, Any]:
        """Returns the decisions as a line of the manifest holds them: lists in place of tuples."""
        return json.loads(json.dumps(asdict(self)))


def check_choices(choices: Mapping[str, str], prefix: str = "") -> None:
    """Raises ValueError for a choice that no clip can take, before any is read. prefix: of the
    setting's name."""
    plain = Decisions(
        color="straight", confidence=1, alpha_low=0, alpha_high=255, matte="normal", crop=None,
        visible=None,
        still=False, cuts=(),
    )  # fmt: skip
    unknown = sorted(choices.keys() - set(OVERRIDES))
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]} cannot be chosen; known: {', '.join(OVERRIDES)}")
    try:
        plain.overridden("the command line", choices)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


TAKES = {
    "color": "straight, black, white, matte or a colour such as #00ff00",
    "alpha_range": 'false, or the levels that stand for 0 and 255, "16 235"',
    "alpha_low": "0 to 255", "alpha_high": "0 to 255",
    "matte": "normal, empty, full or flickers", "crop": 'false or "x y width height"',
    "still": "true or false",
    "cuts": 'false or first frames of the later shots, "12 40"',
}  # fmt: skip
OVERRIDES = ("color", "alpha_range", "alpha_low", "alpha_high", "matte", "crop", "still", "cuts")


def _parse(name: str, text: str) -> Any:
    try:
        match name:
            case "color":
                named = {"true": "black", "false": "straight"}.get(text, text)
                if named in COLORS:
                    return named
                red, green, blue = ImageColor.getrgb(named)[:3]
                return f"#{red:02x}{green:02x}{blue:02x}"
            case "alpha_range":
                return None if text == "false" else tuple(map(int, text.split()))
            case "alpha_low" | "alpha_high":
                return int(text)
            case "matte":
                return text
            case "still":
                return {"true": True, "false": False}[text]
            case "crop":
                return None if text == "false" else tuple(map(int, text.split()))
            case "cuts":
                return () if text == "false" else tuple(map(int, text.split()))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name}={text}; {TAKES[name]}, or auto for what is measured") from error
    raise ValueError(f"{name} cannot be chosen; known: {', '.join(OVERRIDES)}")
