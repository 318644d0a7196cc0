import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from acetate.data.transforms import resize
from acetate.video_io import read_pair
from data_prep.analysis import analyse
from data_prep.cleaning import (
    Settings,
    bleed,
    clean,
    done,
    foreground,
    limit_side,
    overrides,
    resample,
    shots,
    snap,
    too_many,
    unmix,
)
from data_prep.decisions import Decisions
from tests.media.films import drawn

SETTINGS = Settings(
    choices={}, min_alpha=8, trim=False, max_side=None, bleed=0, fps=None, default_fps=24,
    max_frames=100,
    empty="refuse", full="refuse", flickers="keep",
)  # fmt: skip
PLAIN = Decisions(
    color="straight", confidence=1, alpha_low=0, alpha_high=255, matte="normal", crop=None,
    visible=None, still=False,
    cuts=(),
)  # fmt: skip


def soft(frames=2, size=32, color=(240, 120, 60), alpha=None):
    """Straight colour with an alpha ramp, or the given alpha."""
    clip = np.empty((frames, size, size, 4), np.uint8)
    clip[..., :3] = color
    clip[..., 3] = np.linspace(0, 255, size) if alpha is None else alpha
    return clip


def mixed(frames, backdrop=0):
    alpha = frames[..., 3:] / 255.0
    color = np.round(frames[..., :3] * alpha + backdrop * (1 - alpha)).astype(np.uint8)
    return np.concatenate((color, frames[..., 3:]), axis=-1)


def test_choices_are_checked():
    with pytest.raises(ValueError, match="hue cannot be chosen; known: color"):
        replace(SETTINGS, choices={"hue": "black"})


def test_a_rate_that_repeats_without_end_is_refused():
    wanted = (
        "fps=1e+07 would make 12,500,000 frames of its 30 at 24 frames a second; at most 100,000"
    )
    assert str(too_many(30, 24, replace(SETTINGS, fps=1e7))).startswith(wanted)
    assert (
        too_many(30, 24, replace(SETTINGS, fps=60)) is None
        and too_many(10**6, 24, SETTINGS) is None
    )


def test_the_command_line_decides_for_every_clip():
    settings = replace(
        SETTINGS, choices=overrides(color=True, crop="auto", alpha_low=3, cuts=False)
    )
    assert settings.choices == {"color": "true", "alpha_low": "3", "cuts": "false"}
    decisions = settings.apply(replace(PLAIN, cuts=(4,), crop=(0, 1, 2, 3)))
    assert (decisions.color, decisions.alpha_low, decisions.cuts, decisions.crop) == (
        "black",
        3,
        (),
        (0, 1, 2, 3),
    )
    assert decisions.reasons["color"] == "chosen by the command line"


def test_refusals():
    assert SETTINGS.refusal(PLAIN) is None
    full = replace(PLAIN, matte="full", reasons={"matte": "all of it"})
    assert SETTINGS.refusal(full) == "alpha is full: all of it. full=keep takes it in"
    assert replace(SETTINGS, full="keep").refusal(full) is None
    assert (
        replace(SETTINGS, flickers="refuse").refusal(replace(PLAIN, matte="flickers")) is not None
    )


def test_what_was_done_is_told():
    decisions = replace(
        PLAIN, color="white", crop=(0, 1, 2, 3), cuts=(5,), alpha_low=2, visible=(0, 0, 1, 1),
        reasons={"crop": "bars", "cuts": "at 5"},
    )  # fmt: skip
    assert done(PLAIN, SETTINGS) == {}
    told = done(decisions, replace(SETTINGS, trim=True))
    assert list(told) == ["crop", "cuts", "alpha", "color", "trim"]
    assert told["crop"] == "cut to [0, 1, 2, 3]: bars" and told["cuts"] == "2 shots: at 5"
    json.dumps(told)


def test_snap():
    frames = soft(1, 8, alpha=np.array([0, 5, 6, 100, 249, 250, 255, 1]))
    assert snap(frames, 5, 250)[0, 0, :, 3].tolist() == [0, 0, 6, 100, 249, 255, 255, 0]
    assert np.array_equal(snap(frames, 5, 250)[..., :3], frames[..., :3])
    assert snap(frames, 0, 255) is frames


@pytest.mark.parametrize("backdrop", [0, 255])
def test_unmix_inverts_where_alpha_is_not_tiny(backdrop):
    straight = soft()
    back = unmix(mixed(straight, backdrop), (backdrop,) * 3, 8)
    visible = straight[..., 3] >= 64
    assert np.abs(back[visible].astype(int) - straight[visible]).max() <= 2
    assert np.array_equal(back[..., 3], straight[..., 3])
    again = mixed(back, backdrop).astype(int)
    far = straight[..., 3] >= 8  # the mixture comes back wherever the quotient is taken
    assert np.abs(again - mixed(straight, backdrop))[far].max() <= 1


def test_a_quotient_by_tiny_alpha_is_bounded():
    assert unmix(np.array([[[[1, 0, 0, 1]]]], np.uint8), (0, 0, 0), 8)[0, 0, 0].tolist() == [
        32,
        0,
        0,
        1,
    ]  # 1 / 8, not 1 / 1


def test_bleed_carries_color_as_far_as_it_says():
    frames = np.zeros((1, 33, 33, 4), np.uint8)
    frames[:, 16, 16] = 200, 100, 50, 255
    grown = bleed(frames, 5)
    inside = np.zeros((33, 33), bool)
    inside[11:22, 11:22] = True
    assert (grown[0, inside][:, :3] == (200, 100, 50)).all() and not grown[0, ~inside].any()
    assert np.array_equal(grown[..., 3], frames[..., 3])


def test_bleed_leaves_what_is_visible_and_hides_nothing():
    frames = drawn("hair", 3, 2, 40, 56)
    seen = frames[..., 3] > 0
    for radius in (0, 1, 8, 100, None):
        grown = bleed(frames, radius)
        assert np.array_equal(grown[seen], frames[seen]) and np.array_equal(
            grown[..., 3], frames[..., 3]
        )
    assert not bleed(frames, 0)[~seen].any()
    assert np.array_equal(bleed(frames, 100), bleed(frames, None))
    assert np.array_equal(bleed(frames, 10**12), bleed(frames, None))
    assert bleed(frames, None)[~seen][:, :3].max(axis=-1).min() > 0
    nothing = np.full((1, 8, 8, 4), (9, 9, 9, 0), np.uint8)
    assert not bleed(nothing, 4).any() and not bleed(nothing, None).any()


def test_a_straight_resize_of_bled_color_has_no_foreign_fringe():
    frames = soft(1, 64, (255, 255, 255), alpha=0)
    frames[:, 20:44, 20:44, 3] = 255
    for radius, worst in ((8, 254), (0, 250)):
        picture = torch.from_numpy(bleed(frames, radius)).permute(3, 0, 1, 2).float() / 255
        rgb, alpha = resize(picture[:3] * 2 - 1, picture[3:], 24, 24, space="straight")
        darkest = (((rgb + 1) / 2)[:, alpha[0] > 0] * 255).min()
        assert (darkest >= worst) == (radius == 8)


def test_where_alpha_is_tiny_color_comes_from_around():
    frames = soft(1, 16, alpha=255)
    frames[:, :, :8] = 0, 0, 255, 3  # noise
    grown = bleed(frames, 4, trusted=8)
    assert (grown[:, :, :8, :3] == (240, 120, 60)).all() and (grown[:, :, :8, 3] == 3).all()
    frames[:, :, 8:12, 3], frames[:, :, 12:, 3] = 7, 0
    # nothing better: it stays
    assert np.array_equal(bleed(frames, None, trusted=8)[:, :, :12], frames[:, :, :12])


@pytest.mark.slow
@pytest.mark.xdist_group("matting")  # which compiles itself once
@pytest.mark.long
def test_foreground_of_a_picture_and_its_matte():
    clip = soft(1, 48, (250, 30, 40))
    picture = mixed(clip, 255)  # over white
    color = foreground(picture)
    visible = clip[..., 3] > 100
    before = np.abs(picture[visible].astype(int) - clip[visible]).mean()
    after = np.abs(color[visible].astype(int) - clip[visible]).mean()
    assert np.array_equal(foreground(picture), color)
    assert after < 0.2 * before and np.array_equal(color[..., 3], clip[..., 3])
    assert "pymatting" not in sys.modules  # whose import compiles for a minute


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("matting")
@pytest.mark.parametrize("seed", [31, 32, 33])
def test_foreground_of_hair_before_a_scene(tmp_path, seed):
    """A picture and its matte, as files: the colour of soft pixels, against the truth that was
    drawn."""
    hair, scene = drawn("hair", seed, 1, 160)[0], drawn("glass", seed, 1, 160)[0][..., 2::-1]
    alpha = hair[..., 3:] / 255
    picture = np.round(alpha * hair[..., :3] + (1 - alpha) * scene).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(hair[..., 3]).save(tmp_path / "a_matte.png")
    clip = read_pair(tmp_path / "a.png", tmp_path / "a_matte.png")
    back = clean(clip.frames, analyse(clip, matte=True), SETTINGS)[0]
    soft = (hair[..., 3] > 12) & (hair[..., 3] < 243)
    before, after = (
        np.average(
            np.abs(color[soft][:, :3].astype(int) - hair[soft][:, :3]).mean(axis=-1),
            weights=hair[soft][:, 3],
        )
        for color in (picture, back)
    )
    assert np.array_equal(back[..., 3], hair[..., 3]) and after < 0.5 * before


def test_limit_side_is_premultiplied_and_keeps_the_aspect():
    frames = np.zeros((2, 40, 80, 4), np.uint8)
    frames[:, :, 33:] = 255  # white, with hidden black beside it
    small = limit_side(frames, 20)
    assert small.shape == (2, 10, 20, 4)
    assert ((small[..., 3] > 0) & (small[..., 3] < 255)).any()
    assert (small[small[..., 3] > 0][:, :3] >= 254).all()
    assert (small[:, :, :6, 3] == 0).all() and (small[:, :, 12:, 3] == 255).all()
    assert limit_side(frames, 80) is frames


def test_resample_by_time():
    assert resample(6, 12, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert resample(6, 12, 6).tolist() == [0, 2, 4]
    assert resample(3, 12, 24).tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        resample(30, 30000 / 1001, 24).tolist()[-1] <= 29
        and len(resample(30, 30000 / 1001, 24)) == 24
    )
    assert resample(1, 12, 24).tolist() == [0]
    for fps, target in ((25, 16), (16, 25), (24, 23.976)):
        taken = resample(100, fps, target)
        late = np.arange(len(taken)) / target - taken / fps  # the newest frame that has begun
        assert (late >= -1e-6).all() and (late[:-1] < 1 / fps).all()


def test_shots_and_pieces():
    settings = replace(SETTINGS, max_frames=4)
    lengths = [len(taken) for taken in shots(20, 10, replace(PLAIN, cuts=(3, 12)), settings)]
    assert lengths == [3, 3, 3, 3, 4, 4]
    assert np.concatenate(shots(20, 10, replace(PLAIN, cuts=(3, 12)), settings)).tolist() == list(
        range(20)
    )
    assert [
        taken.tolist() for taken in shots(20, 10, replace(PLAIN, still=True, cuts=(3,)), settings)
    ] == [[0]]
    halves = shots(8, 10, replace(PLAIN, cuts=(3,)), replace(settings, fps=5))
    assert [taken.tolist() for taken in halves] == [[0, 2], [3, 5]]
    long = [len(taken) for taken in shots(250, 24, PLAIN, SETTINGS)]
    assert long == [83, 83, 84]


def test_clean_applies_every_step():
    inner = soft(1, 32)
    frames = np.zeros((1, 48, 32, 4), np.uint8)
    frames[..., 3] = 255  # black bars of 8 rows
    frames[:, 8:40] = mixed(inner)
    decisions = replace(
        PLAIN, color="black", crop=(0, 8, 32, 32), alpha_low=20, visible=(4, 0, 28, 48)
    )
    plain = clean(frames, decisions, SETTINGS)
    assert plain.shape == (1, 32, 32, 4)
    seen = plain[..., 3] > 100
    assert np.abs(plain[seen][:, :3].astype(int) - (240, 120, 60)).max() <= 2
    assert not plain[plain[..., 3] == 0].any() and plain[plain[..., 3] > 0][:, 3].min() > 20
    assert clean(frames, decisions, replace(SETTINGS, trim=True)).shape == (1, 32, 28, 4)
    assert clean(frames, decisions, replace(SETTINGS, max_side=16)).shape == (1, 16, 16, 4)
    grown = clean(frames, decisions, replace(SETTINGS, bleed=2))
    assert np.array_equal(grown[..., 3], plain[..., 3]) and (grown[:, :, 0, :3] == 0).all()
    assert np.abs(grown[0, :, 2, :3].astype(int) - (240, 120, 60)).max() <= 16
    with pytest.raises(ValueError, match=r"\[0, 8, 33, 32\] is not inside of 32x48"):
        clean(frames, replace(decisions, crop=(0, 8, 33, 32)), SETTINGS)
