"""Truncated, bit-flipped and mislabelled files: each is refused with a reason or ingested; nothing
crashes or hangs.

ACETATE_FUZZ=500 makes that many; the seed is fixed.
"""

import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.examine import Settings
from data_prep.ingest import ingest
from tests.media.films import card, write

FILES = int(os.environ.get("ACETATE_FUZZ", "60"))
SECONDS = 10


def originals(folder):
    """A small valid file of every format, except those that only some machines can write."""
    folder.mkdir()
    frames = card(4, 24, 32)
    frames[np.arange(4), np.arange(4), :, 3] = 200
    images = [Image.fromarray(frame) for frame in frames]
    more = {"save_all": True, "append_images": images[1:], "duration": 50}
    images[0].save(folder / "a.png")
    images[0].save(folder / "b.webp")
    images[0].save(folder / "c.tif", compression="tiff_lzw")
    images[0].save(folder / "d.apng", format="PNG", **more)
    images[0].save(folder / "e.webp", lossless=True, **more)
    images[0].save(folder / "f.gif", disposal=2, **more)
    images[0].save(folder / "g.avif")
    for name, codec, pixels in (
        ("h.png", "png", "rgba64be"), ("i.tif", "tiff", "rgba64le"), ("j.exr", "exr", "gbrapf32le"),
    ):  # fmt: skip
        context = av.CodecContext.create(codec, "w")
        context.width, context.height, context.pix_fmt, context.time_base = (
            32,
            24,
            pixels,
            Fraction(1),
        )
        frame = av.VideoFrame.from_ndarray(frames[0], format="rgba").reformat(format=pixels)
        (folder / name).write_bytes(
            b"".join(map(bytes, context.encode(frame) + context.encode(None)))
        )
    write(folder / "k.mov", frames, "prores_ks", "yuva444p10le")
    write(folder / "l.mov", frames, "qtrle", "argb")
    write(folder / "m.webm", frames, "libvpx-vp9", "yuva420p")
    write(folder / "n.mkv", frames, "ffv1", "bgra")
    write(folder / "o.avi", frames, "utvideo", "gbrap")
    packed = np.concatenate((frames[..., :3], frames[..., 3:].repeat(3, -1)), axis=2)
    write(folder / "p.mp4", packed, "libx264", "yuv420p")
    return sorted(folder.iterdir())


def damaged(data, other, random):
    kind = random.integers(4)
    if kind == 0:
        return data[: random.integers(len(data))]
    if kind == 1:
        return other  # under this one's name
    broken = np.frombuffer(data, np.uint8).copy()
    if kind == 2:
        places = random.integers(0, len(broken), 1 + len(broken) // 500)
        broken[places] ^= (1 << random.integers(0, 8, len(places))).astype(np.uint8)
    else:  # headers lie
        places = random.integers(0, min(len(broken), 200), 4)
        broken[places] = random.integers(0, 256, 4)
    return broken.tobytes()


def ingested(folder, out):
    """What `ingest` says of the files, and the most memory, in KiB, that one of its workers
    held."""
    result = ingest(
        source=folder, out=out, bad_clip_budget=FILES, workers=2,
        settings=Settings(memory_gb=2, seconds=SECONDS, max_pixels=2**24, max_frames=2000),
    )  # fmt: skip
    return result, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


@pytest.mark.slow
@pytest.mark.long
def test_damaged_files_are_refused_or_ingested(tmp_path):
    good = originals(tmp_path / "good")
    bodies = [path.read_bytes() for path in good]
    random = np.random.default_rng(0)
    folder = tmp_path / "bad"
    folder.mkdir()
    for i in range(FILES):
        which, other = i % len(good), random.integers(len(good))
        name = f"{i:03d}_{good[which].name}"
        (folder / name).write_bytes(damaged(bodies[which], bodies[other], random))
    # In a process of its own: the peak is that of all children a process ever had
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        result, peak = process.submit(ingested, folder, tmp_path / "found.jsonl").result()
    assert len(result.clips) + len(result.bad) == FILES and result.clips and result.bad
    assert all(len(reason) > 20 for reason in result.bad.values())
    assert peak < 2 * 2**20
    said = "\n".join(result.bad.values())
    print(
        f"{len(result.clips)} ingested, {len(result.bad)} refused, {said.count('its time')} for "
        f"their time, {said.count('ended the process')} crashed, {said.count('memory_gb')} for "
        f"memory; peak {peak / 2**20:.2f} GiB"
    )
    assert "ended the process" not in said and "its time" not in said


def test_valid_files_of_every_format_are_ingested(tmp_path):
    good = originals(tmp_path / "good")
    result = ingest(source=tmp_path / "good", out=tmp_path / "found.jsonl", bad_clip_budget=1)
    # packed, its colour is without outlines
    assert len(result.clips) == len(good) - 1 and list(result.bad) == ["p"]
