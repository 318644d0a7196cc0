import hashlib
import json
import pickle
import tarfile
from dataclasses import replace

import av
import numpy as np
import pytest
import webdataset

from acetate.data.keys import plain_key
from acetate.data.shards import (
    MANIFEST,
    BadClip,
    ShardError,
    index_shards,
    read_clip,
    read_head,
    read_manifest,
    read_media,
    read_meta_text,
)
from acetate.data.writer import EncodedClip, ShardWriter, encode_clip
from acetate.draws import stable_hash
from acetate.video_io import decode_ffv1

MADE_BY = {"command": "test", "settings": {"seed": 0}}


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


CLIPS = {
    "a": noise(0, 5, 12, 16, 4),
    "b": noise(1, 1, 9, 7, 4),
    "c": noise(2, 3, 8, 8, 4),
    "d": noise(3, 2, 8, 8, 4),
}


def add(writer, key, clip=None):
    writer.add(
        key,
        clip or encode_clip(CLIPS[key], 16),
        split="val" if key == "c" else "train",
        prompt=f"prompt of {key}: ä",
        source="test",
        licence="CC0-1.0",
        lossy=False,
        premultiplied_source=False,
    )


def write(out, max_clips=2, max_bytes=10**9, made_by=MADE_BY):
    with ShardWriter(out, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by) as writer:
        for key in CLIPS:
            if key not in writer:
                add(writer, key)
    return read_manifest(out)


def test_clips_come_back_bit_for_bit(tmp_path):
    write(tmp_path)
    refs = index_shards([tmp_path])
    assert [ref.key for ref in refs] == ["a", "b", "c", "d"]
    for ref in refs:
        clip = read_clip(ref)
        assert np.array_equal(clip.frames, CLIPS[ref.key])
        assert clip.prompt == f"prompt of {ref.key}: ä"
        assert clip.fps == (0 if ref.key == "b" else 16)
        assert (ref.frames, ref.height, ref.width) == CLIPS[ref.key].shape[:3]
        assert ref.split == ("val" if ref.key == "c" else "train")


def test_manifest_counts_and_hashes(tmp_path):
    manifest = write(tmp_path)
    assert manifest["schema"] == 1 and manifest["made_by"] == MADE_BY
    assert (manifest["clips"], manifest["frames"], manifest["splits"]) == (
        4,
        11,
        {"train": 3, "val": 1},
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clips-000000.tar",
        "clips-000001.tar",
        MANIFEST,
    ]
    for shard in manifest["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"] and len(data) == shard["bytes"]
    assert [clip["key"] for clip in manifest["shards"][1]["clips"]] == ["c", "d"]


def test_webdataset_reads_the_tars(tmp_path):
    write(tmp_path)
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = {
        sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False)
    }
    assert set(samples) == set(CLIPS)
    assert np.array_equal(decode_ffv1(samples["a"]["rgba.mkv"], "a", (5, 12, 16))[0], CLIPS["a"])
    assert samples["b"]["rgba.png"].startswith(b"\x89PNG")
    assert json.loads(samples["b"]["json"]) == {
        "prompt": "prompt of b: ä", "fps": 0.0, "frames": 1, "width": 7, "height": 9,
        "source": "test",
        "licence": "CC0-1.0", "split": "train", "lossy": False, "premultiplied_source": False,
    }  # fmt: skip


def test_same_clips_make_the_same_bytes(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "clips-000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}


@pytest.mark.parametrize("count", [1, 4])
def test_manifest_is_written_tar_by_tar_as_if_whole(tmp_path, count):
    with ShardWriter(tmp_path, max_clips=1, max_bytes=10**9, made_by=MADE_BY) as writer:
        writer.skipped["x"] = "a reason"
        for key in list(CLIPS)[:count]:
            add(writer, key)
            assert key in writer and "x" not in writer
    text = (tmp_path / MANIFEST).read_text()
    assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=1) + "\n"
    manifest = read_manifest(tmp_path)
    assert len(manifest.pop("shards")) == count and read_head(tmp_path) == manifest
    assert manifest["clips"] == count and manifest["skipped"] == {"x": "a reason"}


def test_a_copied_clip_is_the_same_byte_for_byte(tmp_path):
    write(tmp_path / "a", max_clips=9)
    with ShardWriter(tmp_path / "b", max_clips=9, max_bytes=10**9, made_by=MADE_BY) as writer:
        for ref in index_shards([tmp_path / "a"]):
            writer.copy(ref, read_media(ref), read_meta_text(ref))
    assert read_manifest(tmp_path / "b") == read_manifest(tmp_path / "a")


def test_max_bytes_cuts_tars(tmp_path):
    assert len(write(tmp_path, max_clips=100, max_bytes=1)["shards"]) == 4


def test_interrupted_run_looks_unfinished_and_goes_on(tmp_path):
    whole = write(tmp_path / "whole", max_clips=1)

    def broken():
        with ShardWriter(tmp_path / "cut", max_clips=1, max_bytes=10**9, made_by=MADE_BY) as writer:
            add(writer, "a")
            add(writer, "b")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    with pytest.raises(ShardError, match=r"no finished shards.*acetate prep"):
        read_manifest(tmp_path / "cut")
    before = (tmp_path / "cut" / "clips-000001.tar").stat().st_mtime_ns
    assert write(tmp_path / "cut", max_clips=1) == whole
    # kept, not made again
    assert (tmp_path / "cut" / "clips-000001.tar").stat().st_mtime_ns == before
    assert not list((tmp_path / "cut").glob("*.part.json"))


def test_interrupted_run_of_something_else_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(
        tmp_path, max_clips=1, max_bytes=10**9, made_by={"command": "other"}
    ) as writer:  # fmt: skip
        add(writer, "d")
        raise KeyboardInterrupt
    assert write(tmp_path, max_clips=2) == write(tmp_path.parent / "clean", max_clips=2)


def test_writer_errors(tmp_path):
    write(tmp_path / "done")
    with pytest.raises(ShardError, match="already holds finished shards"):
        ShardWriter(tmp_path / "done", max_clips=1, max_bytes=1, made_by=MADE_BY)
    with ShardWriter(tmp_path / "new", max_clips=9, max_bytes=10**9, made_by=MADE_BY) as writer:
        add(writer, "a")
        with pytest.raises(ValueError, match=r"'a' was already written"):
            add(writer, "a")
        for key in ("", "a.b", "a/b", "x" * 81, "ß" * 41, "a\u0301", "a\nb"):
            with pytest.raises(ValueError, match="keys are 1 to 80"):
                add(writer, key, encode_clip(CLIPS["b"], 0))


def test_folder_errors(tmp_path):
    with pytest.raises(ShardError, match=r"none does not exist.*prep synthesize"):
        index_shards([tmp_path / "none"])
    with pytest.raises(ShardError, match=r"holds no finished shards.*acetate prep synthesize"):
        index_shards([tmp_path])
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ShardError, match="is not JSON"):
        index_shards([tmp_path])
    (tmp_path / MANIFEST).write_text('{"schema": 99}')
    with pytest.raises(ShardError, match=r"schema 99; this version reads schema 1"):
        index_shards([tmp_path])
    (tmp_path / MANIFEST).write_text('{"schema": 1, "clips": 0, "shards": []}')
    with pytest.raises(ShardError, match="holds 0 clips"):
        index_shards([tmp_path])


def test_no_clip_leaves_no_folder(tmp_path):
    with (
        pytest.raises(ShardError, match=r"no clip is left to write into .*empty \(x: a reason\)"),
        ShardWriter(tmp_path / "empty", max_clips=1, max_bytes=1, made_by=MADE_BY) as writer,
    ):
        writer.skipped["x"] = "a reason"
    with (
        pytest.raises(KeyError),
        ShardWriter(tmp_path / "raised", max_clips=1, max_bytes=1, made_by=MADE_BY),
    ):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_leaves_no_half(tmp_path, small_disk):
    noise = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 4), dtype=np.uint8)
    with (
        pytest.raises(
            OSError,
            match=r"clips-000000\.tar could not be written \(.*\); [\d,]+ MiB are free there",
        ),
        ShardWriter(tmp_path / "s", max_clips=9, max_bytes=10**9, made_by=MADE_BY) as writer,
    ):
        add(writer, "a", encode_clip(noise, 0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["Élan", "火の輪", "кот-3", "हिन्दी", "ß" * 40])
def test_keys_of_all_scripts(tmp_path, key):
    """As this program, tarfile and webdataset read them."""
    assert plain_key(key) == key
    with ShardWriter(tmp_path / "s", max_clips=9, max_bytes=10**9, made_by=MADE_BY) as writer:
        for name in (key, "plain"):
            add(writer, name, encode_clip(CLIPS["a"], 8))
    (ref,) = (ref for ref in index_shards([tmp_path / "s"]) if ref.key == key)
    assert ref.problem is None and read_clip(ref).frames.shape[0] == ref.frames
    tars = str(tmp_path / "s" / "clips-000000.tar")
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key, "plain"]
    assert all("json" in sample for sample in samples)


def test_what_no_key_may_hold_becomes_a_line():
    assert plain_key("a.b c/\nd\0e\u202e") == "a_b_c_d_e_" and plain_key("E\u0301") == "É"


def test_one_key_in_two_folders(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    with pytest.raises(ShardError, match=r"key 'a' is in .*a and in .*b"):
        index_shards([tmp_path / "a", tmp_path / "b"])


def test_cut_off_tar_costs_only_what_it_lost(tmp_path):
    write(tmp_path, max_clips=4)
    place = {ref.key: ref for ref in index_shards([tmp_path])}["c"].media[0]
    tar = tmp_path / "clips-000000.tar"
    tar.write_bytes(tar.read_bytes()[: place + 10])
    refs = {ref.key: ref for ref in index_shards([tmp_path])}
    assert [key for key, ref in refs.items() if ref.problem] == ["c", "d"]
    assert np.array_equal(read_clip(refs["a"]).frames, CLIPS["a"])
    with pytest.raises(BadClip, match=r"c: not in .*clips-000000\.tar.*cut off"):
        read_clip(refs["c"])


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 4096])
def test_lost_or_damaged_tar(tmp_path, content):
    write(tmp_path)
    tar = tmp_path / "clips-000001.tar"
    tar.unlink() if content is None else tar.write_bytes(content)
    assert [ref.key for ref in index_shards([tmp_path]) if ref.problem] == ["c", "d"]


def test_flipped_bit_is_noticed(tmp_path):
    write(tmp_path)
    ref = index_shards([tmp_path])[0]
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + ref.media[1] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(
        BadClip, match=r"a: clips-000000\.tar:a\.rgba\.mkv does not match the manifest's CRC"
    ):
        read_clip(ref)


def test_clip_that_is_not_what_the_manifest_says(tmp_path):
    write(tmp_path)
    ref = index_shards([tmp_path])[0]
    with pytest.raises(BadClip, match="5 frames, promised are 6"):
        read_clip(replace(ref, frames=6))


def test_clip_without_alpha_or_metadata(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for frame in noise(0, 2, 16, 16, 3):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")
                )
            )
        container.mux(stream.encode())
    opaque = (tmp_path / "a.mkv").read_bytes()
    with ShardWriter(tmp_path / "out", max_clips=9, max_bytes=10**9, made_by=MADE_BY) as writer:
        add(writer, "a", EncodedClip(opaque, "rgba.mkv", 2, 16, 16, 10))
        add(writer, "b", EncodedClip(b"no picture", "rgba.png", 1, 16, 16, 0))
        add(writer, "c")
    refs = index_shards([tmp_path / "out"])
    for ref, message in zip(refs, ("pixel format bgr0", "cannot be decoded"), strict=False):
        with pytest.raises(BadClip, match=message):
            read_clip(ref)
    with pytest.raises(BadClip, match=r"c\.json: .*decode"):
        read_clip(replace(refs[2], meta=refs[2].media))


def test_bad_clip_travels_between_processes():
    bad = pickle.loads(pickle.dumps(BadClip("key", "a reason")))
    assert (bad.key, bad.reason, str(bad)) == ("key", "a reason", "key: a reason")


def test_stable_hash_is_pinned():
    # Order, splits and crops of every dataset depend on it: it must never change.
    assert stable_hash("clip", 0, 1, "a") == 388899464410021063
    assert 0 <= stable_hash("x") < 2**63
