"""Shards in buckets: S3 and Google Cloud Storage, emulated."""

from acetate.data.clips import ClipDataModule
from acetate.data.store import RemoteFolder
from tests.data.served import (  # noqa: F401
    KEYS,
    PER_TAR,
    SETTINGS,
    bucket,
    quick,
    read_all,
    reported,
    server,
    shards,
)


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
