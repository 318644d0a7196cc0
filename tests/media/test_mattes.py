import numpy as np
import pytest
from PIL import Image

from acetate.media.clip import LIMITS
from acetate.media.mattes import is_cutout, open_matte
from acetate.video_io import MediaError, encode_ffv1, read_pair
from tests.media.films import write


def read_matte(path):
    return open_matte(path).collected(path, LIMITS)


SOFT = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(4, 16)
HARD = (SOFT > 127).astype(np.uint8)
WHITE = np.full_like(SOFT, 255)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759
GREYS = [shade for i in range(256) for shade in (i, i, i)]


def palette(values, colors):
    image = Image.fromarray(values, "P")
    image.putpalette(colors)
    return image


def rgb(values, colors):
    return Image.fromarray(np.array(colors, np.uint8)[values])


@pytest.mark.parametrize(
    ("image", "expected", "note"),
    [
        (Image.fromarray(SOFT), SOFT, None),
        (palette(SOFT, GREYS), SOFT, None),
        (palette(1 - HARD, [255] * 3 + [0] * 765), HARD * 255, None),
        (Image.fromarray(np.dstack([WHITE, SOFT]), "LA"), SOFT, "alpha of its own"),
        (Image.fromarray(np.dstack([WHITE * 0] * 3 + [SOFT])), SOFT, "alpha of its own"),
        (Image.fromarray(np.dstack([SOFT] * 3 + [WHITE])), SOFT, None),
        (Image.fromarray(HARD), HARD * 255, "mask of 0 and 1"),
        (Image.fromarray(HARD.astype(np.uint16)), HARD * 255, "0 and 1"),
        (palette(HARD, VOC), HARD * 255, "indices 0 and 1"),
        (palette(HARD * 2, VOC), HARD * 255, "indices 0 and 2"),
        (rgb(HARD, [(0, 0, 0), (128, 0, 0)]), HARD * 255, "colours #000000 and #800000"),
    ],
)
def test_what_a_matte_means(tmp_path, image, expected, note):
    image.save(tmp_path / "m.png")
    film = read_matte(tmp_path / "m.png")
    assert (film.frames == expected[None]).all() and film.frames.dtype == np.uint8
    assert [note in said for said in film.notes] == [True] * (note is not None)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (palette(HARD + (SOFT > 200), VOC), r"a mask with the indices 0, 1, 2, which"),
        (Image.fromarray(HARD + (SOFT > 200)), r"a mask with the values 0, 1, 2, which"),
        (rgb(HARD + (SOFT > 200), [(0,) * 3, (128, 0, 0), (0, 128, 0)]), r"#000000, #008000, #80"),
    ],
)
def test_a_mask_that_numbers_things_is_refused(tmp_path, image, reason):
    image.save(tmp_path / "m.png")
    with pytest.raises(MediaError, match=reason):
        read_matte(tmp_path / "m.png")


def test_indices_count_over_a_whole_sequence(tmp_path):
    """A frame that shows nothing has but one of them."""
    for i in range(3):
        palette(HARD * (i > 0), VOC).save(tmp_path / f"{i}.png")
    assert read_matte(tmp_path).frames.max(axis=(1, 2)).tolist() == [0, 255, 255]
    palette(HARD * 2, VOC).save(tmp_path / "3.png")
    with pytest.raises(MediaError, match="indices 0, 1, 2"):
        read_matte(tmp_path)


def test_films(tmp_path):
    clip = np.zeros((3, 16, 32, 4), np.uint8)
    clip[..., :3], clip[:, :, 8:, 3] = (200, 40, 30), 128
    (tmp_path / "own.mkv").write_bytes(encode_ffv1(clip, 10))
    ones = (clip[..., 3:] > 0).astype(np.uint8).repeat(3, -1)
    write(tmp_path / "ones.mkv", ones, "ffv1", "gray")
    own, stretched = read_matte(tmp_path / "own.mkv"), read_matte(tmp_path / "ones.mkv")
    assert (own.frames == clip[..., 3]).all() and "alpha of its own" in own.notes[-1]
    assert (stretched.frames == ones[..., 0] * 255).all() and "0 and 1" in stretched.notes[-1]


def test_a_pair_says_what_its_matte_is(tmp_path):
    Image.new("RGB", (16, 4), (9, 8, 7)).save(tmp_path / "a_fgr.png")
    Image.fromarray(np.dstack([WHITE] * 3 + [SOFT])).save(tmp_path / "a_pha.png")
    clip = read_pair(tmp_path / "a_fgr.png", tmp_path / "a_pha.png")
    assert (clip.frames[0, ..., 3] == SOFT).all() and (clip.frames[..., :3] == (9, 8, 7)).all()
    assert "a_pha.png has alpha of its own" in clip.notes[0]


def test_what_a_cutout_is():
    picture = np.random.default_rng(0).integers(0, 255, (1, 4, 16, 3), dtype=np.uint8)
    alpha = SOFT[None, ..., None]
    assert is_cutout(np.concatenate((picture, alpha), -1))
    assert not is_cutout(np.concatenate((picture, alpha * 0 + 255), -1))
    for mask in (alpha * 0 + 255, alpha * 0, alpha):
        assert not is_cutout(np.concatenate((mask.repeat(3, -1), alpha), -1))


def test_halves_of_other_rates_are_said(tmp_path):
    frames = np.stack([np.dstack([SOFT] * 3)] * 3).repeat(4, axis=1)
    write(tmp_path / "a.mkv", frames, "ffv1", "bgr0", fps=24)
    for fps in (24, 12):
        write(tmp_path / "b.mkv", frames, "ffv1", "bgr0", fps=fps)
        clip = read_pair(tmp_path / "a.mkv", tmp_path / "b.mkv")
        said = [note for note in clip.notes if "a.mkv has 24 frames/s and b.mkv 12" in note]
        assert len(clip.frames) == 3 and clip.fps == 24 and bool(said) == (fps == 12)
