"""Tars that come before their clips are asked for: by the order of events, since a server holds
answers back."""

import threading
import time

import pytest
import torch

from acetate.data.clips import ClipDataModule
from acetate.data.latents import LatentDataModule
from acetate.data.shards import BadClip
from tests.data.served import PER_TAR, SETTINGS, TARS, quick, server, shards, tar_bytes  # noqa: F401
from tests.data.written_latents import SETTINGS as LATENTS
from tests.data.written_latents import write as write_latents
from tests.processes import FORKS

PER_EPOCH = TARS * (PER_TAR - 1)  # one clip of every tar is for validation


def dataset_of(server, remote, consumed=0):
    """Of training, a tar at a time; and the names of the tars in the order of the positions."""
    data = ClipDataModule(shards=server.url, remote=remote, shuffle_tars=1, **SETTINGS)
    data.setup()
    dataset = data.train_dataloader().dataset
    return dataset, [
        dataset.refs[dataset.order[position][1]].tar.name for position in range(2 * PER_EPOCH)
    ]


def until(true):
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def read(dataset, position):
    """The sample; afterwards nothing is under way for it."""
    sample = dataset[position]
    until(lambda: dataset.ahead.fetch.done())
    return sample


def asked(server):
    return [name for name in server.asked if name.endswith(".tar")]


def test_the_next_tar_comes_while_clips_are_read(server, tmp_path):
    dataset, tars = dataset_of(server, quick(tmp_path))
    second, held = tars[2], threading.Event()
    server.faults[second] = [held]
    first = read(dataset, 0)
    assert first["rgb"].shape[0] == 3 and asked(server) == [tars[0]]
    dataset[1]
    until(lambda: second in server.asked)
    assert torch.equal(dataset[0]["rgb"], first["rgb"]) and not dataset.ahead.fetch.done()
    held.set()
    assert "rgb" in dataset[2] and asked(server) == [tars[0], second]


def test_tars_that_are_needed_fill_a_part_of_the_cache(server, shards, tmp_path):
    remote = quick(tmp_path, cache_gb=2.8 * tar_bytes(shards) / 2**30)
    dataset, tars = dataset_of(server, remote)
    for _ in range(5):
        read(dataset, 0)
    assert asked(server) == [tars[0], tars[2]]
    for position in range(PER_EPOCH):
        assert "rgb" in read(dataset, position)
    assert asked(server)[:TARS] == tars[:PER_EPOCH:2]


def test_skipped_tars_are_not_fetched(server, shards, tmp_path):
    dataset, tars = dataset_of(server, quick(tmp_path, cache_gb=2.8 * tar_bytes(shards) / 2**30))
    for _ in range(3):
        read(dataset, 4)
    assert asked(server) == [tars[4], tars[6]]


def test_what_cannot_be_fetched_is_reported_where_it_belongs(server, tmp_path):
    dataset, tars = dataset_of(server, quick(tmp_path))
    server.faults[tars[2]] = ["500"] * 100
    found = [read(dataset, position) for position in (0, 1, 1, 2, 3, 4)]
    assert [isinstance(sample, BadClip) for sample in found] == [False] * 3 + [True] * 2 + [False]
    assert found[3].key == dataset.refs[dataset.order[2][1]].key and "in 3 tries" in found[3].reason
    assert asked(server).count(tars[2]) == 3


def test_clips_of_other_ranks_are_passed_over(server, tmp_path):
    data = ClipDataModule(shards=server.url, remote=quick(tmp_path), shuffle_tars=1, **SETTINGS)
    data.setup()
    data._rank_and_world = lambda: (0, 4)
    dataset = data.train_dataloader().dataset
    tars = [dataset.refs[dataset.order[position][1]].tar.name for position in (0, 4, 8, 12)]
    for _ in range(5):
        read(dataset, 0)
    assert asked(server) == list(dict.fromkeys(tars[:2]))


def test_latents_come_ahead_too(server, tmp_path):
    write_latents(server.source / "latents")
    data = LatentDataModule(
        latents=f"{server.url}/latents", remote=quick(tmp_path), shuffle_tars=1, **LATENTS
    )
    data.setup()
    loader = data.train_dataloader()
    coming = {window[0].tar.name for window in data.train_windows}
    batches = iter(loader)
    for _ in range(3):
        next(batches)
        until(lambda: loader.dataset.ahead.fetch.done())
    assert len(coming) > 1 and set(asked(server)) == coming


@pytest.mark.parametrize("buckets", [1, 4])
def test_tars_of_waiting_windows_stay(server, tmp_path, buckets):
    """Batches of a bucket come from windows walked long before: their tars are known to be
    needed."""
    clips = {f"{i:03}": ("train", (2, 2, 2 + i % buckets)) for i in range(96)} | {
        "v": ("val", (2, 2, 2))
    }
    folder = write_latents(server.source / "latents", clips, variants=1, tars=12)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    remote = quick(tmp_path, cache_gb=6.5 * size / 2**30)
    settings = LATENTS | {"batch_size": 8}
    data = LatentDataModule(
        latents=f"{server.url}/latents", remote=remote, shuffle_tars=2, **settings
    )
    data.setup()
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(4 * 12):
        assert not next(batches)["skipped"]
        until(lambda: loader.dataset.ahead.fetch.done())
    assert len(asked(server)) <= 4 * 12 * 1.5


def read_one_and_leave(url, folder):
    remote = quick(folder)
    data = ClipDataModule(shards=url, remote=remote, shuffle_tars=1, **SETTINGS)
    data.setup()
    dataset = data.train_dataloader().dataset
    read(dataset, 0)
    dataset[1]
    until(lambda: any(part.stat().st_size for part in remote.cache_dir.glob("*.part")))


def test_a_process_ends_in_the_middle_of_a_download(server, tmp_path):
    _, tars = dataset_of(server, quick(tmp_path))
    held = threading.Event()
    server.faults[tars[2]] = [held]
    process = FORKS.Process(target=read_one_and_leave, args=(server.url, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not list((tmp_path / "cache").glob("*.part"))  # its room in the cache is free again
    held.set()
