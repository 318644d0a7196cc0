"""Measures how quickly clips are read, for commands.benchmark: what shards add to decoding, and
what a whole worker gives.

Seconds are those of the processor, all threads of this process together, so that they are per core
and other work on the machine does not count; the quickest pass stands, since that work still slows
the processor. `plain` decodes the same bytes in memory: FFV1 clips with PyAV, PNG stills with PIL,
which takes half of the time of `PyAV`. `local` reads them as training does, from tars, with checks.
`http` is the same through the cache from a server on this machine: the first pass fetches the tars,
later ones find them there. `datamodule` adds the transform and the collation.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from acetate.data.clips import ClipDataModule
from acetate.data.shards import ClipRef, index_shards, read_clip, read_media
from acetate.data.store import Remote, open_folder
from acetate.data.synthetic import KINDS, render
from acetate.data.transforms import check_frames, check_side, to_uint8
from acetate.data.writer import ShardWriter, encode_clip

STORED = {"rgba.mkv": "FFV1 clips", "rgba.png": "PNG stills"}


@dataclass(frozen=True)
class ReaderLoad:
    """The clips that are drawn and read, and how they are trained on."""

    clips: int  # FFV1; as many stills as these have frames
    frames: int  # of an FFV1 clip and of a training clip, 4k+1
    size: int  # of a square picture, a multiple of 16
    batch_size: int
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        if self.frames < 5:
            raise ValueError(f"reader.frames={self.frames}; must be at least 5, a video's.")
        check_frames("reader.frames", self.frames, time_stride=4)
        check_side("reader.size", self.size, space_multiple=16)


def benchmark_reader(load: ReaderLoad) -> dict[str, dict[str, dict[str, float]]]:
    """Returns by kind of shard and way the {clips, frames, seconds, wall_seconds} of the quickest
    pass."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a DataLoader's worker
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind, frames in (("rgba.mkv", load.frames), ("rgba.png", 1)):
                shards = Path(folder) / kind
                draw_shards(shards, load, frames)
                with serve(shards) as url:
                    results[STORED[kind]] = time_ways(shards, url, Path(folder) / "cache", load)
    finally:
        torch.set_num_threads(threads)
    return results


def draw_shards(out: Path, load: ReaderLoad, frames: int) -> None:
    clips = load.clips * load.frames // frames
    with ShardWriter(out, max_clips=clips, max_bytes=2**40, made_by={}) as writer:
        for i in tqdm(range(clips + 1), desc=f"draw {out.name}", unit="clip"):
            clip = render(KINDS[i % len(KINDS)], load.seed + i, frames, load.size, load.size)
            pixels = to_uint8(clip.rgb, clip.alpha).numpy()
            encoded = encode_clip(pixels * (pixels[..., 3:] > 0), fps=16)
            split = "train" if i < clips else "val"
            writer.add(f"clip{i:06d}", encoded, split=split, prompt=clip.prompt, source="",
                licence="", lossy=False,
                       premultiplied_source=False)  # fmt: skip


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Yields the URL of a server in its own process, so that its work is not ours."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().split(' port ')[1].split()[0]}"
    finally:
        server.kill()
        server.wait()


def time_ways(shards: Path, url: str, cache: Path, load: ReaderLoad) -> dict[str, dict[str, float]]:
    local = train_clips(index_shards([shards]))
    data, still = [read_media(ref) for ref in local], local[0].kind == "rgba.png"
    training = batches_of(shards, load)
    passes: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in tqdm(range(load.repeats), desc=f"read {shards.name}", unit="pass"):
        remote = train_clips(
            index_shards([open_folder(url, Remote(cache_dir=cache / f"{shards.name}{turn}"))])
        )
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda: [decode_png(one) if still else decode_with_av(one) for one in data],
            **({"PyAV": lambda: [decode_with_av(one) for one in data]} if still else {}),
            "local": lambda: [read_clip(ref) for ref in local],
            "http, first": lambda remote=remote: [read_clip(ref) for ref in remote],
            "http, cached": lambda remote=remote: [read_clip(ref) for ref in remote],
            "datamodule": lambda: [
                next(training) for _ in range(-(-load.clips // load.batch_size))
            ],
        }
        for way, read in ways.items():
            seconds, wall = time.process_time(), time.perf_counter()
            read()
            seconds, wall = time.process_time() - seconds, time.perf_counter() - wall
            passes[way].append({"seconds": seconds, "wall_seconds": wall})
    trained = -(-load.clips // load.batch_size) * load.batch_size
    counts = {
        way: {"clips": len(local), "frames": sum(ref.frames for ref in local)} for way in passes
    }
    counts["datamodule"] = {"clips": trained, "frames": trained * load.frames}
    return {
        way: {
            **counts[way],
            **{name: min(one[name] for one in passes[way]) for name in ("seconds", "wall_seconds")},
        }
        for way in passes
    }


def train_clips(refs: Sequence[ClipRef]) -> list[ClipRef]:
    return [ref for ref in refs if ref.split == "train"]


def decode_png(data: bytes) -> Any:
    """Decodes a PNG with the least work that gives RGBA frames (1, H, W, 4)."""
    return np.array(Image.open(io.BytesIO(data)))[None]


def decode_with_av(data: bytes) -> Any:
    """Decodes a video with the least work that gives RGBA frames (T, H, W, 4)."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgba") for frame in container.decode(video=0)])


def batches_of(shards: Path, load: ReaderLoad) -> Iterator[dict[str, Any]]:
    """Yields batches of a worker, every clip decoded anew."""
    module = ClipDataModule(
        shards=str(shards),
        frames=load.frames,
        height=load.size,
        width=load.size,
        batch_size=load.batch_size,
        seed=load.seed,
        num_workers=0,
        val_batch_size=1,
        val_clips=1,
        bad_clip_budget=0,
        cache_mb=0,
    )
    module.setup()
    return iter(module.train_dataloader())


def rows_of(results: dict[str, dict[str, dict[str, float]]]) -> Iterator[tuple[str, ...]]:
    """Yields shard, way, clips/s and frames/s of a core, clips/s by the clock, and seconds over
    those of `plain`."""
    for kind, ways in results.items():
        for way, one in ways.items():
            clip = one["seconds"] / one["clips"]
            plain = ways["plain"]["seconds"] / ways["plain"]["clips"]
            rates = (1 / clip, one["frames"] / one["seconds"], one["clips"] / one["wall_seconds"])
            yield kind, way, *(f"{rate:.1f}" for rate in rates), f"{clip / plain:.2f}"
