import re
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from acetate.alpha import PALETTE, PALETTE_NAMES
from acetate.data.drawing import COLORS, color
from acetate.data.endless import GREYS, EndlessDataModule, background, placed


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
            smallest=0.5, views={"pictures": 5, "hard": 2, "soft": 1, "mattes": mattes},
        )  # fmt: skip
        clips = data.numbered(start=0, length=40, step=1)
        videos = [clips[n]["video"] for n in range(40)]
        return sum(bool((video[0] == video[1]).all() and video.std() > 0.2) for video in videos)

    assert grey(2) > 0 == grey(0)


def test_prompts_name_what_is_behind_and_where_the_subject_is():
    data = EndlessDataModule(
        frames=1, height=16, width=16, batch_size=1, val_clips=1, seed=0, num_workers=0,
        smallest=0.2, views={"soft": 1},
    )  # fmt: skip
    clips = data.numbered(start=0, length=60, step=1)
    small = [clip for clip in map(clips.__getitem__, range(60)) if "small, at" in clip["prompt"]]
    assert len(small) > 20
    shares = {"top": [], "left": []}
    for clip in small:
        prompt, video = clip["prompt"], clip["video"][:, 0]
        name = re.match(r"Plain (\w+) background, procedural animation", prompt).group(1)
        plain = PALETTE[PALETTE_NAMES.index(name.replace("black", "key"))].view(3, 1, 1)
        drawn = (video - plain).abs().amax(0)
        assert drawn.max() < 0.1 or drawn.min() == 0  # the plain colour is there
        for word, half in (("top", drawn[:8]), ("left", drawn[:, :8])):
            if word in prompt and drawn.sum() > 0:
                shares[word].append(float(half.sum() / drawn.sum()))
    assert all(len(found) > 5 and sum(found) / len(found) > 0.7 for found in shares.values())


def test_backgrounds_are_named_by_style_and_color():
    found = [background(seed, 1, 16, 16) for seed in range(40)]
    plain = [(rgb, words) for rgb, words in found if words.startswith("Plain")]
    assert plain and len({words for _, words in found}) > 15
    for rgb, words in plain:
        name = words.removeprefix("Plain ").removesuffix(" background")
        codes = COLORS | GREYS
        away = {
            each: (color(code).view(3) - (rgb.mean((1, 2, 3)) + 1) / 2).norm()
            for each, code in codes.items()
        }
        assert min(away, key=away.get) == name


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"smallest": 0}, r"data\.smallest=0; a scale in \(0, 1\]"),
        ({"views": {"soft": 0}}, r"data\.views=\{'soft': 0\}; whole shares, at least one above 0"),
        ({"views": {"softly": 1}}, r"data\.views=.*pictures, hard, soft, mattes"),
    ],
)
def test_settings_outside_of_their_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        EndlessDataModule(
            frames=1, height=8, width=8, batch_size=1, val_clips=1, seed=0, num_workers=0, **setting
        )  # fmt: skip
