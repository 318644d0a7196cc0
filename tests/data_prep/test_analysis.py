from itertools import permutations

import numpy as np
import pytest

from acetate.data.synthetic import KINDS
from acetate.video_io import RGBAClip
from data_prep.analysis import Totals, analyse, bars, noise_bounds
from data_prep.cleaning import stretch
from data_prep.film_cuts import Shots, change, flicker, thumbnail
from tests.data_prep.test_cleaning import soft
from tests.media.films import drawn


def moving(frames=12, size=48, step=1):
    """A soft disc that goes to the right."""
    y, x = np.mgrid[:size, :size]
    clip = np.zeros((frames, size, size, 4), np.uint8)
    for i in range(frames):
        distance = np.hypot(x - size / 3 - i * step, y - size / 2)
        clip[i, ..., 3] = ((size / 4 - distance) * 40).clip(0, 255)
        clip[i, ..., :3] = 240, 120, 60
    return clip


def planes(frame):
    return np.ascontiguousarray(frame.transpose(2, 0, 1))


def shots(frames):
    found = Shots()
    for frame in frames:
        found.add(thumbnail(planes(frame)))
    return found


def cuts(frames):
    return shots(frames).found()[0]


def totals(frames):
    found = Totals.of(frames[0])
    for frame in frames:
        found.add(planes(frame))
    return found


def decided(frames, lossy=False):
    return analyse(RGBAClip(frames, 16, lossy, False))


def test_noise_ends_where_its_peak_does():
    rng = np.random.default_rng(0)
    empty, opaque = np.zeros(60_000), np.full(40_000, 255)
    ramp = rng.uniform(0, 255, 8_000)
    noisy = np.concatenate((empty, opaque, ramp)) + rng.normal(0, 1.2, 108_000)
    low, high = noise_bounds(np.bincount(noisy.clip(0, 255).round().astype(int), minlength=256))
    assert 2 <= low <= 6 and 249 <= high <= 253  # five standard deviations
    clean = np.bincount(np.concatenate((empty, opaque, ramp)).round().astype(int), minlength=256)
    assert noise_bounds(clean)[0] <= 1 and noise_bounds(clean)[1] >= 254
    # limited-range luma, stretched: every seventh level is empty
    luma = (noisy * 219 / 255).clip(0, 219).round() * 255 / 219
    low, high = noise_bounds(np.bincount(luma.round().astype(int), minlength=256))
    assert 2 <= low <= 6 and 249 <= high <= 253


def test_what_fades_evenly_is_no_noise():
    fading = np.bincount(np.geomspace(1, 255, 50_000).astype(int), minlength=256)
    assert noise_bounds(fading)[0] <= 4
    assert noise_bounds(np.full(256, 100)) == (0, 255)


def test_lossless_alpha_is_left_alone():
    clip = moving()
    assert (decided(clip).alpha_low, decided(clip).alpha_high) == (0, 255)


def test_empty_full_and_normal():
    clip = moving()
    assert decided(clip).matte == "normal"
    empty, full = clip.copy(), clip.copy()
    empty[..., 3], full[..., 3] = 0, 255
    full[:, 0, 0, 3] = 250
    assert decided(empty).matte == "empty" and decided(empty).visible is None
    assert decided(full).matte == "full" and "99.96%" in decided(full).reasons["matte"]
    one = empty.copy()
    one[3, 4:8, 10:16] = 255
    assert decided(one).matte == "normal" and decided(one).visible == (10, 4, 6, 4)


@pytest.mark.parametrize("ends", [(16, 235), (22, 240)])
def test_alpha_that_was_shrunk_is_stretched(ends):
    clip = moving()
    shrunk = clip.copy()
    shrunk[..., 3] = np.rint(clip[..., 3] / 255 * (ends[1] - ends[0]) + ends[0])
    for lossy in (False, True):
        decisions = decided(shrunk, lossy)
        assert (
            decisions.alpha_range == ends
            and "stretched to 0 and 255" in (decisions.reasons["alpha_range"])
        )
        assert decisions.visible == decided(clip).visible
    back = stretch(shrunk, ends)[..., 3].astype(int)
    assert np.abs(back - clip[..., 3]).max() <= 1
    assert decisions.overridden("a test", {"alpha_range": "false"}).alpha_range is None
    assert decisions.overridden("a test", {"alpha_range": "3 250"}).alpha_range == (3, 250)


def test_a_veil_and_tinted_glass_are_left_alone():
    clip = moving()
    veil, glass = clip.copy(), clip.copy()
    veil[..., 3] = np.linspace(30, 220, 48).astype(np.uint8)  # no flat ends
    glass[..., 3] = clip[..., 3] // 2
    for frames, said in ((veil, "between 30 and 220"), (glass, "between 0 and 127")):
        decisions = decided(frames)
        assert decisions.alpha_range is None and said in decisions.reasons["alpha_range"]
    assert "alpha_range" not in decided(clip).reasons


def test_flicker():
    clip = moving()
    assert flicker(shots(clip).coverage) == 0
    clip[::2, ..., 3] //= 3
    assert flicker(shots(clip).coverage) > 0.5
    assert decided(clip).matte == "flickers" and "to and fro" in decided(clip).reasons["matte"]
    fading = moving()
    fading[..., 3] = fading[..., 3] * np.linspace(1, 0, 12)[:, None, None]
    assert decided(fading).matte == "normal"


def test_bars():
    clip = moving()

    def found(frames):
        return bars(totals(frames), 0, 255)[0]

    assert found(clip) is None
    wide = clip.copy()
    wide[:, :6] = wide[:, -6:] = 0, 0, 0, 255
    assert found(wide) == (0, 6, 48, 36) and decided(wide).crop == (0, 6, 48, 36)
    assert "opaque black bars of 6 and 6 pixels above and below" in decided(wide).reasons["crop"]
    assert found(wide.swapaxes(1, 2)) == (6, 0, 36, 48)
    lopsided = wide.copy()
    lopsided[:, 6:14] = 0, 0, 0, 255
    assert found(lopsided) is None  # one side 14, the other 6
    once = wide.copy()
    once[5, 2, 10:20] = 255  # something shows in the bar
    assert found(once) is None
    filled = np.full_like(clip, 200)
    filled[..., 3] = 255
    filled[:, :6] = filled[:, -6:] = 0
    assert found(filled) == (0, 6, 48, 36)  # transparent bars cut a full picture off
    assert found(filled[:1]) is None  # a button on a sheet
    card = filled.copy()
    card[:, :, :6] = card[:, :, -6:] = 0
    assert found(card) is None  # a card in the middle has margins, not bars


def test_still():
    still = np.repeat(moving(1), 6, axis=0)
    assert decided(still).still and decided(still).reasons["still"] == "all 6 frames are equal"
    assert not decided(moving()).still and not decided(moving(1)).still
    noise = np.random.default_rng(0).integers(-2, 3, still.shape)
    noisy = (still.astype(int) + noise).clip(0, 255).astype(np.uint8)
    assert decided(noisy, lossy=True).still and not decided(noisy).still
    spark = noisy.copy()
    spark[4, 20:24, 20:24, :3] = 255 - spark[4, 20:24, 20:24, :3]
    assert not decided(spark, lossy=True).still


def test_joined_clips_are_cut_where_they_were_joined():
    """But for sparks, which move as much as a cut exchanges."""
    clips = [
        drawn(kind, 40 + i, 12)
        for i, kind in enumerate(("hair", "smoke", "shape", "shadow", "flame", "glass"))
    ]
    found = []
    for first, second in permutations(clips, 2):
        found.append(cuts(np.concatenate((first, second))))
    assert set(found) <= {(12,), ()}
    assert found.count((12,)) >= 0.8 * len(found)
    three = np.concatenate((clips[0], clips[2], clips[0]))
    assert cuts(three) == (12, 24)
    assert "new shots at frame 12 (" in decided(three).reasons["cuts"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_in_motion_flash_fade_and_arrival(kind):
    clip = drawn(kind, 7, 16, 48)
    fast = np.stack(
        [np.roll(np.pad(f, ((0, 0), (0, 48), (0, 0))), 6 * i, axis=1) for i, f in enumerate(clip)]
    )
    flash = clip.copy()
    flash[7:9, ..., :3] = (flash[7:9, ..., :3] * 2.5).clip(0, 255)
    lit = clip.copy()
    lit[8:, ..., :3] = lit[8:, ..., :3] // 2  # the light goes out, and stays out
    late = clip.copy()
    late[:6, ..., 3] = 0
    joined = np.concatenate((clip, clip), axis=2)
    joined[:8, :, 48:, 3] = 0  # a second one appears beside the first
    for frames in (clip, fast, flash, lit, late, joined):
        assert cuts(frames) == ()


def test_change_is_what_is_exchanged():
    first, second = (thumbnail(planes(frame)) for frame in (moving(1)[0], moving(1)[0, ::-1, ::-1]))
    assert change(first, first) == 0 and change(first, 0 * first) == 1
    half = first.copy()
    half[:3] *= 0.5
    assert change(first, half) == pytest.approx(0, abs=1e-5)
    assert 0 < change(first, second) < 1
    other = first.copy()
    other[:3] = first[2::-1]
    assert change(first, other) == pytest.approx(1)


def test_still_files_have_no_time():
    decisions = decided(soft(1))
    assert not decisions.still and decisions.cuts == () and decisions.matte == "normal"
