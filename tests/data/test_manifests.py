import io
import json
import os
import struct
import tarfile
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from acetate.data import shards
from acetate.data.members import find_members
from acetate.data.shards import MANIFEST, BadClip, ShardError, index_shards, read_clip, read_meta
from acetate.data.writer import EncodedClip, ShardWriter, encode_clip
from tests.data.test_shards import MADE_BY, add, write


def with_entry(folder, out, **change):
    """A copy of the manifest whose second clip is changed."""
    manifest = shards.read_manifest(folder)
    entry = [clip for shard in manifest["shards"] for clip in shard["clips"]][1]
    entry.update(change)
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


@pytest.mark.parametrize(
    "name, value",
    [
        *(("key", key) for key in (
            123, ["a"], None, "", "../../x", "/x", "a/b", "a.b", "a\nb", "a\x1b[2J", "x" * 81,
            "\ud800", "a\u0301", {}, True)),
        ("width", 0), ("width", -1), ("height", 2**40), ("height", 1.5), ("frames", "9"),
        ("frames", True), ("frames", None), ("split", "test"), ("split", ["train"]),
        ("kind", "rgba.mp4"), ("kind", "../x"), ("crc32", -1), ("crc32", 2**32), ("more", 1),
    ],
)  # fmt: skip
def test_entries_are_held_to_their_schema(tmp_path, name, value):
    write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    folder = with_entry(tmp_path / "a", tmp_path / "b", **{name: value})
    with pytest.raises(
        ShardError, match=rf"b/{MANIFEST}: shards\[0\]\.clips\[1\]\.'?{name}"
    ) as error:
        index_shards([folder])
    assert (
        "acetate prep shard` make clip shards" in str(error.value) and len(str(error.value)) < 500
    )


@pytest.mark.parametrize(
    "change",
    [{"file": "../a.tar"}, {"file": "/a.tar"}, {"file": "a\nb.tar"}, {"file": 5}, {"file": "a.zip"},
     {"bytes": -1}, {"bytes": 1.5}, {"sha256": "x"}, {"sha256": None}, {"clips": {}}, {"clips": 5}],
)  # fmt: skip
def test_tars_are_held_to_their_schema(tmp_path, change):
    write(tmp_path)
    manifest = shards.read_manifest(tmp_path)
    manifest["shards"][0].update(change)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=rf"{MANIFEST}: shards\[0\]\.{next(iter(change))}="):
        index_shards([tmp_path])


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 100_000, "nested too deeply"), ('{"schema": NaN}', "NaN is no number"),
        ('{"schema": ' + "9" * 5000 + "}", "is not JSON"), ("\xff\xfe", "is not JSON"),
        ("5", "schema None"), ('{"schema": "1"}', "schema '1'"),
        ('{"schema": 1, "kind": ["clips"]}', "holds kind"),
        (f'{{"schema": 1, "clips": 1, "shards": [], "made_by": {"[" * 40}{"]" * 40}}}', "made_by="),
        ('{"schema": 1, "clips": "1", "shards": []}', "clips='1': must be a whole number"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(tmp_path, text, said):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ShardError, match=rf"(?s){tmp_path}.*{said}"):
        index_shards([tmp_path])
    with pytest.raises(ShardError, match=f"{MANIFEST} is no manifest"):
        shards.read_head(tmp_path)


@pytest.mark.timeout(10)
def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    """A pipe without a writer, a device without an end, a folder."""
    for number, make in enumerate((os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / MANIFEST)
        for read in (shards.read_manifest, shards.read_head):
            with pytest.raises(
                ShardError, match=f"{MANIFEST} is no plain file|{MANIFEST} is no man"
            ):
                read(folder)
    write(tmp_path / "a")
    (tmp_path / "a/clips-000000.tar").unlink()
    os.mkfifo(tmp_path / "a/clips-000000.tar")
    problems = [ref.problem for ref in index_shards([tmp_path / "a"]) if ref.problem]
    assert len(problems) == 2 and "clips-000000.tar is no plain file" in problems[0]


def test_large_files_are_not_read(tmp_path):
    with open(tmp_path / MANIFEST, "wb") as file:
        file.truncate(2**29 + 1)
    for read in (shards.read_manifest, shards.read_head):
        with pytest.raises(ShardError, match=r"has more than 536,870,912 bytes"):
            read(tmp_path)
    (tmp_path / MANIFEST).write_text(f"[{'0,' * (2**24 + 1)}0]")
    with pytest.raises(ShardError, match=r"more than 16,777,216 values"):
        shards.read_manifest(tmp_path)


def test_a_tar_that_points_back_ends(tmp_path):
    """A member of negative size, after which tarfile of Python 3.11.7 reads the same one again."""
    (tmp_path / "a").write_bytes(b"x")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "a", "first")
        archive.add(tmp_path / "a", "second")
    data = bytearray((tmp_path / "t.tar").read_bytes())
    data[1024 + 124 : 1024 + 136] = (2**96 - 1024).to_bytes(12, "big")
    field = data[1024:1536]
    field[148:156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(field)
    with pytest.raises(tarfile.TarError, match="points back"):
        list(find_members(io.BytesIO(data), len(data)))


META = {"prompt": "x", "fps": 10, "frames": 1, "width": 8, "height": 8, "split": "train"}


@pytest.mark.parametrize(
    "meta, said",
    [
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"), (b"[]", "must be an object"),
        (json.dumps({"fps": 1}).encode(), "prompt is missing"),
        *((json.dumps(META | change).encode(), next(iter(change))) for change in (
            {"prompt": 5}, {"prompt": None}, {"prompt": "x" * 200_000}, {"prompt": "\ud800"},
            {"fps": -1}, {"fps": float("inf")}, {"frames": "1"}, {"width": 0}, {"split": "test"},
            {"done": {"crop": 5}}, {"lossy": "no"})),
    ],
)  # fmt: skip
def test_the_json_of_a_clip_is_held_to_its_schema(tmp_path, meta, said):
    still = encode_clip(np.zeros((1, 8, 8, 4), np.uint8), 0)
    size = {name: getattr(still, name) for name in ("frames", "width", "height", "kind")}
    entry = {"key": "a", "split": "train", **size, "crc32": zlib.crc32(still.media)}
    with ShardWriter(tmp_path, max_clips=9, max_bytes=10**9, made_by={}) as writer:
        writer.write(entry, still.media, meta)
    said = said.replace("fps", "fps|Infinity")
    with pytest.raises(BadClip, match=rf"^a: clips-000000\.tar:a\..*a\.json: .*({said})"):
        read_meta(index_shards([tmp_path])[0])


@pytest.mark.parametrize(
    "error",
    [RecursionError("deep"), MemoryError(), Image.DecompressionBombError("bomb"), zlib.error("z"),
     struct.error("s"), AssertionError("a"), RuntimeError("r"), av.error.InvalidDataError(1, "v")],
)  # fmt: skip
def test_whatever_reading_raises_is_the_clips_fault(tmp_path, monkeypatch, error):
    write(tmp_path)
    ref = index_shards([tmp_path])[0]

    def decode(*_):
        raise error

    for name in ("decode_ffv1", "decode_png"):
        monkeypatch.setattr(shards, name, decode)
    with pytest.raises(BadClip, match=rf"^a: clips-000000\.tar:a\.rgba.*: {type(error).__name__}"):
        read_clip(ref)


def test_a_picture_that_is_a_bomb(tmp_path):
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 10**6)), (b"IEND", b""))
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    with ShardWriter(tmp_path, max_clips=9, max_bytes=10**9, made_by=MADE_BY) as writer:
        add(writer, "a", EncodedClip(bomb, "rgba.png", 1, 8, 8, 0))
    with pytest.raises(BadClip, match=r"^a: clips-000000\.tar:a\.rgba\.png"):
        read_clip(index_shards([tmp_path])[0])
