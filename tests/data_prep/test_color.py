import json
import math
import os
from pathlib import Path

import av
import numpy as np
import pytest

from acetate.data.synthetic import KINDS
from acetate.video_io import RGBAClip, read_packed, read_pair, read_rgba
from data_prep.analysis import analyse
from data_prep.cleaning import unmix
from data_prep.color import INDEPENDENT_BOUNDS, STRAY, against, confidence, mixtures
from tests.data_prep.test_cleaning import mixed, soft
from tests.media.films import drawn
from tests.paths import ROOT

MEDIA = Path(os.environ.get("ACETATE_MEDIA", ROOT.parent / "shared/media"))


def through(frames, codec, crf, folder):
    """Colour and alpha, each through its own lossy video, as effect players ship them."""
    halves = []
    for pictures in (frames[..., :3], np.repeat(frames[..., 3:], 3, axis=-1)):
        path = folder / "half.mkv"
        with av.open(str(path), "w") as container:
            options = {
                "crf": str(crf),
                "b": "0",
                "deadline": "realtime",
                "cpu-used": "8",
                "preset": "veryfast",
            }
            stream = container.add_stream(codec, rate=16, options=options)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for picture in pictures:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode())
        with av.open(str(path)) as container:
            halves.append(
                np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            )
    return np.concatenate((halves[0], halves[1][..., 1:2]), axis=-1)


def decided(frames, lossy=False, premultiplied=None):
    return analyse(RGBAClip(frames, 16, lossy, premultiplied))


def straight_forms(clip):
    """What straight files hide under alpha 0: the colour goes on, or black."""
    return clip, clip * (clip[..., 3:] > 0)


def test_plain_color():
    clip = soft()
    for straight in straight_forms(clip):
        assert decided(straight).color == "straight" and decided(straight).confidence > 0.9
    assert decided(mixed(clip)).color == "black" and decided(mixed(clip)).confidence > 0.9
    assert decided(mixed(clip, 255)).color == "white"


def test_detected_and_undone_is_the_original():
    """premultiply, detect, un-premultiply: within what 8 bits can hold."""
    for kind in ("smoke", "glass"):
        clip = drawn(kind, 5)
        for name, backdrop in (("black", 0), ("white", 255)):
            files = mixed(clip, backdrop)
            assert decided(files).color == name
            alpha = clip[..., 3:].astype(int)
            error = np.abs(unmix(files, (backdrop,) * 3, 8).astype(int) - clip)[..., :3]
            assert (error * np.maximum(alpha, 1) <= 255)[alpha[..., 0] >= 8].all()


def colorful(size=96):
    """Soft discs of many colours."""
    y, x = np.mgrid[:size, :size]
    clip = np.zeros((1, size, size, 4), np.uint8)
    colors = np.random.default_rng(0).integers(0, 256, (9, 3))
    for number, color in enumerate(colors):
        distance = np.hypot(y - size * (number // 3 + 0.5) / 3, x - size * (number % 3 + 0.5) / 3)
        alpha = ((size / 6.5 - distance) * 24).clip(0, 255)
        clip[0, alpha > 0, :3] = color
        clip[0, ..., 3] = np.maximum(clip[0, ..., 3], alpha)
    return clip


@pytest.mark.parametrize("backdrop", [(0, 255, 0), (20, 60, 200), (128, 128, 128)])
@pytest.mark.parametrize("wiped", [False, True])
def test_any_one_backdrop_is_found_and_taken_out(backdrop, wiped):
    """By the colour under alpha 0, or, where that is black, by what the edges fade into."""
    clip = colorful()
    alpha = clip[..., 3:] / 255
    files = clip.copy()
    files[..., :3] = np.rint(clip[..., :3] * alpha + np.array(backdrop) * (1 - alpha))
    if wiped:
        files[clip[..., 3] == 0] = 0
    for lossy in (False, True):
        decisions = decided(files, lossy)
        found = decisions.backdrop
        assert found is not None and np.abs(np.subtract(found, backdrop)).max() <= 6, decisions
        assert decisions.color.startswith("#") and decisions.confidence > 0.5
    back = unmix(files, found, 8)
    sure = clip[..., 3] > 64
    assert np.abs(back[sure].astype(int) - clip[sure])[..., :3].max() <= 12


@pytest.mark.parametrize("kind", KINDS)
def test_straight_clips_have_no_backdrop(kind):
    for clip in straight_forms(drawn(kind, 3)):
        assert not decided(clip).color.startswith("#")
        assert not decided(clip, lossy=True).color.startswith("#")


def test_noise_of_a_codec_does_not_decide():
    clip = soft(4, 48)
    noise = np.random.default_rng(0).integers(-4, 5, clip.shape)
    for frames, name in ((mixed(clip), "black"), (clip, "straight")):
        noisy = (frames.astype(int) + noise).clip(0, 255).astype(np.uint8)
        noisy[..., 3] = clip[..., 3]
        assert decided(noisy, lossy=True).color == name


@pytest.mark.parametrize("alpha", [255, 0])
def test_without_soft_pixels_nothing_is_claimed(alpha):
    decisions = decided(soft(alpha=alpha))
    assert (decisions.color, decisions.confidence) == ("straight", 0)
    assert "no soft pixel" in decisions.reasons["color"]


def test_black_things_do_not_tell():
    decisions = decided(soft(color=(0, 0, 0)))
    assert decisions.confidence < 0.1


def test_color_under_alpha_0_excludes_a_mixture():
    clip = mixed(soft(size=64))
    clip[:, :, :8, :3], clip[:, :, :8, 3] = 200, 0
    found = mixtures(clip, 0, 255, False, False)
    assert found["black"].uncovered == 1 and decided(clip).color == "straight"


def test_a_straight_format_must_be_contradicted_clearly():
    clip = mixed(soft())
    plain, doubted = (
        mixtures(clip, 0, 255, False, straight)["black"].log_odds for straight in (False, True)
    )
    assert plain > doubted > 0
    decisions = decided(clip, premultiplied=False)
    assert decisions.color == "black" and "the format says straight" in decisions.reasons["color"]


def test_a_person_is_believed():
    clip = RGBAClip(mixed(soft()), 16, False, None)
    assert analyse(clip, premultiplied=False).color == "straight"
    assert analyse(clip, premultiplied=False).reasons["color"] == "declared"
    assert analyse(clip, matte=True).color == "matte"


def test_broken_bounds_speak_against_by_their_number():
    assert against(0, 1000) == 0 and against(math.nan, 10) == 0 and against(1, 0) == 0
    few, many, all_of_them = against(0.1, 10), against(0.1, 1000), against(1, 1000)
    assert 0 >= few > many > all_of_them
    n = INDEPENDENT_BOUNDS
    expected = math.log(math.comb(n, 10) * STRAY**10 * (1 - STRAY) ** (n - 10) * (n + 1))
    assert many == pytest.approx(expected)
    assert confidence(0) == 0 and confidence(2) == confidence(-2) == pytest.approx(math.tanh(1))


@pytest.mark.slow
def test_drawn_clips_through_codecs(tmp_path):
    """At least 95 % of straight and premultiplied clips, dark ones among them; a mixture with white
    is harder."""
    right = {"straight": [], "black": [], "white": []}
    for i, (codec, crf) in enumerate(
        [(None, 0), ("libx264", 18), ("libx264", 28), ("libvpx-vp9", 30)]
    ):
        for j, kind in enumerate(KINDS):
            clip = drawn(kind, 1000 + 7 * i + j)
            if (i + j) % 4 == 0:
                clip = np.concatenate(
                    ((clip[..., :3] * 0.35).astype(np.uint8), clip[..., 3:]), axis=-1
                )
            forms = [
                ("straight", straight_forms(clip)[j % 2]),
                ("black", mixed(clip)),
                ("white", mixed(clip, 255)),
            ]
            for truth, frames in forms:
                if codec:
                    frames = through(frames, codec, crf, tmp_path)
                decisions = decided(frames, lossy=codec is not None)
                right[truth].append(decisions.color == truth or decisions.confidence < 0.05)
    assert np.mean(right["straight"] + right["black"]) >= 0.95
    assert np.mean(right["white"]) >= 0.85


@pytest.mark.slow
@pytest.mark.skipif(
    not (MEDIA / "pairs_meta.json").exists(), reason=f"no labels, pairs_meta.json, in {MEDIA}"
)
@pytest.mark.long
def test_real_media():
    """Packed videos hold source colour; pairs were made straight; cut-outs of rembg break what PNG
    defines."""
    origins = json.loads((MEDIA / "pairs_meta.json").read_text())
    wrong, count = [], 0
    for path in sorted((MEDIA / "packed").glob("*.mp4")):
        origin = origins[path.stem]
        clip = read_packed(path, tuple(origin["rgb_rect"]), tuple(origin["alpha_rect"]))
        truth = "black" if origin["source_premultiplied_on_black"] else "straight"
        count += 1
        wrong += [path.stem] * (decided(clip.frames[::8], True).color != truth)
    for path in sorted((MEDIA / "pairs").glob("*_fgr.mp4")):
        clip = read_pair(path, path.with_name(path.name.replace("_fgr", "_pha"))).frames[::8]
        count += 2
        wrong += [path.stem] * (decided(clip, True).color != "straight")
        wrong += [f"{path.stem} premultiplied"] * (decided(mixed(clip), True).color != "black")
    for name, truth in (("animal-3", "black"), ("girl-3", "black"), ("plants-1", "straight")):
        count += 1
        clip = read_rgba(MEDIA / f"stills/rembg/examples_{name}.out.png").frames
        wrong += [name] * (decided(clip, premultiplied=False).color != truth)
    assert len(wrong) <= 0.05 * count, wrong
