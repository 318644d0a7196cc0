import json
import struct

import numpy as np
import pytest
from PIL import Image

from acetate.media.packed import SURE, find_packing, stated_packing
from acetate.video_io import MediaError, measure_packing, read_packed
from tests.media.films import drawn, write

SIDE = 160


def packed(clip, layout, half=False, gutter=0):
    """RGB frames with colour, black under alpha 0, and alpha beside it; and the rectangles of
    both."""
    color, alpha = clip[..., :3] * (clip[..., 3:] > 0), clip[..., 3]
    if half:
        alpha = np.stack([np.asarray(Image.fromarray(a).reduce(2)) for a in alpha])
    halves = [color, alpha[..., None].repeat(3, axis=-1)]
    axis, turned = (2 if layout in ("right", "left") else 1), layout in ("left", "above")
    first, second = halves[::-1] if turned else halves
    height, width = (max(first.shape[i], second.shape[i]) for i in (1, 2))
    start = first.shape[axis] + gutter
    size = [height, width]
    size[axis - 1] = start + second.shape[axis]
    frames = np.zeros((len(clip), *size, 3), np.uint8)
    rects = []
    for half_, at in ((first, 0), (second, start)):
        x, y = (at, 0) if axis == 2 else (0, at)
        frames[:, y : y + half_.shape[1], x : x + half_.shape[2]] = half_
        rects.append((x, y, half_.shape[2], half_.shape[1]))
    return frames, *(rects[::-1] if turned else rects)


def overlap(a, b):
    """Of two rectangles, intersection by union."""
    sides = [max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    both = sides[0] * sides[1]
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def over(clip, backdrop):
    alpha = clip[..., 3:] / 255
    return (alpha * clip[..., :3] + (1 - alpha) * backdrop).astype(np.uint8)


def beside(*pictures):
    return list(np.concatenate(pictures, axis=2))


@pytest.mark.parametrize("kind", ["flame", "glass"])
@pytest.mark.parametrize(
    ("layout", "half", "gutter"),
    [("right", False, 0), ("below", False, 8), ("left", False, 8), ("above", False, 0),
     ("right", True, 0),
     ("below", True, 8)],
)  # fmt: skip
def test_rectangles_are_found(kind, layout, half, gutter):
    frames, color, alpha = packed(drawn(kind, 21, 4, SIDE), layout, half, gutter)
    found = find_packing(list(frames))
    assert found is not None and found.confidence >= SURE
    # A gutter is not told from a margin that is empty in both
    assert min(overlap(found.color, color), overlap(found.alpha, alpha)) >= (
        0.85 if gutter else 0.99
    )


def test_a_packed_video_comes_back(tmp_path):
    """Through a codec that blurs, and with pictures at its ends that are empty."""
    clip = drawn("flame", 22, 8, SIDE)
    clip[[0, -1]] = 0
    frames, color, alpha = packed(clip, "right")
    path = write(tmp_path / "a.mp4", frames, "libx264", "yuv420p", crf="28")
    found = measure_packing(path)
    assert (
        found is not None
        and found.confidence >= SURE
        and (found.color, found.alpha) == (color, alpha)
    )
    back = read_packed(path, found.color, found.alpha)
    assert np.abs(back.frames[..., 3].astype(int) - clip[..., 3]).mean() < 3


def test_rectangles_are_of_the_picture_as_it_is_shown(tmp_path):
    clip = drawn("flame", 22, 4, SIDE)
    frames, _, _ = packed(clip, "right")
    path = write(tmp_path / "a.mp4", frames, "libx264", "yuv420p", crf="20")
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # its matrix (ISO 14496-12, 8.3.2): a quarter to the right
    content[at : at + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, SIDE << 16, 0, 1 << 30
    )
    path.write_bytes(content)
    found = measure_packing(path)
    assert found is not None and found.color == (0, 0, SIDE, SIDE)
    assert found.alpha == (0, SIDE, SIDE, SIDE)
    back = read_packed(path, found.color, found.alpha).frames[..., 3].astype(int)
    assert np.abs(back - np.rot90(clip[..., 3], -1, (1, 2))).mean() < 3


def test_a_grey_thing_is_never_sure():
    """It could as well be a copy."""
    clip = drawn("flame", 23, 4, SIDE)
    clip[..., :3] = clip[..., :3].mean(axis=-1, keepdims=True)
    found = find_packing(list(packed(clip, "right")[0]))
    assert found is not None and 0 < found.confidence < SURE and "outlines agree" in found.reason


@pytest.mark.parametrize("kind", ["flame", "shape", "hair"])
def test_ordinary_videos_are_not_packed(kind):
    clip = drawn(kind, 24, 4, SIDE)
    scene = over(clip, np.linspace(0, 255, SIDE)[None, None, :, None])
    grey = scene.mean(axis=-1, keepdims=True).repeat(3, axis=-1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(-4, 5, scene.shape)
    videos = {
        "a scene": list(scene),
        "on black": list(over(clip, 0)),
        "two eyes": beside(scene[:, :, 8:], scene[:, :, :-8]),
        "with its grey copy": beside(scene, grey),
        "with its grey copy, after a codec": beside(
            scene, (grey + noise).clip(0, 255).astype(np.uint8)
        ),
        "beside another": beside(scene, over(drawn("glass", 25, 4, SIDE), 90)),
    }
    for name, pictures in videos.items():
        found = find_packing(pictures)
        assert found is None or found.confidence < SURE, name


def test_nothing_to_see():
    assert find_packing([np.full((64, 128, 3), 20, np.uint8)] * 3) is None


LAYOUT = {"videoW": 48, "videoH": 32, "rgbFrame": [0, 0, 32, 32], "aFrame": [32, 0, 16, 16]}


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def test_layout_of_vap(tmp_path):
    """In the file's own box, which counts first, or beside it."""
    film, beside = tmp_path / "a.mp4", tmp_path / "vapc.json"
    wide = struct.pack(">I4sQ", 1, b"mdat", 20) + b"1234"  # a 64-bit length
    film.write_bytes(box(b"ftyp", b"isom") + wide)
    assert stated_packing(film, (48, 32)) is None
    beside.write_text(json.dumps({"info": LAYOUT}), encoding="utf-8-sig")
    assert stated_packing(film, (48, 32)) == ((0, 0, 32, 32), (32, 0, 16, 16))
    assert stated_packing(film, (64, 32)) is None  # of another film
    mine = json.dumps({"info": {**LAYOUT, "aFrame": [32, 16, 16, 16]}}).encode()
    film.write_bytes(box(b"ftyp", b"isom") + wide + box(b"vapc", mine))
    assert stated_packing(film, (48, 32)) == ((0, 0, 32, 32), (32, 16, 16, 16))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"info": {**LAYOUT, "aFrame": [40, 0, 16, 16]}},
            r"aFrame=\[40, 0, 16, 16\] is not inside",
        ),
        ({"info": {**LAYOUT, "rgbFrame": [0, 0, "1", 1]}}, "rgbFrame=.*; x, y, width, height"),
        ({"info": {**LAYOUT, "videoW": 50}}, "is for 50x32 .* the picture is 48x32"),
        ({"info": {**LAYOUT, "aFrame": [0, 0, 10**30, 1]}}, "is not inside"),
        ([], "has no entry info"),
        ("[" * 5000, "cannot be decoded"),
    ],
)
def test_layouts_that_cannot_be_used(tmp_path, content, reason):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "a.mp4").write_bytes(box(b"vapc", text.encode()))
    with pytest.raises(MediaError, match=reason):
        stated_packing(tmp_path / "a.mp4", (48, 32))


def test_boxes_that_lie_about_their_length_end(tmp_path):
    for head in (b"\0\0\0\1vapc" + b"\0" * 8, b"\0\0\0\4free", b"\xff" * 40, b"\0\0\0\0mdat"):
        (tmp_path / "a.mp4").write_bytes(head)
        assert stated_packing(tmp_path / "a.mp4", (48, 32)) is None
