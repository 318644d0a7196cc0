"""Animations in the data of free games: sheets with their descriptions, and numbered frames."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acetate.replacing import writing
from data_prep.sequences import Run, find_runs

DEFAULT_MS = 100  # of a frame whose game says nothing of its time
FRAME = re.compile(r"frame=(\d+),(\d+)((?:,-?\d+){6})")
# A place in a sheet: x, y, width, height, and where in the clip's frame it goes: x, y
Place = tuple[int, int, int, int, int, int]
Rgba = NDArray[np.uint8]


@dataclass(frozen=True)
class Sprite:
    """One clip. files: one for each frame, or a single sheet with `places`, (width, height) being
    the clip's. opacity: how much of its alpha hides what lies behind; below 1 the rest is light."""

    name: str
    group: str
    shows: str
    files: tuple[Path, ...]
    ms: int  # a frame
    places: tuple[Place, ...] = ()
    size: tuple[int, int] = (0, 0)
    opacity: float = 1.0
    order: tuple[int, ...] = field(default=())  # of frames, where they are not shown in turn

    def frames(self) -> list[Rgba]:
        """Reads the frames, (H, W, 4) each. Raises OSError or ValueError for pictures that cannot
        be read."""
        if self.places:
            found = [self._cut(read(self.files[0]), place) for place in self.places]
        else:
            found = [read(path) for path in self.files]
            high, wide = (max(frame.shape[axis] for frame in found) for axis in (0, 1))
            found = [centred(frame, high, wide) for frame in found]
        if self.opacity < 1:
            found = [with_light(frame, self.opacity) for frame in found]
        return [found[i] for i in self.order] if self.order else found

    def _cut(self, sheet: Rgba, place: Place) -> Rgba:
        x, y, width, height, left, top = place
        if x < 0 or y < 0 or y + height > sheet.shape[0] or x + width > sheet.shape[1]:
            raise ValueError(f"{width}x{height} at {x}, {y} lies outside of the sheet")
        frame = np.zeros((self.size[1], self.size[0], 4), np.uint8)
        frame[top : top + height, left : left + width] = sheet[y : y + height, x : x + width]
        return frame


@lru_cache(maxsize=2)  # the clips of one sheet come one after the other
def read(path: Path) -> Rgba:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGBA"))


def centred(frame: Rgba, high: int, wide: int) -> Rgba:
    top, left = (high - frame.shape[0]) // 2, (wide - frame.shape[1]) // 2
    full = np.zeros((high, wide, 4), np.uint8)
    full[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return full


def with_light(frame: Rgba, opacity: float) -> Rgba:
    """Returns a sprite that is added to what lies behind it, background (1 - opacity alpha) + alpha
    rgb, as straight colour and the least alpha that can hold it: over black nothing changes."""
    unit = frame.astype(np.float32) / 255
    light = unit[..., :3] * unit[..., 3:]
    alpha = np.maximum(opacity * unit[..., 3], light.max(axis=-1))[..., None]
    color = np.divide(light, alpha, out=np.zeros_like(light), where=alpha > 0)
    return np.rint(255 * np.concatenate([color, alpha], axis=-1)).astype(np.uint8)


def write_animation(frames: Sequence[Rgba], ms: int, path: Path) -> None:
    """Writes an APNG, or a PNG of one frame, whole or not at all."""
    first, *rest = map(Image.fromarray, frames)
    temporary = path.with_name(path.name + ".tmp")
    more: dict[str, Any] = {"append_images": rest, "duration": ms} if rest else {}
    with writing(path):
        first.save(temporary, "PNG", save_all=bool(rest), **more)
        temporary.replace(path)


def flare(root: Path) -> Iterator[Sprite]:
    """Yields the clips of mods/*/animations: one for each animation and direction of its sheet."""
    for text in sorted(root.glob("mods/*/animations/**/*.txt")):
        if "avatar" in text.parts:
            continue  # clothes without anybody in them
        head, *parts = re.split(r"^\[(\w+)\]\s*$", text.read_text(errors="replace"), flags=re.M)
        said = settings_of(head)
        sheet = next(
            (p for mod in sorted((root / "mods").iterdir()) if (p := mod / said.get("image", "-"))
             .is_file()), None,
        )  # fmt: skip
        if sheet is None:
            continue
        what = " ".join(text.stem.split("_"))
        light = {**said, **settings_of("".join(parts))}.get("blend_mode") == "add"
        for action, body in zip(parts[::2], parts[1::2], strict=True):
            shows = what if text.parent.name in ("powers", "loot") else f"{what}, {action}"
            yield from _of_sheet(
                Sprite(
                    f"flare-{text.parent.name}-{text.stem}-{action}",
                    f"flare {sheet.parent.name} {re.split('[_0-9]', sheet.stem)[0]}",
                    f"{shows}, {text.parent.name} of a fantasy game",
                    (sheet,),
                    0,
                    opacity=0.0 if light else 1.0,
                ),
                body,
            )


def _of_sheet(sprite: Sprite, body: str) -> Iterator[Sprite]:
    """Yields a clip for each direction that the body of an animation tells the frames of; none of
    one that is not packed in rectangles."""
    said = settings_of(body)
    count = int(said.get("frames", 0))
    rows = [
        (int(index), int(way), tuple(map(int, numbers[1:].split(","))))
        for index, way, numbers in FRAME.findall(body)
    ]
    if not count or not rows:
        return
    left, top = (max(place[i] for *_, place in rows) for i in (4, 5))
    wide = left + max(place[2] - place[4] for *_, place in rows)
    high = top + max(place[3] - place[5] for *_, place in rows)
    if wide < 1 or high < 1:
        return
    number, unit = re.fullmatch(r"(\d+)(ms|s)?", said.get("duration", "0")).groups()
    there = range(count)
    order = (*there, *reversed(there[1:-1])) if said.get("type") == "back_forth" else (*there,)
    whole = int(number) * (1000 if unit == "s" else 1)
    ms = max(20, round(whole / len(order))) if whole else DEFAULT_MS
    for way in sorted({way for _, way, _ in rows}):
        places = {
            index: (x, y, w, h, left - ox, top - oy)
            for index, to, (x, y, w, h, ox, oy) in rows
            if to == way
        }
        if places.keys() == set(there):
            yield Sprite(
                f"{sprite.name}-{way}",
                sprite.group,
                sprite.shows,
                sprite.files,
                ms,
                tuple(places[i] for i in there),
                (wide, high),
                sprite.opacity,
                order,
            )


def settings_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*?)\s*$", text, re.M))


def endless_sky(root: Path) -> Iterator[Sprite]:
    """Yields the clips of images: NAME-0.png is a picture, NAME~0.png adds three quarters of its
    light, NAME+0.png all of it; data names the effects and says how fast they are."""
    told = _effects(root)
    for run in runs_below(root / "images"):
        inside = run.pattern.relative_to(root / "images")
        name = inside.as_posix().partition("*")[0]
        what, rate = told.get(name[:-1], ("", 0.0))
        words = " ".join([*reversed(Path(name[:-1]).parts[1:])])
        thing = re.split("[ /]", name[:-1])
        yield Sprite(
            "endless-sky-" + re.sub(r"\W+", "-", name[:-1]),
            f"endless-sky {' '.join(thing[:2])}",
            f"{what or words}, {inside.parts[0]} of a space game",
            run.files,
            max(20, round(1000 / rate)) if rate else DEFAULT_MS,
            opacity={"~": 0.25, "+": 0.0}.get(name[-1], 1.0),
        )


def _effects(root: Path) -> dict[str, tuple[str, float]]:
    """Returns sprite -> what has it, and its frames a second, 0 where that is not said."""
    told, what, sprite = dict[str, tuple[str, float]](), "", ""
    for path in sorted(root.glob("data/*.txt")):
        for line in path.read_text(errors="replace").splitlines():
            name, value = (re.findall(r'"[^"]*"|\S+', line) + ["", ""])[:2]
            name, value = name.strip('"'), value.strip('"')
            if line[:1].strip():
                what, sprite = value if name in ("effect", "outfit", "ship") else "", ""
            elif name in ("sprite", "flare sprite"):
                sprite = value
                told.setdefault(sprite, (what.lower(), 0.0))
            elif name == "frame rate" and sprite and re.fullmatch(r"[\d.]+", value):
                told[sprite] = (told[sprite][0], float(value))
    return told


def wesnoth(root: Path) -> Iterator[Sprite]:
    """Yields the clips of data/**/images: numbered frames of units, halos and projectiles; units'
    descriptions say their names and how long a frame lasts."""
    names, times = dict[str, str](), dict[str, int]()
    for path in sorted(root.glob("*/data/**/*.cfg")):
        text = path.read_text(errors="replace")
        for name, picture in re.findall(
            r'^    name= *_ *"([^"]+)"[\s\S]*?^    image="([^"~]+)\.png', text, re.M
        ):
            names.setdefault(picture, name)
        for picture, ms in re.findall(r"([\w/.-]+?)-?\[[^\]]*\]\.png:\[?(\d+)", text):
            times.setdefault(picture, int(ms))
    for images in sorted(root.glob("*/data/**/images")):
        for kind in ("units", "halo", "projectiles"):
            for run in runs_below(images / kind):
                yield _of_wesnoth(run, images, names, times)


def _of_wesnoth(run: Run, images: Path, names: dict[str, str], times: dict[str, int]) -> Sprite:
    inside = run.pattern.relative_to(images)
    stem = inside.as_posix().partition("*")[0].rstrip("-")
    unit = next((names[n] for n in starts(stem) if n in names), "")
    action = " ".join(re.split("[-_]", Path(stem).name))
    # a unit's clips, those of its halo, or of one projectile
    group = next((n for n in starts(stem) if n in names), stem.split("-")[0])
    return Sprite(
        "wesnoth-" + re.sub(r"\W+", "-", f"{images.parent.name}-{stem}"),
        f"wesnoth {group}",
        ", ".join(filter(None, [unit, action, f"{inside.parts[0]} of a fantasy game"])),
        run.files,
        times.get(stem, DEFAULT_MS),
    )


def starts(stem: str) -> Iterator[str]:
    """Yields the name and its beginnings at dashes, longest first."""
    while stem:
        yield stem
        stem = stem.rpartition("-")[0]


def runs_below(folder: Path) -> Iterator[Run]:
    """Yields the numbered pictures of each folder below that count up without a gap."""
    for path in sorted([folder, *folder.rglob("*/")]):
        images = sorted(path.glob("*.png")) if path.is_dir() else []
        for run in find_runs(images):
            count = len(run.numbers)
            if len(set(run.numbers)) == count == run.numbers[-1] - run.numbers[0] + 1:
                yield run


READERS = {"flare": flare, "endless-sky": endless_sky, "wesnoth": wesnoth}
