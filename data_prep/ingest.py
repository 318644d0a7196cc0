"""Finds RGBA material in a folder and writes one JSON line per clip: its files, its size, what it shows."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from acetate.data.shards import KEY
from acetate.video_io import (
    IMAGES,
    OPAQUE_IMAGES,
    VIDEOS,
    Description,
    MediaError,
    Rect,
    describe,
    sequence_files,
)

CONF = str(Path(__file__).parents[1] / "conf")
MEDIA = IMAGES + OPAQUE_IMAGES + VIDEOS
# What tells one form of a clip from another; the rest is the clip's name.
FORM = re.compile(r"^variant_|[_\-.](fgr|pha|seq|rgba|prores\w*|vp[89]\w*|ffv1)$", re.IGNORECASE)
Notes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """One line of the manifest. files: one, or colour and alpha of a pair. The rectangles are of a packed video."""

    key: str
    kind: Literal["still", "sequence", "video", "pair", "packed"]
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
    premultiplied: bool | None  # None: the format does not say, data_prep.shard measures it
    colour_rect: Rect | None
    alpha_rect: Rect | None


class TooManyBad(RuntimeError):
    """More bad clips than the budget allows."""


def ingest(*, source: Path, out: Path, bad_clip_budget: int) -> tuple[list[Found], dict[str, str]]:
    """Writes `out` (JSON lines); returns the clips, and key -> reason of the bad ones.

    Raises FileNotFoundError without a source and TooManyBad past the budget, which writes nothing.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"source={source} is not a folder; name the folder that holds the media.")
    rows, origins = read_tables(source), read_origins(source)
    clips: dict[str, Found] = {}
    bad: dict[str, str] = {}
    for files in tqdm(list(candidates(source, rows)), unit="clip"):
        key = clip_key(source, files[0], clips.keys() | bad.keys())
        try:
            clips[key] = examine(source, files, key, rows, origins)
        except MediaError as error:
            bad[key] = str(error)
    check_budget(bad, bad_clip_budget)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    lines = [json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips.values()]
    temporary.write_text("".join(lines))
    temporary.replace(out)
    return list(clips.values()), bad


def check_budget(bad: dict[str, str], bad_clip_budget: int) -> None:
    """TooManyBad with the first keys and reasons."""
    if len(bad) > bad_clip_budget:
        first = "; ".join(f"{key}: {reason}" for key, reason in list(bad.items())[:3])
        raise TooManyBad(
            f"{len(bad)} bad clips, bad_clip_budget={bad_clip_budget}: {first}. Repair them, move them away or "
            "raise bad_clip_budget."
        )


def read_tables(source: Path) -> Notes:
    """Rows of the .csv and .jsonl files at the top of the folder, by the file that they describe.

    Columns: `file` (or path, name), relative to the folder; prompt (or caption, text), licence (or license),
    source, group, premultiplied; all but the first may be missing.
    """
    rows: Notes = {}
    for table in sorted([*source.glob("*.csv"), *source.glob("*.jsonl")]):
        with open(table, newline="", encoding="utf-8-sig") as file:
            found = list(csv.DictReader(file)) if table.suffix == ".csv" else list(map(json.loads, file))
        for row in found:
            name = column(row, "file", "path", "name")
            if name:
                rows[name.rstrip("/")] = row
    return rows


def read_origins(source: Path) -> Notes:
    """Entries of the .json files at the top of the folder, by the name of the clip that they describe.

    An entry may give rgb_rect, alpha_rect (x, y, width, height) and packed_size of a packed video, and source and
    path of the file that the clip was cut from.
    """
    entries: Notes = {}
    for path in sorted(source.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            entries |= {name: entry for name, entry in content.items() if isinstance(entry, dict)}
    return entries


def candidates(source: Path, rows: Notes) -> Iterator[list[Path]]:
    """The files of each clip in the order of their names: [one] or [colour, alpha]."""
    for folder in [source, *sorted(path for path in source.rglob("*") if path.is_dir())]:
        inside = folder.relative_to(source)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if inside.parts and is_sequence(source, folder, rows):
            paths = [folder]
        else:
            paths = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in MEDIA]
        for path in paths:
            if path.stem.endswith("_pha") and partners(path, "_pha", "_fgr"):
                continue  # comes with its colour
            if not path.name.startswith("."):
                yield [path, *partners(path, "_fgr", "_pha")[:1]] if path.stem.endswith("_fgr") else [path]


def is_sequence(source: Path, folder: Path, rows: Notes) -> bool:
    """Whether a folder's images are frames: a table lists the folder, or they count up and have one size."""
    if str(folder.relative_to(source)) in rows:
        return True
    images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES + OPAQUE_IMAGES]
    if len(images) < 2 or any(str(path.relative_to(source)) in rows for path in images):
        return False
    names = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in sequence_files(folder)]
    numbers = [int(name[2]) for name in names if name]
    if len({name and name[1] for name in names}) > 1 or numbers != [numbers[0] + i for i in range(len(names))]:
        return False
    try:
        return len({(header.width, header.height) for header in map(describe, images)}) == 1
    except MediaError:
        return False


def partners(path: Path, ending: str, other: str) -> list[Path]:
    """NAME_pha.* of NAME_fgr.*, or the other way round."""
    stem = path.stem.removesuffix(ending) + other
    return sorted(p for p in path.parent.iterdir() if p.stem == stem and (p.is_dir() or p.suffix.lower() in MEDIA))


def clip_key(source: Path, path: Path, taken: set[str]) -> str:
    """The path with dashes; with a hash where that is too long, not plain ASCII or taken."""
    inside = path.relative_to(source)
    name = "-".join((*inside.parent.parts, inside.stem.removesuffix("_fgr")))
    plain = re.sub(r"[^A-Za-z0-9_\-]+", "_", name)
    if plain == name and KEY.fullmatch(name) and name not in taken:
        return name
    return f"{plain[:70]}-{hashlib.sha256(str(inside).encode()).hexdigest()[:8]}"


def examine(source: Path, files: list[Path], key: str, rows: Notes, origins: Notes) -> Found:
    """The manifest's line of a clip; MediaError with the reason if it cannot become one."""
    path = files[0]
    name = FORM.sub("", path.stem)
    origin = origins.get(name, {})
    row = next((rows[str(p.relative_to(source))] for p in files if str(p.relative_to(source)) in rows), {})
    header = describe(path)
    colour_rect, alpha_rect = None, None
    if path.stem.endswith("_fgr"):
        kind, header = "pair", check_pair(files, header)
    elif header.alpha:
        kind = "sequence" if path.is_dir() else "still" if header.frames == 1 else "video"
    elif "alpha_rect" in origin:
        kind, header = "packed", check_packed(path, header, origin)
        colour_rect, alpha_rect = tuple(origin["rgb_rect"]), tuple(origin["alpha_rect"])
    else:
        raise MediaError(
            f"{path} has no alpha: it is neither RGBA nor one of NAME_fgr + NAME_pha, and no .json gives rectangles"
        )
    if header.frames < 1:
        raise MediaError(f"{path} has no frame; it is empty or damaged")
    # PNG and WebP are straight by definition; a video's format does not say.
    straight = kind in ("still", "sequence") or (kind == "video" and path.suffix.lower() in IMAGES)
    declared = column(row, "premultiplied").lower()
    cut_from = f"{origin.get('source', '')}/{origin['path']}" if "path" in origin else ""
    return Found(
        key=key,
        kind=kind,
        files=[str(file.resolve()) for file in files],
        frames=header.frames,
        width=header.width,
        height=header.height,
        fps=header.fps,
        prompt=sidecar(path) or column(row, "prompt", "caption", "text") or prompt_from_name(name),
        licence=column(row, "licence", "license") or "unknown",
        source=column(row, "source") or "unknown",
        group=column(row, "group") or cut_from or name,
        lossy=header.lossy,
        premultiplied=declared in ("1", "true", "yes") if declared else False if straight else None,
        colour_rect=colour_rect,
        alpha_rect=alpha_rect,
    )


def check_pair(files: list[Path], colour: Description) -> Description:
    """The pair's description; MediaError if its alpha is missing or of another length or size."""
    if len(files) < 2:
        raise MediaError(f"{files[0]} has no partner {files[0].stem.removesuffix('_fgr')}_pha.*")
    alpha = describe(files[1])
    names = [file.name for file in files]
    if alpha.frames != colour.frames:
        raise MediaError(f"{names[0]} has {colour.frames} frames, {names[1]} {alpha.frames}; cut the longer one")
    if (alpha.width, alpha.height) != (colour.width, colour.height):
        sizes = [f"{half.width}x{half.height}" for half in (colour, alpha)]
        raise MediaError(f"{names[0]} is {sizes[0]}, {names[1]} {sizes[1]}; scale one of them")
    return replace(colour, lossy=colour.lossy or alpha.lossy)


def check_packed(path: Path, header: Description, origin: dict[str, Any]) -> Description:
    """The description of the colour's rectangle; MediaError if the rectangles are for another size."""
    size = tuple(origin.get("packed_size", (header.width, header.height)))
    if size != (header.width, header.height):
        raise MediaError(f"{path} is {header.width}x{header.height}, its rectangles are for {size[0]}x{size[1]}")
    return replace(header, width=origin["rgb_rect"][2], height=origin["rgb_rect"][3])


def sidecar(path: Path) -> str:
    """NAME.txt beside the clip, for a pair also without _fgr."""
    for stem in (path.stem, path.stem.removesuffix("_fgr")):
        text = path.with_name(stem + ".txt")
        if text.is_file():
            return text.read_text().strip()
    return ""


def prompt_from_name(name: str) -> str:
    """Words of a file name, without numbers and hashes where something else is left."""
    words = re.split(r"[\W_]+", name)
    telling = [word for word in words if word.isalpha() and len(word) > 1]
    return f"Transparent background: {' '.join(telling or words)}"


def column(row: dict[str, Any], *names: str) -> str:
    return next((str(row[name]).strip() for name in names if row.get(name) not in (None, "")), "")


def print_bad(console: Console, bad: dict[str, str]) -> None:
    for key, reason in bad.items():
        console.print(f"[red]skipped[/] {key}: {reason}", highlight=False, soft_wrap=True)


@hydra.main(version_base=None, config_path=CONF, config_name="prep/ingest")
def main(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    clips, bad = ingest(source=Path(cfg.source), out=out, bad_clip_budget=cfg.bad_clip_budget)
    console = Console()
    table = Table("kind", "clips", "frames")
    frames = Counter[str]()
    for clip in clips:
        frames[clip.kind] += clip.frames
    for kind, count in Counter(clip.kind for clip in clips).most_common():
        table.add_row(kind, str(count), str(frames[kind]))
    console.print(f"{out}: {len(clips)} clips, {len(bad)} skipped", highlight=False, soft_wrap=True)
    console.print(table)
    print_bad(console, bad)


if __name__ == "__main__":
    main()
