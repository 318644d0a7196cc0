"""Datamodules over shards and latents behind a URL."""

import json

import pytest
import torch

from acetate.data.clips import ClipDataModule
from acetate.data.datamodule import BadDataError
from acetate.data.downloads import FetchError
from acetate.data.latents import LatentDataModule
from acetate.data.shards import ShardError, index_shards
from acetate.data.store import open_folder, read_file
from tests.data.served import (  # noqa: F401
    KEYS,
    PER_TAR,
    SETTINGS,
    TARS,
    bucket,
    damaged,
    quick,
    server,
    shards,
    tar_bytes,
)
from tests.data.written_latents import SETTINGS as LATENTS
from tests.data.written_latents import write as write_latents


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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_a_manifest_ends_at_its_limit(server, tmp_path, fault):
    server.faults["manifest.json"] = [fault] * 9
    folder = open_folder(server.url, quick(tmp_path))
    with pytest.raises(FetchError, match=r"manifest\.json has more than 1,000,000 bytes"):
        read_file(folder, "manifest.json", 10**6)
    assert server.asked.count("manifest.json") == 1  # and is not asked for again
    assert not list(tmp_path.glob("**/*.part"))
