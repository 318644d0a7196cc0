import gzip
import json
import multiprocessing
import os
import pickle
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pytest
import torch

from acetate.data import store
from acetate.data.clips import ClipDataModule
from acetate.data.datamodule import BadDataError
from acetate.data.downloads import FetchError
from acetate.data.latents import LatentDataModule
from acetate.data.shards import BadClip, ShardError, index_shards, read_clip, read_manifest
from acetate.data.store import Remote, RemoteFolder, open_folder, read_file
from acetate.data.writer import ShardWriter, encode_clip
from tests.data.test_latents import SETTINGS as LATENTS
from tests.data.test_latents import write as write_latents

TARS, PER_TAR = 4, 3
KEYS = [f"clip{i:02d}" for i in range(TARS * PER_TAR)]
SETTINGS = {
    "frames": 5, "height": 16, "width": 16, "batch_size": 5, "seed": 0, "num_workers": 0,
    "val_batch_size": 2,
    "val_clips": 2, "bad_clip_budget": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    with ShardWriter(out, max_clips=PER_TAR, max_bytes=10**9, made_by={}) as writer:
        for i, key in enumerate(KEYS):
            pixels = np.random.default_rng(i).integers(0, 256, (5, 16, 16, 4), dtype=np.uint8)
            writer.add(key, encode_clip(pixels, 16), split="val" if i % PER_TAR == 2 else "train",
                prompt=key,
                       source="", licence="", lossy=False, premultiplied_source=False)  # fmt: skip
    return out


class Handler(BaseHTTPRequestHandler):
    """Serves `source`, a folder or the URL of another server, with the faults that wait for a
    file's name."""

    def __init__(self, *args, source, faults, asked):
        self.source, self.faults, self.asked = source, faults, asked
        super().__init__(*args)

    def do_GET(self):
        name = unquote(urlsplit(self.path).path).rsplit("/")[-1]
        if self.command == "GET":
            self.asked.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        status, headers, body = (500, {}, b"broken") if fault == "500" else self.found()
        if fault == "late":
            time.sleep(0.8)
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        if fault == "bomb":
            self.send_header("Content-Encoding", "gzip")
            body = gzip.compress(b" " * 10**8)
        if fault != "endless":
            self.send_header("Content-Length", headers.get("Content-Length") or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "endless":
            with suppress(OSError):
                while True:
                    self.wfile.write(body * 1000)
        if fault == "slow":  # all of it, over longer than the tests' timeout
            for i in range(16):
                self.wfile.write(body[i * len(body) // 16 : (i + 1) * len(body) // 16])
                time.sleep(0.2)
            return
        with suppress(OSError):  # nobody waits for it any more
            self.wfile.write(
                body[: len(body) // 2] if fault and fault not in ("late", "bomb") else body
            )
        if fault == "stall":
            self.wfile.flush()
            time.sleep(4)
        if isinstance(fault, threading.Event):  # the other half comes after it
            self.wfile.flush()
            fault.wait(60)
            with suppress(OSError):  # nobody waits for it any more
                self.wfile.write(body[len(body) // 2 :])
        self.close_connection = bool(fault)

    do_HEAD = do_GET

    def found(self):
        if isinstance(self.source, Path):
            path = self.source / self.path.lstrip("/")
            return (200, {}, path.read_bytes()) if path.exists() else (404, {}, b"")
        request = urllib.request.Request(
            self.source + self.path, method=self.command, headers=dict(self.headers)
        )
        try:
            with urllib.request.urlopen(request) as answer:
                kept = {
                    k: v
                    for k, v in answer.headers.items()
                    if k.lower() not in ("content-length", "connection")
                }
                return answer.status, kept, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, {}, error.read()

    def log_message(self, *_):
        return


class Server:
    def __init__(self, source):
        self.source, self.faults, self.asked = source, {}, []

    @contextmanager
    def run(self):
        handler = partial(Handler, source=self.source, faults=self.faults, asked=self.asked)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        yield self
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "served")
    with Server(tmp_path / "served").run() as running:
        yield running


def quick(tmp_path, **settings):
    return Remote(
        **(
            {"cache_dir": tmp_path / "cache", "retries": 2, "backoff": 0.01, "timeout": 5}
            | settings
        )
    )


def tar_bytes(shards):
    return max(path.stat().st_size for path in shards.glob("*.tar"))


def used(cache):
    total = 0
    for path in cache.iterdir():
        with suppress(FileNotFoundError):  # gone or renamed meanwhile
            total += path.stat().st_size if path.suffix in (".tar", ".part") else 0
    return total


def read_all(folder):
    """key -> frames, or the reason why there are none."""
    results = {}
    for ref in index_shards([folder]):
        try:
            results[ref.key] = read_clip(ref).frames
        except BadClip as bad:
            results[ref.key] = bad.reason
    return results


def reported(results):
    return {key: reason for key, reason in results.items() if isinstance(reason, str)}


def test_local_folders_are_read_in_place(shards):
    folder = open_folder(str(shards), None)
    assert folder == shards and isinstance(folder, Path)
    assert json.loads(read_file(folder, "manifest.json")) == read_manifest(shards)


@pytest.mark.parametrize("protocol", ["http", "memory"])
def test_remote_clips_equal_local_ones_and_each_tar_comes_once(shards, server, tmp_path, protocol):
    url = server.url
    if protocol == "memory":
        url = f"memory://{tmp_path.name}"
        for path in shards.iterdir():
            fsspec.filesystem("memory").pipe(f"{url}/{path.name}", path.read_bytes())
    folder = open_folder(url, quick(tmp_path))
    expected = read_all(shards)
    for _ in range(2):
        found = read_all(folder)
        assert found.keys() == expected.keys() and all(
            np.array_equal(found[key], expected[key]) for key in found
        )
    if protocol == "http":
        assert sorted(name for name in server.asked if name.endswith("tar")) == sorted(
            p.name for p in shards.glob("*.tar")
        )
    assert not list((tmp_path / "cache").glob("*.part"))


def test_index_fetches_no_tar(server, tmp_path):
    refs = index_shards([open_folder(server.url + "/", quick(tmp_path))])
    assert [ref.key for ref in refs] == KEYS and server.asked == ["manifest.json"]


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_the_umask_decides_who_shares_the_cache(server, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert not reported(read_all(open_folder(server.url, quick(tmp_path))))
    finally:
        os.umask(before)
    made = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert made == {".tar": 0o666 & ~umask, ".lock": 0o666 & ~umask}


@pytest.mark.parametrize("fault", ["500", "cut", "stall"])
def test_faults_are_survived(server, tmp_path, fault):
    server.faults |= {"manifest.json": [fault], "clips-000001.tar": [fault, fault]}
    assert not reported(
        read_all(open_folder(server.url, quick(tmp_path, timeout=1 if fault == "stall" else 5)))
    )
    assert server.asked.count("clips-000001.tar") == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "in 3 tries; .*500"), ("cut", "in 3 tries"), ("stall", "nothing came for 1 s")],
)
def test_past_the_retries_a_tars_clips_are_reported(server, tmp_path, fault, reason):
    server.faults["clips-000001.tar"] = [fault] * 100
    bad = reported(read_all(open_folder(server.url, quick(tmp_path, timeout=1))))
    assert [*bad] == KEYS[3:6]
    assert server.asked.count("clips-000001.tar") == 3  # once for all of its clips
    assert re.search(reason, bad["clip03"])


def test_missing_and_damaged_tars_are_reported(server, tmp_path):
    (server.source / "clips-000000.tar").unlink()
    whole = (server.source / "clips-000001.tar").read_bytes()
    (server.source / "clips-000001.tar").write_bytes(whole[:-100])
    flipped = (server.source / "clips-000002.tar").read_bytes()[::-1]
    (server.source / "clips-000002.tar").write_bytes(flipped)
    bad = reported(read_all(open_folder(server.url, quick(tmp_path))))
    assert [*bad] == KEYS[:9]
    assert (
        "clips-000000.tar does not exist" in bad["clip00"]
        and server.asked.count("clips-000000.tar") == 1
    )
    assert f"{len(whole) - 100} bytes came, the manifest says {len(whole)}" in bad["clip03"]
    assert "its SHA-256 is not the manifest's" in bad["clip06"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_failed_tar_is_asked_for_again_later(server, tmp_path, monkeypatch):
    server.faults["clips-000000.tar"] = ["500"] * 3
    folder = open_folder(server.url, quick(tmp_path))
    assert len(reported(read_all(folder))) == PER_TAR
    monkeypatch.setattr(store, "FORGET", 0.0)
    assert not reported(read_all(folder))


def test_cache_keeps_its_bound_and_the_tars_in_use(shards, server, tmp_path):
    remote = quick(tmp_path, cache_gb=2.5 * tar_bytes(shards) / 2**30)
    refs = {ref.key: ref for ref in index_shards([open_folder(server.url, remote)])}
    most, stop = 0, threading.Event()

    def watch():
        nonlocal most
        while not stop.is_set():
            most = max(most, used(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with refs["clip00"].tar.parent.remote.open(refs["clip00"].tar) as held:
        for key in ("clip00", "clip03", "clip00", "clip06", "clip00", "clip09", "clip03"):
            read_clip(refs[key])
        assert len(held.read()) == refs["clip00"].tar.size
    stop.set()
    watcher.join()
    assert 2 * 0.9 * tar_bytes(shards) < most <= remote.max_bytes
    assert server.asked.count("clips-000000.tar") == 1  # always the last but one
    assert server.asked.count("clips-000001.tar") == 2


def hold_all_room(remote, held):
    with remote._part(remote.max_bytes):
        held.set()
        time.sleep(60)


def test_a_killed_download_gives_its_room_back_at_once(tmp_path):
    remote, held = quick(tmp_path, cache_gb=1.0), multiprocessing.Event()
    process = multiprocessing.Process(target=hold_all_room, args=(remote, held))
    process.start()
    assert held.wait(60) and remote._reserve(1) is None
    process.kill()
    process.join()
    with remote._part(remote.max_bytes) as part:
        assert [*remote.cache_dir.glob("*.part")] == [part]
    assert not list(remote.cache_dir.glob("*.part"))


def test_a_server_that_answers_too_late_leaves_nothing_behind(server, tmp_path):
    server.faults["clips-000001.tar"] = ["late"]
    assert not reported(read_all(open_folder(server.url, quick(tmp_path, timeout=0.5))))
    time.sleep(2)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_slow_is_not_lost(server, tmp_path):
    """As long as something comes, a download may take longer than the timeout."""
    server.faults["clips-000001.tar"] = ["slow"]
    assert not reported(read_all(open_folder(server.url, quick(tmp_path, timeout=2.0))))
    assert server.asked.count("clips-000001.tar") == 1
    assert (
        store.in_one_stream("https://host", 1.0)[0]["timeout"].total is None
    )  # aiohttp's ends at 300 s


def test_more_than_was_promised_is_broken_off(server, tmp_path):
    tar = server.source / "clips-000001.tar"
    promised = tar.stat().st_size
    tar.write_bytes(tar.read_bytes() * 20)
    server.faults["clips-000001.tar"] = ["slow"]
    bad = reported(read_all(open_folder(server.url, quick(tmp_path, retries=0))))
    assert [*bad] == KEYS[
        3:6
    ] and f"more than the {promised} bytes come that the manifest says" in bad["clip03"]


def test_processes_of_a_run_share_what_failed(server, tmp_path):
    server.faults["clips-000001.tar"] = ["500"] * 9
    remote = quick(tmp_path)
    folders = [RemoteFolder(server.url, pickle.loads(pickle.dumps(remote))) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert all([*reported(found)] == KEYS[3:6] for found in threads.map(read_all, folders))
    assert server.asked.count("clips-000001.tar") == 3
    # another run asks anew
    assert len(reported(read_all(open_folder(server.url, quick(tmp_path))))) == PER_TAR
    assert server.asked.count("clips-000001.tar") == 6


def test_what_is_damaged_in_the_cache_is_fetched_again(server, tmp_path):
    read_all(open_folder(server.url, quick(tmp_path)))
    cached = sorted((tmp_path / "cache").glob("*.tar"))
    cached[0].write_bytes(cached[0].read_bytes()[:100])
    cached[1].write_bytes(b"")
    (tmp_path / "cache/notes.part").touch()  # no file of ours
    assert not reported(read_all(open_folder(server.url, quick(tmp_path))))
    assert len([name for name in server.asked if name.endswith("tar")]) == TARS + 2


def test_a_reference_takes_no_table_of_members_along(server, tmp_path):
    refs = index_shards([open_folder(server.url, quick(tmp_path))])
    before = len(pickle.dumps(refs[0]))
    for ref in refs:
        read_clip(ref)
    assert len(pickle.dumps(refs[0])) == before


def test_options_of_one_protocol(tmp_path):
    remote = quick(
        tmp_path,
        storage_options={"anon": True, "s3": {"key": "k"}, "http": {"headers": {"a": "b"}}},
    )
    assert remote._options("s3://b") == {"anon": True, "key": "k"} and remote._options(
        "gs://b"
    ) == {"anon": True}
    assert remote._options("http://host/a") == {"anon": True, "headers": {"a": "b"}}


def test_workers_share_the_cache(server, tmp_path):
    data = ClipDataModule(
        shards=server.url, remote=quick(tmp_path), **(SETTINGS | {"num_workers": 2})
    )
    data.setup()
    batches = iter(data.train_dataloader())
    found = [next(batches) for _ in range(4)]
    del batches
    assert not any(batch["skipped"] for batch in found)
    assert sorted(name for name in server.asked if name.endswith("tar")) == [
        f"clips-{i:06d}.tar" for i in range(TARS)
    ]


def test_remote_order_is_one_of_blocks_and_crops_equal_local_ones(shards, server, tmp_path):
    def epoch(place, **settings):
        data = ClipDataModule(shards=place, **(SETTINGS | {"batch_size": 8} | settings))
        data.setup()
        batch = next(iter(data.train_dataloader()))
        return dict(zip(batch["key"], batch["rgb"], strict=True)), data._fingerprint()

    remote = quick(tmp_path)
    local, plain = epoch(str(shards))
    blocks, one = epoch(server.url, remote=remote, shuffle_tars=1)
    assert (
        all(torch.equal(local[key], blocks[key]) for key in local) and local.keys() == blocks.keys()
    )
    tars = [KEYS.index(key) // PER_TAR for key in blocks]
    assert all(tars[i] == tars[i + 1] for i in range(0, 8, 2))
    assert len({plain, one, epoch(server.url, remote=remote, shuffle_tars=2)[1]}) == 3


def test_an_epoch_that_goes_on_on_other_ranks_has_every_clip_once(server, tmp_path):
    """Two ranks, then three, which do not divide it, then one; data workers and remote tars."""
    remote, state, seen = quick(tmp_path), None, []
    for world, batch_size in ((2, 1), (3, 1), (1, 3)):
        for rank in range(world):
            settings = SETTINGS | {"batch_size": batch_size, "num_workers": 1}
            data = ClipDataModule(shards=server.url, remote=remote, shuffle_tars=2, **settings)
            data.setup()
            data._rank_and_world = lambda place=(rank, world): place
            if state:
                data.load_state_dict(state)
            seen += next(iter(data.train_dataloader()))["key"]
        state = {"consumed": len(seen), "order": data._fingerprint()}
    assert sorted(seen) == [key for i, key in enumerate(KEYS) if i % PER_TAR < 2]


def test_budget_counts_what_cannot_be_fetched(server, tmp_path):
    (server.source / "clips-000000.tar").unlink()
    data = ClipDataModule(
        shards=server.url, remote=quick(tmp_path), **(SETTINGS | {"bad_clip_budget": 1})
    )
    data.setup()
    with pytest.raises(BadDataError, match=r"2 bad clips, bad_clip_budget=1: .*does not exist"):
        for batch in data.train_dataloader():
            data.on_before_batch_transfer(batch, 0)


def test_latents_come_from_a_url(server, tmp_path):
    write_latents(server.source / "latents")
    remote = quick(tmp_path)
    data = LatentDataModule(
        latents=f"{server.url}/latents", remote=remote, shuffle_tars=1, **LATENTS
    )
    data.setup()
    local = LatentDataModule(latents=str(server.source / "latents"), **LATENTS)
    local.setup()
    batches = iter(data.train_dataloader())
    assert not any(next(batches)["skipped"] for _ in range(5))
    for batch, expected in zip(data.val_dataloader(), local.val_dataloader(), strict=True):
        assert batch["key"] == expected["key"] and torch.equal(
            batch["latents"], expected["latents"]
        )


def test_setup_errors(shards, server, tmp_path):
    with pytest.raises(ValueError, match=r"need `remote`"):
        ClipDataModule(shards="s3://bucket/clips", **SETTINGS)
    with pytest.raises(ValueError, match="s3:// names no bucket or host"):
        open_folder("s3://", quick(tmp_path))
    with pytest.raises(ValueError, match="nonsense://x cannot be read: Protocol not known"):
        open_folder("nonsense://x", quick(tmp_path))
    with pytest.raises(ShardError, match="holds no finished shards"):
        index_shards([open_folder(f"{server.url}/nowhere", quick(tmp_path))])
    server.faults["manifest.json"] = ["500"] * 3
    with pytest.raises(ShardError, match=r"manifest\.json cannot be read: .*in 3 tries"):
        index_shards([open_folder(server.url, quick(tmp_path))])
    small = quick(tmp_path, cache_gb=1e-6)
    with pytest.raises(ShardError, match=r"more than the cache may hold; raise cache_gb"):
        index_shards([open_folder(server.url, small)])
    two = quick(tmp_path, cache_gb=2.5 * tar_bytes(shards) / 2**30)
    data = ClipDataModule(shards=server.url, remote=two, shuffle_tars=3, **SETTINGS)
    data.setup()
    with pytest.raises(
        ShardError, match=r"shuffle_tars=3 needs .*Raise remote\.cache_gb or lower shuffle_tars"
    ):
        data.train_dataloader()
    with pytest.raises(ValueError, match="retries=-1; must be at least 0"):
        quick(tmp_path, retries=-1)
    with pytest.raises(ValueError, match="timeout=0; must be above 0"):
        quick(tmp_path, timeout=0)


def damaged(name, value):
    """What makes another manifest of one: a field of its first tar, or one of its own."""

    def damage(manifest):
        place = (
            manifest["shards"][0] if name in manifest["shards"][0] and name != "clips" else manifest
        )
        if value is None:
            del place[name]
        else:
            place[name] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [damaged("clips", None), damaged("shards", None), damaged("sha256", None), damaged("sha256", 5),
     damaged("sha256", "../x"), damaged("bytes", "5"), damaged("shards", [None]),
     lambda manifest: manifest["shards"][0]["clips"][0].pop("crc32"),
     lambda manifest: manifest["shards"][0]["clips"][0].update(more=1)],
)  # fmt: skip
def test_damaged_manifests(server, tmp_path, damage):
    path = server.source / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        ShardError, match=r"manifest\.json: (shards|clips).*acetate prep shard` make"
    ):
        index_shards([open_folder(server.url, quick(tmp_path))])


@contextmanager
def s3():
    """Address and storage options of a server of its own."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    moto.start()
    address = "http://{}:{}".format(*moto.get_host_and_port())
    # So small a block that pieces of each tar would be fetched at once
    yield (
        address,
        {
            "key": "k",
            "secret": "s",
            "default_block_size": 1024,
            "config_kwargs": {"retries": {"max_attempts": 1}},
        },
    )
    moto.stop()


@contextmanager
def gs():
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server").create_server(
        "127.0.0.1", 0, in_memory=True
    )
    emulator.start()
    yield f"http://127.0.0.1:{emulator._api._httpd.server_port}", {"token": "anon", "project": "p"}
    emulator.stop()


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, shards):
    """URL of clips of which one tar is damaged and one is missing, options to read it, and the
    server in front of it that makes mistakes."""
    with (
        {"s3": s3, "gs": gs}[request.param]() as (address, options),
        Server(address).run() as faulty,
    ):
        files = fsspec.filesystem(request.param, endpoint_url=address, **options)
        files.mkdir("bucket")
        for path in shards.iterdir():
            files.pipe(f"bucket/clips/{path.name}", path.read_bytes())
        files.pipe(
            "bucket/clips/clips-000002.tar", (shards / "clips-000002.tar").read_bytes()[:-512]
        )
        files.rm("bucket/clips/clips-000003.tar")
        yield f"{request.param}://bucket/clips", options | {"endpoint_url": faulty.url}, faulty


def test_buckets(bucket, tmp_path):
    url, options, server = bucket
    server.faults |= {
        "manifest.json": ["500"],
        "clips-000000.tar": ["500"],
        "clips-000001.tar": ["stall", "cut", "slow"],
    }
    remote = quick(tmp_path, storage_options={url.split("://")[0]: options}, timeout=2, retries=3)
    bad = reported(read_all(RemoteFolder(url, remote)))
    assert not any(server.faults.values()) and [*bad] == KEYS[6:]
    assert "bytes came, the manifest says" in bad["clip06"] and "does not exist" in bad["clip09"]


def test_workers_read_buckets(bucket, tmp_path):
    """An epoch on two workers: every clip comes, or is reported."""
    url, options, server = bucket
    server.faults |= {"clips-000000.tar": ["cut"], "clips-000001.tar": ["500"]}
    settings = SETTINGS | {"num_workers": 2, "batch_size": 2, "bad_clip_budget": 4}
    data = ClipDataModule(shards=url, remote=quick(tmp_path, storage_options=options), **settings)
    data.setup()
    batches = iter(data.train_dataloader())
    found = [next(batches) for _ in range(len(data.train_refs) // 2)]
    del batches
    train = [key for i, key in enumerate(KEYS) if i % PER_TAR < 2]
    assert sorted(key for batch in found for key in batch["key"]) == train[:4]
    assert (
        sorted(text.partition(":")[0] for batch in found for text in batch["skipped"]) == train[4:]
    )


def test_fetch_errors_are_os_errors():
    assert issubclass(FetchError, OSError)  # which blame() makes into a BadClip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_a_manifest_ends_at_its_limit(server, tmp_path, fault):
    server.faults["manifest.json"] = [fault] * 9
    folder = open_folder(server.url, quick(tmp_path))
    with pytest.raises(FetchError, match=r"manifest\.json has more than 1,000,000 bytes"):
        read_file(folder, "manifest.json", 10**6)
    assert server.asked.count("manifest.json") == 1  # and is not asked for again
    assert not list(tmp_path.glob("**/*.part"))
