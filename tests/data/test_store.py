import json
import multiprocessing
import os
import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from acetate.data import store
from acetate.data.downloads import FetchError
from acetate.data.shards import index_shards, read_clip, read_manifest
from acetate.data.store import RemoteFolder, open_folder, read_file
from tests.data.served import (  # noqa: F401
    KEYS,
    PER_TAR,
    TARS,
    quick,
    read_all,
    reported,
    server,
    shards,
    tar_bytes,
)


def used(cache):
    total = 0
    for path in cache.iterdir():
        with suppress(FileNotFoundError):  # gone or renamed meanwhile
            total += path.stat().st_size if path.suffix in (".tar", ".part") else 0
    return total


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
    patience = {"timeout": 1} if fault == "stall" else {}
    assert not reported(read_all(open_folder(server.url, quick(tmp_path, **patience))))
    assert server.asked.count("clips-000001.tar") == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "in 3 tries; .*500"), ("cut", "in 3 tries"), ("stall", "nothing came for 1 s")],
)
def test_past_the_retries_a_tars_clips_are_reported(server, tmp_path, fault, reason):
    server.faults["clips-000001.tar"] = [fault] * 100
    patience = {"timeout": 1} if fault == "stall" else {}
    bad = reported(read_all(open_folder(server.url, quick(tmp_path, **patience))))
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


def test_fetch_errors_are_os_errors():
    assert issubclass(FetchError, OSError)  # which blame() makes into a BadClip
