"""Small media of many kinds in a folder, and what ingest makes of it."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.ingest import ingest


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def still(path, height=8, width=10, channels=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, channels)).save(path)


def film(path, frames=3, height=16, width=32, codec="libx264", pixels="yuv420p"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for picture in noise(frames, height, width, 4):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixels)
                )
            )
        container.mux(stream.encode())


def run(source, budget=0, **changes):
    result = ingest(
        source=source, out=source.parent / "found.jsonl", bad_clip_budget=budget, **changes
    )
    return {clip.key: clip for clip in result.clips}, result.bad


def notes(source):
    """Of the report that `run` wrote."""
    return json.loads((source.parent / "found.report.json").read_text())["notes"]


@pytest.fixture
def source(tmp_path):
    return tmp_path / "media"
