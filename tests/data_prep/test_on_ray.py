"""All that runs on Ray: one small local cluster, on one process of a parallel test run."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import pytest

from acetate.data.shards import MANIFEST, read_manifest
from data_prep.bad_clips import TooManyBad
from data_prep.executor import AHEAD, WorkerLost, parallel
from data_prep.ingest import ingest
from data_prep.synthesize import synthesize
from tests.data_prep.cached_latents import (  # noqa: F401
    adapters,
    cached,
    clips,
    files,
    make,
    manifest_of,
    sources,
)
from tests.data_prep.material import film, still
from tests.data_prep.sharded import (  # noqa: F401
    SETTINGS,
    kill_in_the_middle,
    lines_of,
    source,
    with_a_slow_film,
    with_decisions,
)
from tests.data_prep.sharded import make as make_shards
from tests.data_prep.test_executor import Unlucky, act, fail_to_load, number_and_process

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
on_ray = pytest.importorskip("data_prep.on_ray")
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level="warning",
    )
    yield
    ray.shutdown()


def call(items, function=act, workers=2, **settings):
    return list(parallel(function, items, executor="ray", workers=workers, **settings))


def test_results_come_in_the_order_of_the_items_from_processes_with_state():
    found = call(range(12), number_and_process, setup=int)
    assert [item for _, _, item in found] == list(range(12))
    assert {number for number, _, _ in found} <= {0, 1}
    assert os.getpid() not in {pid for _, pid, _ in found}


def test_exceptions_keep_their_type():
    with pytest.raises(Unlucky, match="clip: torn") as caught:
        call(["a", "raise", "b"])
    assert caught.value.key == "clip" and "In a worker process" in caught.value.__notes__[0]
    with pytest.raises(FileNotFoundError, match="no such weights"):
        call([1], setup=fail_to_load)


def test_lost_items_have_the_reasons_of_one_machine(caplog):
    items = ["a", "kill", "exit", "hang", "slow", "b"]
    settings = {"workers": 1, "time_limit": 2, "lost": "{}: {}".format}
    found = call(items, **settings)
    assert found == list(parallel(act, items, executor="local", **settings))
    assert (
        found[1].startswith("kill: its worker process was ended by SIGKILL")
        and found[-1] == "b done"
    )
    with pytest.raises(WorkerLost, match="clip kill: its worker process was ended by SIGKILL"):
        call(["kill"], name="clip {}".format)


def test_an_item_whose_worker_was_killed_from_outside_is_tried_again(tmp_path):
    assert call([tmp_path / "item", "b"], workers=1, lost="{}: {}".format) == [
        "second time",
        "b done",
    ]
    items = [tmp_path / "actor", "b"]
    assert call(items, kill_ray_once, workers=1, lost="{}: {}".format) == ["second time", "b done"]


def kill_ray_once(item):
    """The Ray worker, with what it runs."""
    if isinstance(item, str) or item.exists():
        return act(item)
    item.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def test_without_a_place_work_goes_to_those_that_have_one(monkeypatch, caplog):
    monkeypatch.setattr(on_ray, "PATIENCE", 2)
    other = ray.remote(on_ray.RayProcess).options(num_cpus=1).remote({}, ".", b"")
    ray.get(other.ready.remote())
    try:
        found = call(range(6), slowly, workers=2)
    finally:
        ray.kill(other)
    assert found == [*range(6)]
    assert (
        "no room on the Ray cluster for worker" in caplog.text
        and "2 of 2 CPUs are taken" in caplog.text
    )


def slowly(item):
    time.sleep(1)
    return item


def test_a_cluster_without_room_is_waited_for(monkeypatch):
    monkeypatch.setattr(on_ray, "PATIENCE", 1)
    other = ray.remote(on_ray.RayProcess).options(num_cpus=2).remote({}, ".", b"")
    ray.get(other.ready.remote())
    # as soon as it is said
    monkeypatch.setattr(on_ray.log, "warning", lambda *said: ray.kill(other))
    assert call(["a"], workers=1) == ["a done"]


def test_a_driver_in_another_folder(tmp_path):
    """With a relative path; Ray's workers know neither that folder nor, by themselves, the
    package."""
    synthesize(out=tmp_path / "clips", clips=4, frames=1, sizes=[64], seed=0, val_fraction=0.5,
        max_clips=9,
               max_bytes=10**9)  # fmt: skip
    command = [
        "shards=clips",
        "out=kept",
        "duplicates=null",
        "rules={}",
        "executor=ray",
        "workers=1",
    ]
    there = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join(on_ray.ROOTS),
    }
    driver = [sys.executable, "-m", "data_prep.filter", *command]
    subprocess.run(driver, cwd=tmp_path, env={**os.environ, **there}, check=True)
    assert read_manifest(tmp_path / "kept")["clips"] == 4


def test_an_address_where_nothing_listens_is_named(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"RAY_ADDRESS={address}: nothing answers there"):
        on_ray.check_address(address)
    on_ray.check_address("auto")


def test_leaving_early_frees_the_cluster():
    taken = []
    with closing(
        parallel(act, (taken.append(i) or i for i in range(10**9)), executor="ray", workers=2)
    ) as results:
        assert next(results) == "0 done" and len(taken) <= 1 + 2 * AHEAD
    assert call(["a"]) == ["a done"]


def test_more_workers_than_the_cluster_has(caplog):
    found = call(range(12), number_and_process, workers=5, setup=int)
    assert [item for _, _, item in found] == list(range(12)) and {
        number for number, _, _ in found
    } <= {0, 1}
    assert (
        "workers=5; this Ray cluster (2 CPUs, 0 GPUs) has room for 2, which are used" in caplog.text
    )
    with pytest.raises(
        ValueError,
        match=r"A worker needs 1 CPU and 0\.5 GPUs of one node; this Ray cluster has 2 CPUs",
    ):
        call([], workers=1, gpus=0.5)


def test_ingest_finds_the_same_also_after_a_restart(tmp_path):
    media = tmp_path / "media"
    for i in range(3):
        still(media / "walk" / f"{i}.png")
    film(media / "wave.mov", codec="qtrle", pixels="argb")
    still(media / "opaque.png", channels=3)
    (media / "broken.webm").write_bytes(b"no film")
    settings = {"source": media, "workers": 1}
    ingest(out=tmp_path / "here" / "found.jsonl", bad_clip_budget=2, executor="local", **settings)
    there = {"out": tmp_path / "there" / "found.jsonl", "executor": "ray", **settings}
    with pytest.raises(TooManyBad, match="2 bad clips"):
        ingest(bad_clip_budget=0, **there)
    journal = tmp_path / "there" / "found.journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]) + lines[2][:20])  # killed as it wrote the third
    ingest(bad_clip_budget=2, **there)
    assert len(lines) == 4 and files(tmp_path / "there") == files(tmp_path / "here")
    assert len(there["out"].read_text().splitlines()) == 2


def test_clip_shards_have_the_same_bytes_also_after_a_kill(source, tmp_path):
    settings = replace(SETTINGS, max_frames=121, bleed=None)  # the command's
    with_a_slow_film(source)
    make_shards(source, tmp_path / "first", settings)
    with_decisions(source, lines_of(tmp_path / "first"))
    limits = {"max_clips": 2, "max_bytes": 2**30}
    make_shards(source, tmp_path / "here", settings, **limits)
    there = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    kill_in_the_middle(source, tmp_path / "killed", "ray", {**os.environ, **there})
    make_shards(source, tmp_path / "killed", settings, **limits, executor="ray", workers=1)
    assert files(tmp_path / "killed") == files(tmp_path / "here")


def test_latent_shards_have_the_same_bytes_also_after_a_restart(make, cached, tmp_path):
    out = tmp_path / "l"
    make(out, executor="ray", workers=1)
    assert files(out) == files(cached)
    for name in (MANIFEST, "latents-000001.tar", "latents-000001.part.json"):
        (out / name).unlink()
    (out / "latents-000001.tar.tmp").write_bytes(b"half a tar")
    assert make(out, executor="ray", workers=1) == manifest_of(cached)
    assert files(out) == files(cached)
