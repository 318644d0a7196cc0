from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from acetate.data.endless import EndlessDataModule, placed


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


def test_a_smaller_subject_stays_whole_on_its_canvas():
    rgb, alpha = torch.ones(3, 2, 16, 16), torch.ones(1, 2, 16, 16)
    small_rgb, small = placed(rgb, alpha, 0.5, 1.0, 0.0)
    assert torch.equal(small[..., 8:, :8], torch.ones(1, 2, 8, 8)) and small.sum() == 2 * 64
    assert (small_rgb[..., 8:, :8] == 1).all() and small_rgb.shape == rgb.shape


def test_without_mattes_no_clip_is_grey():
    def grey(mattes):
        data = EndlessDataModule(
            frames=1, height=8, width=8, batch_size=1, val_clips=1, seed=0, num_workers=0,
            smallest=0.5, mattes=mattes,
        )  # fmt: skip
        clips = data.numbered(start=0, length=40, step=1)
        videos = [clips[n]["video"] for n in range(40)]
        return sum(bool((video[0] == video[1]).all() and video.std() > 0.2) for video in videos)

    assert grey(True) > 0 == grey(False)


def test_a_scale_outside_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"data\.smallest=0; a scale in \(0, 1\]"):
        EndlessDataModule(
            frames=1,
            height=8,
            width=8,
            batch_size=1,
            val_clips=1,
            seed=0,
            num_workers=0,
            smallest=0,
        )
