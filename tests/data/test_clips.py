import logging

import lightning
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from acetate.data import clips
from acetate.data.clips import ClipDataModule, ClipReader, TrainBatches, ValBatches
from acetate.data.datamodule import BadDataError
from acetate.data.shards import MANIFEST, ShardError, index_shards, read_clip
from acetate.data.writer import ShardWriter, encode_clip
from tests.data.clip_module import (
    SETTINGS,
    TRAIN,
    VAL,
    break_clip,
    clip,
    first,
    fit,
    module,
    ready,
    shards,  # noqa: F401
    write,
)


def test_batch(shards):
    (batch,) = first(ready(shards).train_dataloader(), 1)
    assert batch["rgb"].shape == (4, 3, 5, 16, 16) and batch["alpha"].shape == (4, 1, 5, 16, 16)
    assert batch["rgb"].dtype == batch["alpha"].dtype == torch.float32
    assert batch["rgb"].min() >= -1 and batch["rgb"].max() <= 1
    assert batch["alpha"].min() >= 0 and batch["alpha"].max() <= 1
    assert [int(prompt.split()[1]) for prompt in batch["prompt"]] == [
        int(key[4:]) for key in batch["key"]
    ]
    assert batch["skipped"] == []


@pytest.mark.parametrize("start", [0, 24])
def test_ranks_share_one_order(start):
    def global_steps(world):
        ranks = [
            iter(TrainBatches(lambda: start, 12 // world, rank, world)) for rank in range(world)
        ]
        return [sorted(position for rank in ranks for position in next(rank)) for _ in range(5)]

    assert global_steps(1) == global_steps(2) == global_steps(4)
    assert global_steps(1)[0] == list(range(start, start + 12))


def test_train_loader_has_no_length(shards):
    loader = ready(shards).train_dataloader()
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_crops_do_not_depend_on_workers_or_shards(shards, tmp_path, workers):
    expected = first(ready(shards).train_dataloader(), 5)
    other = ready(write(tmp_path, max_clips=100), num_workers=workers)
    torch.manual_seed(workers)  # the global generator plays no part
    for batch, wanted in zip(first(other.train_dataloader(), 5), expected, strict=True):
        assert batch["key"] == wanted["key"]
        assert torch.equal(batch["rgb"], wanted["rgb"]) and torch.equal(
            batch["alpha"], wanted["alpha"]
        )


def test_seed_and_epoch_change_the_crops(shards):
    def pictures(seed):
        batches = first(ready(shards, seed=seed, batch_size=TRAIN).train_dataloader(), 2)
        return [dict(zip(batch["key"], batch["rgb"], strict=True)) for batch in batches]

    (one, two), (other, _) = pictures(0), pictures(1)
    assert one.keys() == two.keys() == other.keys() and len(one) == TRAIN
    for key in ("clip01", "clip03"):
        assert not torch.equal(one[key], two[key]) and not torch.equal(one[key], other[key])


def test_validation_is_fixed_and_split_without_repeats(shards):
    loader = ready(shards).val_dataloader()
    runs = [[(batch["key"], batch["rgb"]) for batch in loader] for _ in range(2)]
    assert sorted(key for keys, _ in runs[0] for key in keys) == [
        f"clip{i:02d}" for i in range(2, 16, 3)
    ]
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(*runs, strict=True))
    # another seed, the same pictures
    few = list(ready(shards, val_clips=3, seed=9).val_dataloader())
    assert [key for batch in few for key in batch["key"]] == [
        key for keys, _ in runs[0] for key in keys
    ][:3]
    assert torch.equal(few[0]["rgb"], runs[0][0][1])
    for world in (1, 2, 3, 8):
        parts = [list(ValBatches(5, 2, rank, world)) for rank in range(world)]
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(5))


def test_resume_takes_the_next_batch(shards, tmp_path):
    whole, data, _ = fit(shards, tmp_path, 12)
    assert data.consumed == 48
    # fetches ahead of what it trains on
    start, _, trainer = fit(shards, tmp_path, 7, num_workers=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["ClipDataModule"]
    assert state["consumed"] == 28
    rest, data, _ = fit(shards, tmp_path, 12, resume=tmp_path / "a.ckpt")
    assert start.seen + rest.seen == whole.seen
    assert data.consumed == 48


def test_resume_decodes_nothing_of_what_it_skips(shards, tmp_path, monkeypatch):
    _, _, trainer = fit(shards, tmp_path, 7, batch_size=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    read = []
    monkeypatch.setattr(
        clips, "read_clip", lambda ref, span: [read.append(ref.key), read_clip(ref, span)][1]
    )
    rest, _, _ = fit(shards, tmp_path, 8, resume=tmp_path / "a.ckpt", batch_size=3, cache_mb=0)
    trained = [key for key in read if int(key[4:]) % 3 != 2]
    assert trained[:3] == rest.seen[0][0] and len(trained) <= 6  # one batch is fetched ahead


def test_resume_with_another_batch_size_goes_on_at_the_same_clip(shards, tmp_path):
    _, _, trainer = fit(shards, tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rest, data, _ = fit(shards, tmp_path, 6, resume=tmp_path / "a.ckpt", batch_size=2)
    assert data.consumed == 12 + 3 * 2
    whole = [key for batch in first(ready(shards).train_dataloader(), 6) for key in batch["key"]]
    assert [key for keys, _ in rest.seen for key in keys] == whole[12:18]


def test_short_trainer_epochs_go_on(shards, tmp_path):
    whole, _, _ = fit(shards, tmp_path, 8)
    for workers in (0, 1):
        short, _, _ = fit(
            shards,
            tmp_path,
            8,
            trainer_settings={"limit_train_batches": 3, "max_epochs": 9},
            num_workers=workers,
        )
        assert short.seen == whole.seen


def test_validation_does_not_move_the_position(shards, tmp_path):
    task, data, _ = fit(shards, tmp_path, 4)
    assert len(task.validated) >= 2 * VAL and data.consumed == 16


def test_resume_on_other_clips_warns(shards, tmp_path, caplog):
    data = ready(shards, seed=1)
    with caplog.at_level(logging.WARNING):
        data.load_state_dict(ready(shards).state_dict())
    assert "another seed" in caplog.text


def test_bad_clip_leaves_its_batch(tmp_path, caplog):
    write(tmp_path)
    break_clip(tmp_path, "clip03")
    data = ready(tmp_path, batch_size=TRAIN, bad_clip_budget=1)
    batches = first(data.train_dataloader(), 2)
    for batch in batches:
        assert len(batch["key"]) == len(batch["rgb"]) == len(batch["prompt"]) == TRAIN - 1
        assert "clip03" not in batch["key"] and batch["skipped"][0].startswith("clip03: ")
        with caplog.at_level(logging.WARNING):
            assert data.on_before_batch_transfer(batch, 0) is batch
    # once
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "skipped clip clip03"
    ]


def test_order_of_the_others_does_not_change(tmp_path, shards):
    write(tmp_path)
    break_clip(tmp_path, "clip03")
    whole = first(ready(shards).train_dataloader(), 6)
    holed = first(ready(tmp_path, bad_clip_budget=1).train_dataloader(), 6)
    for batch, wanted in zip(holed, whole, strict=True):
        assert batch["key"] == [key for key in wanted["key"] if key != "clip03"]


def test_budget_of_bad_clips(tmp_path):
    write(tmp_path)
    for key in ("clip00", "clip01", "clip03"):
        break_clip(tmp_path, key)
    data = ready(tmp_path, batch_size=TRAIN, bad_clip_budget=2)
    (batch,) = first(data.train_dataloader(), 1)
    with pytest.raises(
        BadDataError, match=r"3 bad clips, bad_clip_budget=2: clip0\d: .*CRC.*raise bad_clip_budget"
    ):
        data.on_before_batch_transfer(batch, 0)


def test_training_stops_past_the_budget(tmp_path):
    write(tmp_path / "s")
    break_clip(tmp_path / "s", "clip04")
    with pytest.raises(BadDataError, match="clip04"):
        fit(tmp_path / "s", tmp_path, 10)


def test_a_batch_without_a_good_clip_is_a_blank(tmp_path):
    """That trains nothing, and that training ends with only where no clip is good."""
    write(tmp_path / "some")
    break_clip(tmp_path / "some", "clip04")
    task, _, _ = fit(tmp_path / "some", tmp_path, TRAIN, batch_size=1, bad_clip_budget=1)
    seen = [keys for keys, _ in task.seen]
    assert seen.count([""]) == 1 and len({key for (key,) in seen}) == TRAIN
    write(tmp_path / "none")
    for i in range(TRAIN + VAL):
        break_clip(tmp_path / "none", f"clip{i:02d}")
    data = ready(tmp_path / "none", bad_clip_budget=100)
    with pytest.raises(BadDataError, match=rf"none of {TRAIN} clips is usable: clip"):
        for batch in data.train_dataloader():
            assert batch["key"] == [] and len(batch["skipped"]) == 4
            blank = data.on_before_batch_transfer(batch, 0)
            assert blank["rgb"].shape == (1, 3, 5, 16, 16) and blank["alpha"].shape == (
                1,
                1,
                5,
                16,
                16,
            )


def test_lost_tar_is_counted_at_setup(tmp_path):
    write(tmp_path)
    (tmp_path / "clips-000001.tar").unlink()
    with pytest.raises(BadDataError, match="4 bad clips, bad_clip_budget=3: clip04: not in"):
        ready(tmp_path, bad_clip_budget=3)
    data = ready(tmp_path, bad_clip_budget=4, batch_size=TRAIN)
    (batch,) = first(data.train_dataloader(), 1)
    assert len(batch["skipped"]) == 3  # clip04, clip06, clip07; clip05 is in val
    data.on_before_batch_transfer(batch, 0)


def test_values_that_are_not_finite_are_bad(shards):
    data = ready(shards, batch_size=TRAIN)
    data.train_transform.shown = lambda frames, _: (
        torch.full((3, 5, 16, 16), float("nan")),
        torch.zeros(1, 5, 16, 16),
    )
    (batch,) = first(data.train_dataloader(), 1)
    assert len(batch["skipped"]) == TRAIN and "not finite" in batch["skipped"][0]


def test_setup_errors(tmp_path):
    with pytest.raises(ShardError, match=r"does not exist.*acetate prep"):
        ready(tmp_path / "none")
    with pytest.raises(ShardError, match=r"no finished shards"):
        ready(tmp_path)
    with pytest.raises(ShardError, match="at least one folder"):
        ClipDataModule(shards=[], **SETTINGS)
    with ShardWriter(tmp_path / "t", max_clips=9, max_bytes=10**9, made_by={}) as writer:
        writer.add("a", encode_clip(clip(0), 16), split="train", prompt="", source="", licence="",
            lossy=False,
                   premultiplied_source=False)  # fmt: skip
    with pytest.raises(ShardError, match="none of 1 clips is in split 'val'"):
        ready(tmp_path / "t")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 16}, r"Wan needs 4k\+1"),
        ({"height": 20}, r"sides are multiples of 16"),
        ({"batch_size": 0}, r"batch_size=0; must be at least 1"),
        ({"val_clips": 0}, r"val_clips=0; must be at least 1"),
        ({"bad_clip_budget": -1}, r"bad_clip_budget=-1; must be at least 0"),
    ],
)
def test_settings_are_checked(shards, settings, message):
    with pytest.raises(ValueError, match=message):
        module(shards, **settings)


def test_several_folders_and_images(shards, tmp_path):
    with ShardWriter(tmp_path / "more", max_clips=9, max_bytes=10**9, made_by={}) as writer:
        writer.add("extra", encode_clip(clip(2), 16), split="train", prompt="", source="",
            licence="", lossy=False,
                   premultiplied_source=False)  # fmt: skip
    data = ClipDataModule(
        shards=[str(shards), str(tmp_path / "more")], **(SETTINGS | {"frames": 1})
    )
    data.setup()
    batches = first(data.train_dataloader(), 3)
    assert {key for batch in batches for key in batch["key"]} >= {"extra"}
    assert batches[0]["rgb"].shape == (4, 3, 1, 16, 16)


def test_folders_are_mixed_by_weight(shards, tmp_path):
    with ShardWriter(tmp_path / "more", max_clips=9, max_bytes=10**9, made_by={}) as writer:
        for key in ("x", "y"):
            writer.add(key, encode_clip(clip(0), 16), split="train", prompt="", source="",
                licence="", lossy=False,
                       premultiplied_source=False)  # fmt: skip
    mixed = {str(shards): 2, str(tmp_path / "more"): 1}
    data = ClipDataModule(shards=OmegaConf.create(mixed), **(SETTINGS | {"batch_size": TRAIN + 2}))
    data.setup()
    batches = first(data.train_dataloader(), 2)
    assert [sum(len(key) == 1 for key in batch["key"]) for batch in batches] == [4, 4]  # of 13
    again = [
        picture
        for key, picture in zip(batches[0]["key"], batches[0]["rgb"], strict=True)
        if key == "x"
    ]
    assert len(again) == 2
    other = ClipDataModule(shards=dict.fromkeys(mixed, 1), **SETTINGS)
    other.setup()
    assert other._fingerprint() != data._fingerprint()
    with pytest.raises(ValueError, match=r"weights \[-1\.0\]; none may be negative"):
        ClipDataModule(shards={"x": -1}, **SETTINGS)


def test_clips_are_kept_where_all_of_them_fit(shards, monkeypatch):
    refs, frames = index_shards([shards]), torch.tensor([2, 3, 2])
    wanted = read_clip(refs[0]).frames[frames]
    size = sum(ref.frames * ref.height * ref.width * 4 for ref in refs)
    read = []
    monkeypatch.setattr(clips, "read_clip", lambda *a: [read.append(a[1]), read_clip(*a)][1])
    for room in (size, size - 1):
        reader = ClipReader(refs, room)
        for _ in range(2):
            found, prompt = reader.read(refs[0], frames)
            assert np.array_equal(found, wanted) and prompt == read_clip(refs[0]).prompt
    assert read == [(0, refs[0].frames), (2, 4), (2, 4)]


def two_ranks(data, use_distributed_sampler):
    data.trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        use_distributed_sampler=use_distributed_sampler,
    )
    return data


def test_lightning_must_not_replace_the_order(shards):
    data = two_ranks(ready(shards), use_distributed_sampler=True)
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(ValueError, match=r"trainer\.use_distributed_sampler=false"):
            loader()


def test_unequal_validation_is_announced(shards, caplog):
    data = two_ranks(ready(shards), use_distributed_sampler=False)
    assert data.train_dataloader().batch_sampler.world == 2
    with caplog.at_level(logging.WARNING):
        assert [len(batch["key"]) for batch in data.val_dataloader()] == [2, 1]
    assert "unequal" in caplog.text and "val_clips=4" in caplog.text
    caplog.clear()
    data = two_ranks(ready(shards, val_clips=4), use_distributed_sampler=False)
    with caplog.at_level(logging.WARNING):
        assert len(data.val_dataloader()) == 1
    assert "unequal" not in caplog.text


def test_manifest_is_what_counts(shards, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.glob("*.tar"):
        (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ShardError, match=MANIFEST):
        ready(copy)
