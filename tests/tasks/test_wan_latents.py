from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.testing import assert_close

from acetate.models.wan import WanEncoder, WanHead
from acetate.tasks import wan_latents
from acetate.tasks.wan_latents import WanLatentsModule

TINY = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
}


@pytest.fixture
def vae(monkeypatch):
    monkeypatch.setattr(wan_latents, "PER_FILE", 4)
    torch.manual_seed(0)
    return AutoencoderKLWan(**TINY)


def module(vae, folder, clips=8, step=0, **settings):
    data = WanLatentsModule(
        vae=vae, clips=clips, folder=str(folder), **settings,
        frames=5, height=16, width=16, batch_size=4, val_clips=3, seed=0, num_workers=0,
    )  # fmt: skip
    progress = SimpleNamespace(total=SimpleNamespace(processed=step))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, fit_loop=loop)
    data.prepare_data()
    return data


def test_latents_are_those_of_the_clips(vae, tmp_path):
    data = module(vae, tmp_path)
    encoder, head = WanEncoder(vae), WanHead(vae)
    (batch,) = data.val_dataloader()
    clips = data.numbered(start=2**31, length=3, step=1)
    assert batch["key"] == [clips[n]["key"] for n in range(3)]
    assert batch["prompt"] == [clips[n]["prompt"] for n in range(3)]
    for n in range(3):
        expected = head(encoder(clips[n]["video"][None]))[0][0]
        assert_close(batch["latents"][n], expected, rtol=2e-3, atol=2e-3)  # half precision


def test_each_epoch_has_every_clip_in_another_order_and_resumes(vae, tmp_path):
    data = module(vae, tmp_path)
    keys = [batch["key"] for batch in islice(data.train_dataloader(), 4)]
    first, second = [*keys[0], *keys[1]], [*keys[2], *keys[3]]
    assert sorted(first) == sorted(second) and len(set(first)) == 8
    assert first != second
    resumed = module(vae, tmp_path, step=1)
    assert [batch["key"] for batch in islice(resumed.train_dataloader(), 3)] == keys[1:]


def test_what_is_there_is_kept_and_other_clips_have_other_files(vae, tmp_path):
    module(vae, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    gone = sorted(before)[0]
    gone.unlink()
    module(vae, tmp_path, clips=12)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(after) == len(before) + 1
    assert [path for path in before if after[path] != before[path]] == [gone]
    module(vae, tmp_path, smallest=0.5)
    assert len(list(tmp_path.iterdir())) == len(after) + 3


def test_a_number_that_does_not_fill_files_is_refused(vae, tmp_path):
    with pytest.raises(ValueError, match=r"data\.clips=6; a positive multiple of 4"):
        module(vae, tmp_path, clips=6)
