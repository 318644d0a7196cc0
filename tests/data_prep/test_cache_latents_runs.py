"""How caching runs: in processes and ranks, after a kill, and again with other prompts or clips."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from acetate.data.latent_shards import index_latents, read_latents
from acetate.data.shards import (
    MANIFEST,
    ShardError,
    index_shards,
    read_media,
    read_meta_text,
)
from acetate.data.store import Remote, open_folder
from acetate.data.writer import ShardWriter, encode_clip
from acetate.models.text import TextEncoder
from data_prep import cache_latents as program
from data_prep.journal import only_writer
from tests.data_prep.cached_latents import (  # noqa: F401
    adapters,
    cached,
    clips,
    files,
    make,
    manifest_of,
    sources,
    write,
)


def test_restart_makes_only_what_is_missing(make, cached, tmp_path, monkeypatch):
    out = tmp_path / "l"
    make(out)
    assert files(out) == files(cached)
    made = []
    real = program.Encoder.tar
    monkeypatch.setattr(
        program.Encoder, "tar", lambda self, n, *rest: made.append(n) or real(self, n, *rest)
    )
    assert make(out) == manifest_of(cached) and made == []
    (out / MANIFEST).unlink()
    (out / "latents-000001.part.json").unlink()
    assert make(out) == manifest_of(cached) and made == [1]
    assert files(out) == files(cached)
    (out / MANIFEST).unlink()
    (out / "latents-000000.tar").unlink()
    make(out)
    assert made == [1, 0] and files(out) == files(cached)


def test_two_processes_at_one_tar_make_it_whole(make, cached, tmp_path, monkeypatch):
    """One that was thought dead goes on: here a second one writes the tar while the first is in its
    middle."""
    tar, clip, jobs = program.Encoder.tar, program.Encoder.clip, []

    def begin(self, number, pieces, report):
        jobs.append((number, pieces))
        return tar(self, number, pieces, report)

    def interrupt(self, pieces):
        yield from clip(self, pieces)
        if len(jobs) == 1:
            self.tar(*jobs[0], lambda count, bad: None)

    monkeypatch.setattr(program.Encoder, "tar", begin)
    monkeypatch.setattr(program.Encoder, "clip", interrupt)
    make(tmp_path / "l")
    assert len(jobs) == 3 and files(tmp_path / "l") == files(cached)


def test_what_a_kill_left_beside_the_manifest_goes(make, cached, tmp_path):
    out = tmp_path / "l"
    make(out)
    (out / "prompts").mkdir()
    (out / "latents-000000.tar.0123abcd").write_bytes(b"half a tar")
    make(out)
    assert not (out / "prompts").exists() and files(out) == files(cached)


def test_one_run_at_a_time(make, tmp_path, monkeypatch):
    with only_writer(tmp_path / "l"):
        with pytest.raises(RuntimeError, match="l is being written by another process"):
            make(tmp_path / "l")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        make(tmp_path / "l")


def test_executors_are_checked_before_anything_is_loaded(make, sources, tmp_path):
    with pytest.raises(ValueError, match="executor=ray, workers=0; Ray needs at least workers=1"):
        make(tmp_path / "l", executor="ray", sources=replace(sources, vae="nowhere"))


@pytest.mark.slow
@pytest.mark.long
def test_the_bytes_do_not_depend_on_threads(make, tmp_path, monkeypatch):
    """Of clips that are large enough for convolutions to be divided."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a process of its own takes all cores
    noise = np.random.default_rng(0).integers(0, 256, (2, 17, 96, 160, 4), dtype=np.uint8)
    with ShardWriter(tmp_path / "clips", max_clips=100, max_bytes=10**9, made_by={}) as writer:
        for i, frames in enumerate(noise):
            writer.add(f"clip{i}", encode_clip(frames, 8), split="train", prompt=f"noise {i}",
                source="nowhere",
                       licence="CC0-1.0", lossy=False, premultiplied_source=False)  # fmt: skip
    settings = {"shards": tmp_path / "clips", "variants": 1, "frames": (17,), "area": 96 * 160}
    before = torch.get_num_threads()
    try:
        for threads, workers in ((1, 0), (2, 0), (2, 1)):
            torch.set_num_threads(threads)
            make(tmp_path / f"{threads}-{workers}", workers=workers, **settings)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1-0") == files(tmp_path / "2-0") == files(tmp_path / "2-1")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_workers_make_the_same_bytes(make, cached, tmp_path):
    make(tmp_path / "l", workers=2)
    assert files(tmp_path / "l") == files(cached)


@pytest.mark.slow
def test_clip_shards_behind_a_url(make, clips, cached, tmp_path):
    """From a bucket through the cache: the bytes that local shards give."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
        bucket = fsspec.filesystem("s3", **options)
        bucket.mkdir("films")  # all servers of a process share their buckets
        bucket.put(str(clips), "films/clips", recursive=True)
        folder = open_folder(
            "s3://films/clips", Remote(cache_dir=tmp_path / "cache", storage_options=options)
        )
        make(tmp_path / "l", shards=folder)
        assert files(tmp_path / "l") == files(cached)
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    finally:
        server.stop()


def test_ranks_share_the_jobs(make, cached, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert make(tmp_path / "l") is None
    assert {path.suffix for path in (tmp_path / "l").glob("latents-*")} == {".tar", ".json"}
    assert [path.name for path in (tmp_path / "l").glob("*.tar")] == ["latents-000001.tar"]
    monkeypatch.setenv("RANK", "0")
    assert make(tmp_path / "l") == manifest_of(cached)
    assert files(tmp_path / "l") == files(cached)


def test_first_rank_waits_for_the_others(make, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "POLL", 0.05)
    late = tmp_path / "late"
    make(late)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    out = tmp_path / "l"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make, out)
        while not (out / "latents-000000.part.json").exists() and not waiting.done():
            pass
        assert not (out / MANIFEST).exists()
        for name in ("latents-000001.tar", "latents-000001.part.json"):
            (out / name).write_bytes((late / name).read_bytes())
        assert waiting.result(30) == manifest_of(cached)


def test_a_changed_prompt_alone_is_made_anew(make, clips, cached, tmp_path, monkeypatch):
    """On the same `out`: the folder that a fresh run would make, without a latent encoded or
    another text embedded."""
    out, others = tmp_path / "l", write(tmp_path / "s", {"tall": "a green hill"})
    make(out)
    # long and the first of short: none of it changes
    inode = (out / "latents-000000.tar").stat().st_ino
    make(tmp_path / "fresh", shards=others)
    encoded, texts = [], []
    with monkeypatch.context() as patch:
        patch.setattr(program.Encoder, "latents", lambda self, *rest: encoded.append(rest))
        real = TextEncoder.__call__
        patch.setattr(
            TextEncoder,
            "__call__",
            lambda self, text, *rest: texts.append(text) or real(self, text, *rest),
        )
        make(out, shards=others)
    assert encoded == [] and set(texts) == {"", "a green hill"}
    assert files(out) == files(tmp_path / "fresh")
    assert (out / "latents-000000.tar").stat().st_ino == inode
    before, after = (
        {ref.key: ref for ref in index_latents(f, manifest_of(f))} for f in (cached, out)
    )
    for key in before:
        one, other = read_latents(before[key]), read_latents(after[key])
        assert torch.equal(one["latents"], other["latents"]) and torch.equal(
            one["ellipse"], other["ellipse"]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "l", "s"]


def test_a_kill_while_prompts_change_leaves_the_old_folder(make, tmp_path, monkeypatch):
    out, others = tmp_path / "l", write(tmp_path / "s", {"short": "a green hill"})
    make(out)
    whole = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(program, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(out, shards=others)
    assert files(out) == whole
    make(out, shards=others)  # goes on
    make(tmp_path / "fresh", shards=others)
    assert files(out) == files(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "l", "s"]


def test_replace_keeps_the_latents_that_stay_the_same(make, clips, cached, tmp_path, monkeypatch):
    out, encoded, real = tmp_path / "l", [], program.Encoder.latents
    make(out, variants=1)
    with pytest.raises(ShardError, match=r"variants: 1 there, 2 now\. .*out=.*replace=true"):
        make(out)
    monkeypatch.setattr(
        program.Encoder, "latents", lambda self, *rest: encoded.append(1) or real(self, *rest)
    )
    make(out, replace_old=True)
    assert files(out) == files(cached) and len(encoded) == 5  # of ten
    make(out, seed=3, replace_old=True)
    # other backgrounds: all
    assert manifest_of(out)["made_by"]["settings"]["seed"] == 3 and len(encoded) == 15


def test_other_clips_are_not_put_in_the_place_of_these(make, tmp_path):
    """Fewer clips, or other frames under the same keys, may be a mistake: the latents that are
    there stay."""
    out, others = tmp_path / "l", write(tmp_path / "s")
    make(out, shards=others)
    with ShardWriter(tmp_path / "one", max_clips=9, max_bytes=10**9, made_by={}) as writer:
        ref = index_shards([others])[0]
        writer.copy(ref, read_media(ref), read_meta_text(ref))
    with pytest.raises(ShardError, match=r"clips of shards: .* there, .* now"):
        make(out, shards=tmp_path / "one")
    (out / "mine.txt").write_text("notes")
    with pytest.raises(
        ShardError, match=r"mine\.txt in it was not made by data_prep\.cache_latents"
    ):
        make(out, shards=tmp_path / "one", replace_old=True)
    with pytest.raises(ShardError, match="is also what shards names"):
        make(others, shards=others, replace_old=True)
    with pytest.raises(ShardError, match=r"one holds what .* made\. Name another folder"):
        make(tmp_path / "one", shards=others, replace_old=True)
