from itertools import islice
from types import SimpleNamespace

import pytest

from acetate.data.endless import EndlessDataModule


def keys(rank, world, *, step=0, steps=2, batch_size=2, val=False):
    data = EndlessDataModule(
        frames=1, height=8, width=8, batch_size=batch_size, val_clips=4, seed=5, num_workers=0
    )
    progress = SimpleNamespace(total=SimpleNamespace(processed=step))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, fit_loop=loop)
    if val:
        return [batch["key"] for batch in data.val_dataloader()]
    return [batch["key"] for batch in islice(data.train_dataloader(), steps - step)]


def test_ranks_share_out_the_clips_of_one():
    alone = keys(0, 1, batch_size=4)
    first, second = keys(0, 2), keys(1, 2)
    for batch, a, b in zip(alone, first, second, strict=True):
        assert batch == [key for pair in zip(a, b, strict=True) for key in pair]


@pytest.mark.parametrize("world", [1, 2])
def test_resume_goes_on_with_the_next_clips(world):
    assert keys(0, world, steps=4)[2:] == keys(0, world, step=2, steps=4)


def test_validation_clips_are_others_and_shared_out():
    alone = [key for batch in keys(0, 1, val=True) for key in batch]
    shares = [[key for batch in keys(rank, 2, val=True) for key in batch] for rank in (0, 1)]
    assert [key for pair in zip(*shares, strict=True) for key in pair] == alone
    assert not set(alone) & {key for batch in keys(0, 1, steps=8) for key in batch}
