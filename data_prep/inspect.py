"""Shows what clip shards hold: a table, and one HTML page with contact sheets that needs nothing
else."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.data.shards import BadClip, ClipRef, index_shards, read_clip, read_manifest, read_meta
from acetate.data.store import listed
from acetate.data.transforms import check_frames
from acetate.draws import stable_hash
from acetate.models.wan import Geometry
from acetate.replacing import check_out, written
from data_prep.bad_clips import print_bad
from data_prep.examine import said_of_names
from data_prep.executor import progress
from data_prep.folders import DECISIONS
from data_prep.journal import read_journal
from data_prep.latent_plan import Piece, bucket_sizes, check_area, plan
from data_prep.report import Bucket, Entry, Picture, Report, render

WEBP_SIDE = 16383  # pixels, the format's limit


def inspect(
    *,
    shards: Sequence[Path],
    sample: int,
    seed: int,
    frames: int,
    side: int,
    vae: str,
    lengths: Sequence[int],
    area: int,
    max_aspect: float,
    executor: str,
    workers: int,
) -> Report:
    """Describes every clip, with pictures and alpha of `sample` clips that the seed draws.

    frames, side: of a clip's pictures, their longest side in pixels. vae, lengths, area,
    max_aspect: what data_prep.cache_latents would sort the clips by. Clips that cannot be read are
    listed beside those that the shards' own manifests name.
    """
    if frames * side > WEBP_SIDE:
        raise ValueError(
            f"frames={frames}, side={side}; side by side they must not pass {WEBP_SIDE} pixels"
        )
    refs = index_shards(shards)
    pieces = pieces_of(refs, vae, lengths, area, max_aspect)
    manifests = [read_manifest(folder) for folder in shards]
    decided = {key: why for folder in shards for key, why in decisions_of(folder).items()}
    skipped = {
        key: reason for manifest in manifests for key, reason in manifest.get("skipped", {}).items()
    }
    chosen = sorted(refs, key=lambda ref: (stable_hash("inspect", seed, ref.key), ref.key))[:sample]
    draw = partial(picture, frames=frames, side=side)
    settings = {"executor": executor, "workers": workers, "name": attrgetter("name")}
    with progress(draw, chosen, desc="pictures", **settings) as results:
        drawn = {ref.key: made for ref, made in results}
    skipped |= {key: made.reason for key, made in drawn.items() if isinstance(made, BadClip)}
    pictures = {key: made for key, made in drawn.items() if isinstance(made, Picture)}
    entries = []
    for ref in tqdm(refs, unit="clip", desc="descriptions"):
        if ref.key in skipped:
            continue
        try:
            meta = read_meta(ref)
            entries.append(describe(ref, meta, pictures.get(ref.key), decided.get(ref.key, {})))
        except BadClip as bad:
            skipped[ref.key] = bad.reason
    return Report(
        title=", ".join(map(str, shards)),
        made_by="made by " + " and ".join(dict.fromkeys(map(command_of, manifests))),
        stored=sum(shard["bytes"] for manifest in manifests for shard in manifest["shards"]),
        entries=entries,
        buckets=buckets_of([piece for piece in pieces if piece.ref.key not in skipped]),
        pixels_at_most=area,
        seed=seed,
        skipped=dict(sorted(skipped.items())),
    )


def pieces_of(
    refs: Sequence[ClipRef], vae: str, lengths: Sequence[int], area: int, max_aspect: float
) -> list[Piece]:
    """Returns the windows that data_prep.cache_latents would cut. Raises ValueError for what it
    would refuse."""
    from acetate.blank import blank_vae  # seconds, for buckets alone

    geometry = Geometry.of(blank_vae(vae))
    for length in lengths:
        check_frames("lengths", length, geometry.time_stride)
    check_area(refs, area)
    return plan(
        refs, lengths, bucket_sizes(area, max_aspect, 2 * geometry.space_stride), variants=1
    )


def buckets_of(pieces: Sequence[Piece]) -> dict[tuple[int, int, int], Bucket]:
    found: dict[tuple[int, int, int], list[Piece]] = {}
    for piece in pieces:
        found.setdefault((piece.frames, piece.height, piece.width), []).append(piece)
    return {size: bucket_of(mine) for size, mine in found.items()}


def bucket_of(pieces: Sequence[Piece]) -> Bucket:
    """Describes a bucket. pieces: all windows of it."""
    clips = {piece.ref.key: piece for piece in pieces}.values()
    larger = [piece.enlarged for piece in clips if piece.enlarged > 1]
    short = [piece.ref.frames for piece in clips if piece.ref.frames < piece.frames]
    return Bucket(
        windows=len(pieces),
        clips=len(clips),
        enlarged=len(larger),
        most_enlarged=max(larger, default=1.0),
        looped=sum(frames > 1 for frames in short),
        held=short.count(1),
    )


def command_of(manifest: Mapping[str, Any]) -> str:
    """Returns the command that made shards, as a user types it."""
    command = str(manifest["made_by"].get("command", "an unknown command"))
    return command.replace("data_prep.", "acetate prep ")


def decisions_of(folder: Path) -> dict[str, dict[str, str]]:
    """Returns key of each clip -> what was decided about its source, as data_prep.shard noted
    beside the shards; nothing where it did not make them."""
    found = {}
    for line in read_journal(folder / DECISIONS):
        reasons = line.get("decisions", {}).get("reasons", {})
        said = {"color": reasons["color"]} if "color" in reasons else {}
        said |= {"read": "; ".join(line["notes"])} if line.get("notes") else {}
        found |= dict.fromkeys(line.get("pieces", ()), said)
    return found


def describe(
    ref: ClipRef, meta: Mapping[str, Any], shown: Picture | None, decided: Mapping[str, str]
) -> Entry:
    """Describes a clip. decided: of its source, where the clip's own JSON says what was done to
    it."""
    return Entry(
        key=ref.key,
        split=ref.split,
        frames=ref.frames,
        width=ref.width,
        height=ref.height,
        fps=float(meta.get("fps", 0)),
        prompt=meta["prompt"],
        licence=str(meta.get("licence", "unknown")),
        source=str(meta.get("source", "unknown")),
        picture=shown,
        decided={**decided, **meta.get("done", {})},
    )


def picture(ref: ClipRef, *, frames: int, side: int) -> Picture | BadClip:
    """Returns `frames` of the clip, evenly spread, and the alpha of all of them."""
    try:
        clip = read_clip(ref).frames
    except BadClip as bad:
        return bad
    counts = np.bincount(clip[..., 3].reshape(-1), minlength=256)
    places = np.unique(np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int))
    tiles = [small(clip[place], side) for place in places]
    strip = Image.new("RGBA", (len(tiles) * tiles[0].width, tiles[0].height))
    for i, tile in enumerate(tiles):
        strip.paste(tile, (i * tile.width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=82, alpha_quality=95)
    return Picture(buffer.getvalue(), len(tiles), tuple((counts / counts.sum()).tolist()))


def small(frame: NDArray[np.uint8], side: int) -> Image.Image:
    """Scales a frame down, premultiplied, as PIL does with RGBA; small frames stay as they are."""
    image = Image.fromarray(frame)
    scale = min(1.0, side / max(image.size))
    return image.resize(
        [max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS
    )


def print_summary(console: Console, report: Report) -> None:
    entries = report.entries
    console.print(f"{report.title}, {report.made_by}", soft_wrap=True)
    table = Table("split", "clips", "stills", "frames", "prompts", "empty", "semi", "opaque")
    for split in ("train", "val"):
        mine = [entry for entry in entries if entry.split == split]
        shares = np.mean(
            [entry.picture.shares for entry in mine if entry.picture] or [[np.nan] * 3], axis=0
        )
        numbers = (
            len(mine),
            sum(entry.frames == 1 for entry in mine),
            sum(entry.frames for entry in mine),
        )
        prompts = len({entry.prompt for entry in mine})
        table.add_row(
            split, *map(str, (*numbers, prompts)), *(f"{100 * share:.1f} %" for share in shares)
        )
    console.print(table)
    shown = len(report.pictured)
    if shown < len(entries):
        console.print(f"Alpha is of a sample of {shown} clips, seed {report.seed}.")
    table = Table("frames x height x width", "windows", "clips", "of these")
    order = sorted(report.buckets.items(), key=lambda item: -item[1].windows)
    for size, bucket in order[:8]:
        table.add_row("x".join(map(str, size)), str(bucket.windows), str(bucket.clips), bucket.said)
    if len(order) > 8:
        table.add_row(
            f"{len(order) - 8} more", str(sum(bucket.windows for _, bucket in order[8:])), "", ""
        )
    console.print(table)
    for title, counts in (
        ("size (width x height)", Counter(f"{entry.width}x{entry.height}" for entry in entries)),
        ("licence", Counter(entry.licence for entry in entries)),
    ):
        table = Table(title, "clips")
        for name, count in counts.most_common(8):
            table.add_row(name, str(count))
        if len(counts) > 8:
            table.add_row(
                f"{len(counts) - 8} more", str(sum(n for _, n in counts.most_common()[8:]))
            )
        console.print(table)
    if said := said_of_names([entry.prompt for entry in entries]):
        console.print(said, soft_wrap=True)
    print_bad(console, report.skipped, None)


def main(cfg: DictConfig) -> None:
    if cfg.out and not cfg.preview:
        check_out(Path(cfg.out))
    own: Any = OmegaConf.to_container(cfg, resolve=True)
    same = (
        "sample", "seed", "frames", "side", "lengths", "area", "max_aspect", "executor", "workers",
    )  # fmt: skip
    shards = [Path(folder) for folder in listed(cfg.shards)]
    report = inspect(shards=shards, vae=cfg.wan.vae, **{name: own[name] for name in same})
    console = Console(markup=False, highlight=False)
    print_summary(console, report)
    if cfg.preview or not cfg.out:
        return
    out = Path(cfg.out)
    with written(out) as file:
        file.write(render(report))
    console.print(
        f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {len(report.pictured)} clips with pictures"
    )


if __name__ == "__main__":
    run("prep inspect")
