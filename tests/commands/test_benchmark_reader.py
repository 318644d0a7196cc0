import json

import numpy as np
import pytest

from acetate.commands.benchmark_reader import (
    STORED,
    ReaderLoad,
    batches_of,
    decode_png,
    decode_with_av,
    draw_shards,
    rows_of,
    serve,
)
from acetate.data.shards import index_shards, read_clip, read_media
from acetate.data.store import Remote, open_folder, read_file
from tests.compose import called

LOAD = ReaderLoad(clips=3, frames=5, size=32, batch_size=2, repeats=1, seed=0)


@pytest.fixture(scope="module", params=[("rgba.mkv", 5), ("rgba.png", 1)], ids=["clips", "stills"])
def drawn(request, tmp_path_factory):
    kind, frames = request.param
    out = tmp_path_factory.mktemp("drawn")
    draw_shards(out, LOAD, frames)
    return out, kind, frames


def test_both_read_the_same_frames(drawn, tmp_path):
    out, kind, frames = drawn
    refs = index_shards([out])
    splits = ["train"] * (3 * 5 // frames) + ["val"]
    assert [(ref.kind, ref.frames, ref.split) for ref in refs] == [
        (kind, frames, split) for split in splits
    ]
    with serve(out) as url:
        remote = index_shards([open_folder(url, Remote(cache_dir=tmp_path))])
        for ref, other in zip(refs, remote, strict=True):
            plain = decode_with_av(read_media(ref))
            assert plain.shape == (frames, 32, 32, 4) and plain[..., 3].max() > 0
            assert np.array_equal(plain, read_clip(ref).frames) and np.array_equal(
                plain, read_clip(other).frames
            )
            assert kind != "rgba.png" or np.array_equal(plain, decode_png(read_media(ref)))


def test_the_server_is_gone_afterwards(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with serve(tmp_path) as url:
        assert read_file(open_folder(url, Remote(cache_dir=tmp_path / "a")), "file") == b"x"
    with pytest.raises(OSError, match="could not be fetched"):
        read_file(open_folder(url, Remote(cache_dir=tmp_path / "b", retries=0)), "file")


def test_the_data_module_reads_whole_batches(drawn):
    batch = next(batches_of(drawn[0], LOAD))
    assert batch["rgb"].shape == (2, 3, 5, 32, 32) and batch["skipped"] == []


def test_rates_by_hand():
    ways = {
        "plain": {"clips": 4, "frames": 20, "seconds": 2.0, "wall_seconds": 1.0},
        "local": {"clips": 8, "frames": 40, "seconds": 6.0, "wall_seconds": 4.0},
    }
    rows = list(rows_of({"FFV1 clips": ways}))
    assert rows[0] == ("FFV1 clips", "plain", "2.0", "10.0", "4.0", "1.00")
    assert rows[1] == ("FFV1 clips", "local", "1.3", "6.7", "2.0", "1.50")


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ("clips=2", "frames=5", "size=16", "batch_size=2", "repeats=1")
    arguments = ["parts=[reader]", "out=speed.json", *(f"reader.{setting}" for setting in small)]
    called("benchmark", *arguments)
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results.keys() == {"machine", "reader"} and results["reader"].keys() == {
        "workload",
        *STORED.values(),
    }
    for kind, plain in zip(STORED.values(), (["plain"], ["plain", "PyAV"]), strict=True):
        ways = results["reader"][kind]
        assert [*ways] == [*plain, "local", "http, first", "http, cached", "datamodule"]
        assert all(way["seconds"] > 0 for way in ways.values())
        assert ways["local"]["frames"] == 2 * 5 and ways["datamodule"]["frames"] == 2 * 5
    printed = capsys.readouterr().out
    assert "http, cached" in printed and "time / plain" in printed
