import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from acetate.alpha import PALETTE_NAMES, harden, over, palette_colors
from acetate.data.latent_shards import EMPTY_PROMPT, index_latents, read_latents
from acetate.data.latents import LatentDataModule
from acetate.data.shards import (
    MANIFEST,
    ShardError,
    index_shards,
    read_clip,
    read_media,
    read_meta,
    read_meta_text,
)
from acetate.data.store import Remote, open_folder
from acetate.data.writer import ShardWriter, encode_clip
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.models.adapters import ADAPTER_SCHEMA, trainable_state
from acetate.models.loading import load_vae
from acetate.models.rgba_vae import RGBAVAE
from acetate.models.text import TextEncoder
from acetate.regions import fit_ellipses
from data_prep import cache_latents as program
from data_prep.bad_clips import TooManyBad
from data_prep.cache_latents import cache_latents, made_by
from data_prep.journal import only_writer
from data_prep.latent_encoder import Sources
from data_prep.latent_plan import Piece, Settings, background, cut
from tests.compose import called
from tests.conftest import fill_
from tests.original import wan_alpha_state
from tests.paths import ROOT

ELLIPSE = {"threshold": 0.1, "aligned": False, "raster": "exact", "enlargements": 64}
SETTINGS = Settings(
    seed=0, variants=2, frames=(5,), area=32 * 32, max_aspect=4.0, sizes=None, space_multiple=None,
    dtype="float16",
    ellipse=ELLIPSE, per_tar=5,
)  # fmt: skip
EPS = 0.25
CLIPS = {  # frames, height, width, prompt
    "long": (12, 40, 40, "a red disc"),
    "short": (3, 20, 60, "smoke over a blue sea"),
    "still": (1, 32, 32, "a red disc"),
    "tall": (5, 60, 20, "a blue sea"),
}


def clip(name):
    frames, height, width, _ = CLIPS[name]
    picture = np.random.default_rng(len(name)).integers(
        0, 256, (frames, height, width, 4), dtype=np.uint8
    )
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2
    # soft all over
    picture[..., 3] = np.where(disc, np.maximum(picture[..., 3], 128), picture[..., 3] // 16)
    return picture


def write(out, prompts=None):
    with ShardWriter(out, max_clips=100, max_bytes=10**9, made_by={}) as writer:
        for name in CLIPS:
            writer.add(
                name,
                encode_clip(clip(name), 8),
                split="val" if name == "still" else "train",
                prompt=(prompts or {}).get(name, CLIPS[name][3]),
                source="nowhere",
                licence="CC0-1.0",
                lossy=False,
                premultiplied_source=False,
            )
    return out


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def adapters(wan_folder, tmp_path_factory):
    vae = RGBAVAE(vae=load_vae(str(wan_folder)), merge_init="residual", lora_rank=2, lora_alpha=2.0)
    fill_(vae.merge, seed=3)
    facts = {
        "schema": ADAPTER_SCHEMA, "kind": "rgba_vae", "base": vae.source,
        "base_sha256": vae.base_sha256,
        "merge_init": "residual", "lora_rank": 2, "lora_alpha": 2.0, "average_alpha": True,
        "eps": EPS,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("adapters") / "last.safetensors"
    state = {
        f"vae.{name}": value.detach().contiguous() for name, value in trainable_state(vae).items()
    }
    save_file(state, path, {name: json.dumps(value) for name, value in facts.items()})
    return path


@pytest.fixture(scope="module")
def sources(wan_folder, adapters):
    return Sources(
        vae=str(wan_folder), rgba_vae=str(adapters), text_encoder=str(wan_folder), prompt_length=16,
        frozen_dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def make(clips, sources):
    def make(out, shards=clips, sources=sources, allow_empty_buckets=False, bad_clip_budget=0,
        executor="local",
             workers=0, replace_old=False, **settings):  # fmt: skip
        return cache_latents(
            shards=[shards],
            out=out,
            sources=sources,
            settings=replace(SETTINGS, **settings),
            allow_empty_buckets=allow_empty_buckets,
            bad_clip_budget=bad_clip_budget,
            device="cpu",
            executor=executor,
            workers=workers,
            gpus=0,
            replace=replace_old,
        )

    return make


@pytest.fixture(scope="module")
def cached(make, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "l"
    make(out)
    return out


def manifest_of(out):
    return json.loads((out / MANIFEST).read_text())


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def break_clip(folder, name):
    ref = next(ref for ref in index_shards([folder]) if ref.key == name)
    with open(ref.tar, "r+b") as file:
        file.seek(ref.media[0] + ref.media[1] // 2)
        file.write(b"\0" * 20)


def test_manifest(cached, sources, clips):
    manifest, vae = manifest_of(cached), sources.load_vae()
    assert (manifest["schema"], manifest["kind"], manifest["skipped"]) == (1, "latents", {})
    assert (
        manifest["vae_sha256"] == vae.latents_sha256()
        and manifest["base_sha256"] == vae.base_sha256
    )
    assert manifest["text_encoder_sha256"] == TextEncoder(sources.text_encoder, 16).sha256()
    assert manifest["geometry"] == {"channels": 16, "time_stride": 4, "space_stride": 8}
    assert manifest["ellipse"] == ELLIPSE and manifest["prompt_length"] == 16
    assert (manifest["clips"], manifest["samples"], manifest["splits"]) == (
        4,
        10,
        {"train": 3, "val": 1},
    )
    # 12 = 5 + 5 + 2; `short` and `still`
    assert (manifest["unused_frames"], manifest["short_clips"]) == (2, 2)
    assert manifest["buckets"] == {
        "5x16x64": {"samples": 2, "clips": 1, "splits": {"train": 1, "val": 0}},
        "5x64x16": {"samples": 2, "clips": 1, "splits": {"train": 1, "val": 0}},
        "5x32x32": {"samples": 6, "clips": 2, "splits": {"train": 1, "val": 1}},
    }
    made_by = manifest["made_by"]["settings"]
    assert made_by["eps"] == EPS and len(made_by["shards_sha256"]) == 1 and made_by["vae_sha256"]
    assert [len(shard["samples"]) for shard in manifest["shards"]] == [5, 5]
    entry = manifest["shards"][0]["samples"][0]
    assert (entry["key"], entry["clip"], entry["variant"]) == ("long-w000-v0", "long", 0)
    assert (entry["split"], entry["shape"], entry["crc32"] > 0) == ("train", [2, 4, 4], True)
    assert not (cached / "prompts").exists()


def test_samples_equal_a_direct_encode(cached, clips, sources):
    vae, text = sources.load_vae(), TextEncoder(sources.text_encoder, 16)
    clip_refs = {ref.key: ref for ref in index_shards([clips])}
    for ref in index_latents(cached, manifest_of(cached)):
        sample, meta = read_latents(ref), read_meta(ref)
        source = clip_refs[ref.clip]
        piece = Piece(
            source,
            meta["window"],
            meta["start"],
            meta["frames"],
            meta["height"],
            meta["width"],
            ref.variant,
        )
        assert ref.key == piece.key and meta["clip"] == ref.clip and meta["split"] == ref.split
        rgb, alpha = cut(torch.from_numpy(read_clip(source).frames), piece)
        color = palette_colors(torch.tensor([PALETTE_NAMES.index(meta["background"])]))
        with torch.no_grad():
            wanted = vae.normalise(vae.encode(over(rgb, harden(alpha, EPS), color), alpha))[0]
        assert sample["latents"].dtype == torch.float16
        torch.testing.assert_close(sample["latents"].float(), wanted, atol=2e-2, rtol=2e-3)
        assert torch.equal(sample["ellipse"], fit_ellipses(alpha, 4, 8, **ELLIPSE)[0].float())
        embeds = text(CLIPS[ref.clip][3])
        torch.testing.assert_close(sample["prompt_embeds"].float(), embeds, atol=1e-2, rtol=1e-3)
        assert (
            sample["prompt_mask"].all() and len(sample["prompt_mask"]) == len(embeds) == ref.tokens
        )
        assert (meta["prompt"], meta["source"], meta["licence"]) == (
            CLIPS[ref.clip][3],
            "nowhere",
            "CC0-1.0",
        )
    torch.testing.assert_close(
        load_file(cached / EMPTY_PROMPT)["embeds"].float(), text(""), atol=1e-2, rtol=1e-3
    )


def test_eps_of_the_adapters_counts(cached, clips, sources):
    """Alpha lies below eps outside of the disc: there the encoder sees the background, not the
    colour."""
    ref = index_latents(cached, manifest_of(cached))[0]
    piece = Piece(index_shards([clips])[0], 0, read_meta(ref)["start"], 5, 32, 32, 0)
    _, alpha = cut(torch.from_numpy(clip("long")), piece)
    assert not torch.equal(harden(alpha, EPS), harden(alpha, 0.0))


def test_variants_differ_and_the_seed_decides():
    for key in CLIPS:
        assert sorted(background(0, key, variant) for variant in range(8)) == list(range(8))
    draws = [[background(seed, key, 0) for key in CLIPS] for seed in range(4)]
    assert len(set(map(tuple, draws))) > 1
    with pytest.raises(ValueError, match="variants=9; 1 to 8"):
        replace(SETTINGS, variants=9)


def test_datamodule_reads_them(cached):
    data = LatentDataModule(latents=str(cached), batch_size=2, seed=0, num_workers=0,
        val_batch_size=2, val_clips=8,
                            prompt_length=16)  # fmt: skip
    data.setup()
    assert data.vae_sha256 == manifest_of(cached)["vae_sha256"]
    batches = iter(data.train_dataloader())
    seen = {key for _ in range(20) for key in next(batches)["key"]}
    # Buckets of a single clip wait two epochs for company: two variants of it
    assert seen == {
        f"{key}-v{v}"
        for key in ("long-w000", "long-w001", "short-w000", "tall-w000")
        for v in (0, 1)
    }
    assert [batch["key"] for batch in data.val_dataloader()] == [["still-w000-v0"]]


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
def test_the_bytes_do_not_depend_on_threads(make, tmp_path):
    """Of clips that are large enough for convolutions to be divided."""
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


def test_other_settings_are_refused(make, cached, tmp_path):
    with pytest.raises(
        ShardError,
        match=r"made with other settings: seed: 0 there, 1 now\. Name another folder "
        r".*replace=true",
    ):
        make(cached, seed=1)
    make(tmp_path / "l")
    (tmp_path / "l" / MANIFEST).unlink()  # unfinished
    with pytest.raises(
        ShardError, match='dtype: "float16" there, "bfloat16" now; variants: 2 there, 3 now'
    ):
        make(tmp_path / "l", variants=3, dtype="bfloat16")


def test_how_it_is_run_does_not_matter(make, cached, sources):
    assert make(cached, sources=replace(sources, chunk=1), workers=3) == manifest_of(cached)


def test_chunks_agree(make, cached, sources, tmp_path):
    make(tmp_path / "l", sources=replace(sources, chunk=1))
    for one, other in zip(
        *(index_latents(out, manifest_of(out)) for out in (cached, tmp_path / "l")), strict=True
    ):
        torch.testing.assert_close(
            read_latents(one)["latents"], read_latents(other)["latents"], atol=2e-2, rtol=2e-3
        )


def test_bad_clips_and_their_budget(make, tmp_path, caplog):
    broken = write(tmp_path / "s")
    break_clip(broken, "tall")
    break_clip(broken, "short")
    with pytest.raises(TooManyBad, match=r"2 bad clips, bad_clip_budget=1: short: .*CRC.*tall: "):
        make(tmp_path / "l", shards=broken, bad_clip_budget=1)
    assert not (tmp_path / "l" / MANIFEST).exists()
    caplog.clear()
    manifest = make(tmp_path / "l", shards=broken, bad_clip_budget=2)  # goes on
    assert list(manifest["skipped"]) == ["short", "tall"] and "CRC" in manifest["skipped"]["tall"]
    assert (manifest["clips"], manifest["samples"]) == (2, 6)
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        "skipped clip short",
        "skipped clip tall",
    ]


def test_values_that_are_not_finite_are_bad(make, tmp_path, monkeypatch):
    real = RGBAVAE.normalise
    seen = []

    def overflow(self, raw):  # in the second sample
        seen.append(raw)
        return real(self, raw) * (1e9 if len(seen) == 2 else 1)

    monkeypatch.setattr(RGBAVAE, "normalise", overflow)
    manifest = make(tmp_path / "l", bad_clip_budget=1)
    assert manifest["skipped"] == {"long": "window 0, variant 1: latents are not finite in float16"}
    assert manifest["samples"] == 9 and manifest["clips"] == 4


def test_all_prompts_that_are_too_long_are_named_at_once(make, sources, tmp_path, caplog):
    shards = write(
        tmp_path / "s",
        {"short": "a red disc " * 20, "still": "a red disc " * 20, "tall": "a disc " * 20},
    )
    with pytest.raises(
        ValueError, match=r"3 clips .* than the 16 .*: short \(\d+\), still \(\d+\), tall \(\d+\)\."
    ):
        make(tmp_path / "l", shards=shards)
    assert not list((tmp_path / "l").glob("*.tar"))
    make(tmp_path / "l2", shards=shards, sources=replace(sources, long_prompts="truncate"))
    assert "3 clips have prompts of more tokens than the 16" in caplog.text
    refs = {ref.key: ref for ref in index_latents(tmp_path / "l2", manifest_of(tmp_path / "l2"))}
    sample = read_latents(refs["short-w000-v0"])
    assert refs["short-w000-v0"].tokens == len(sample["prompt_embeds"]) == 16
    assert sample["prompt"] == "a red disc " * 20  # whole: only what the DiT reads is cut
    with pytest.raises(ValueError, match="long_prompts=cut; choose error or truncate"):
        replace(sources, long_prompts="cut")


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


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.long
def test_no_readable_clip_leaves_no_folder(make, tmp_path, workers):
    broken = write(tmp_path / "s")
    for name in CLIPS:
        break_clip(broken, name)
    with pytest.raises(ShardError, match=r"no latents could be made of the clips \(long: .*CRC"):
        make(tmp_path / "l", shards=broken, bad_clip_budget=9, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_full_disk_is_named(make, tmp_path, small_disk):
    noise = np.random.default_rng(0).integers(0, 256, (5, 160, 160, 4), dtype=np.uint8)
    with ShardWriter(tmp_path / "s", max_clips=100, max_bytes=10**9, made_by={}) as writer:
        for i in range(2):
            writer.add(f"clip{i}", encode_clip(noise[:1, :64, :64], 8), split="train",
                prompt="noise", source="",
                       licence="", lossy=False, premultiplied_source=False)  # fmt: skip
    with pytest.raises(
        OSError, match=r"latents-000000\.tar could not be written \(.*\); [\d,]+ MiB are"
    ):
        make(tmp_path / "l", shards=tmp_path / "s", variants=8, area=320 * 320, per_tar=64)
    assert not list((tmp_path / "l").glob("latents-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": (6,)}, r"frames: 6 frames; Wan needs 4k\+1 .*Use frames=5"),
        ({"frames": ()}, r"frames=\[\]; a list of at least one of whole numbers"),
        ({"frames": 9}, r"frames=9; a list .* as in frames=\[17,49,81\]"),
        ({"frames": [9, "x"]}, r"frames=\[9, 'x'\]; a list"),
        (
            {"sizes": [48, 48]},
            r"sizes=\[48, 48\]; a list of at least one of pairs .* sizes=\[\[48,64\],",
        ),
        (
            {"area": 1e12},
            r"area=1e\+12 is [\d,]+ times a side of the largest clip, long \(40x40\); at most 32 "
            r"times",
        ),
        (
            {"sizes": ((1280, 1280),), "allow_empty_buckets": True},
            r"5x1280x1280 .*enlarges short \(60x20\) 64 times",
        ),
        (
            {"frames": (2**21 + 1,)},
            r"bucket 2097153x32x32 .* megapixels over its frames; at most 537",
        ),
        ({"sizes": ((24, 32),)}, r"sizes: height=24; sides are multiples of 16"),
        ({"space_multiple": 12}, r"space_multiple=12; sides are multiples of 8"),
        ({"area": 100}, r"area=100, .*no bucket in multiples of 16\. Raise area to 256"),
        ({"max_aspect": 0.5}, r"max_aspect=0\.5"),
        ({"per_tar": 0}, r"per_tar=0"),
        ({"dtype": "float64"}, r"dtype=float64; choose float16 or bfloat16"),
        (
            {"sizes": ((16, 64), (32, 32), (32, 48))},
            r"bucket without clips: 5x32x48 .*allow_empty_buckets=true",
        ),
    ],
)
def test_settings_are_checked(make, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "l", **settings)
    assert not (tmp_path / "l").exists()


def test_explicit_sizes(make, tmp_path):
    manifest = make(
        tmp_path / "l",
        sizes=((16, 64), (32, 32), (32, 48)),
        allow_empty_buckets=True,
        variants=1,
        dtype="bfloat16",
    )
    assert {name: count["samples"] for name, count in manifest["buckets"].items()} == {
        "5x16x64": 1,
        "5x32x32": 4,
        "5x32x48": 0,
    }
    assert (
        read_latents(index_latents(tmp_path / "l", manifest)[0])["latents"].dtype == torch.bfloat16
    )


def test_unusable_shards(make, tmp_path):
    with pytest.raises(ShardError, match=r"holds no finished shards"):
        make(tmp_path / "l", shards=tmp_path)
    write(tmp_path / "empty")
    text = (tmp_path / "empty" / MANIFEST).read_text()
    (tmp_path / "empty" / MANIFEST).write_text(
        json.dumps({**json.loads(text), "clips": 0, "shards": []})
    )
    with pytest.raises(ShardError, match="holds 0 clips"):
        make(tmp_path / "l", shards=tmp_path / "empty")


def test_shards_without_a_readable_clip_leave_nothing(make, tmp_path):
    write(tmp_path / "empty")
    for tar in (tmp_path / "empty").glob("*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(ShardError, match=r"no latents could be made of the clips \(.*empty file"):
        make(tmp_path / "l", shards=tmp_path / "empty", bad_clip_budget=100)
    assert not (tmp_path / "l").exists()


def test_command_line(clips, adapters, wan_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    sources = [f"wan.{part}={wan_folder}" for part in ("vae", "text_encoder")]
    out = f"{tmp_path}/l"
    arguments = [
        f"shards={clips}",
        f"out={out}",
        f"rgba_vae={adapters}",
        "wan=wan21_1b",
        *sources,
        "wan.prompt_length=9",
    ]
    settings = [
        "variants=1",
        "frames=[5,9]",
        "sizes=[[32,32]]",
        "ellipse.threshold=0.75",
        "allow_empty_buckets=true",
    ]
    called("prep cache_latents", *arguments, *settings, "device=cpu")
    manifest = manifest_of(tmp_path / "l")
    assert manifest["prompt_length"] == 9 and manifest["ellipse"]["threshold"] == 0.75
    shown = capsys.readouterr().out
    assert (
        "4 samples of 4 clips, 3 frames left over, 2 clips forth and back" in shown
        and "9x32x32" in shown
    )


def test_other_base_is_refused(make, sources, make_vae, tmp_path):
    make_vae("wan21", seed=5).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="was trained on another base VAE"):
        make(tmp_path / "l", sources=replace(sources, vae=str(tmp_path)))
    assert load_rgba_vae(vae=sources.vae, adapters=sources.rgba_vae).latents_sha256()


def test_variants_show_a_clip_smaller_and_elsewhere(make, cached, tmp_path):
    """Ellipses move with the picture; smallest=1 leaves every variant where it was."""
    make(tmp_path / "placed", smallest=0.4)
    moved = {}
    for folder in (cached, tmp_path / "placed"):
        refs = index_latents(folder, manifest_of(folder))
        ellipses = {
            (ref.clip, ref.window, ref.variant): read_latents(ref)["ellipse"] for ref in refs
        }
        windows = {(clip, window) for clip, window, _ in ellipses}
        moved[folder] = [
            not torch.equal(ellipses[*key, 0], ellipses[*key, 1]) for key in sorted(windows)
        ]
    assert not any(moved[cached])
    assert all(moved[tmp_path / "placed"])


@pytest.mark.parametrize("place", [(0.5, 0.0, 0.0), (0.5, 1.0, 1.0), (0.7, 0.5, 0.25)])
def test_placed_picture_is_whole(place, clips):
    """Scale and place, by hand: an opaque square stays whole on the larger canvas."""
    frames = torch.full((1, 32, 32, 4), 255, dtype=torch.uint8)
    piece = Piece(index_shards([clips])[0], 0, 0, 1, 32, 32, 0)
    _, alpha = cut(frames, piece, place)
    scale, above, before = place
    side, slack = 32 * scale, 32 * (1 - scale)
    assert abs(alpha.sum() - side**2) < 0.06 * side**2
    y = (alpha[0, 0, 0].sum(1) * (torch.arange(32) + 0.5)).sum() / alpha.sum()
    x = (alpha[0, 0, 0].sum(0) * (torch.arange(32) + 0.5)).sum() / alpha.sum()
    assert abs(y - (above * slack + side / 2)) < 0.6
    assert abs(x - (before * slack + side / 2)) < 0.6


def test_latents_of_the_released_vae_checkpoint(wan_folder, sources, tmp_path):
    """Its eps is that of the released code; its decoders alone make no latents."""
    state = wan_alpha_state(
        RGBAVAE(vae=load_vae(str(wan_folder)), merge_init="scratch", lora_rank=2, lora_alpha=1.0)
    )
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save(
        {name: value for name, value in state.items() if ".lora_" in name}, tmp_path / "decoder.bin"
    )
    released = replace(sources, rgba_vae=str(tmp_path / "pytorch_model.bin"))
    encoder = TextEncoder(sources.text_encoder, sources.prompt_length)
    settings = made_by([], released, SETTINGS, released.load_vae(), encoder)["settings"]
    assert settings["eps"] == 0
    with pytest.raises(
        ValueError, match=r"decoder\.bin: these files hold decoders only, and no merge block"
    ):
        replace(sources, rgba_vae=str(tmp_path / "decoder.bin")).load_vae()
