import av
import numpy as np
import pytest
import torch

from acetate import video_out
from acetate.alpha import checkerboard, over
from acetate.regions import outlines
from acetate.video_io import describe, read_pair, read_rgba
from acetate.video_out import FORMATS, SUFFIXES, write_clip


def film(frames=5, height=32, width=48, hidden=None):
    """A soft disc that moves over a smooth gradient; `hidden` is the colour under alpha 0. A little
    out of range."""
    t, y, x = torch.meshgrid(
        torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    distance = torch.hypot(y - height / 2, x - width * (0.4 + 0.02 * t))
    alpha = (1.5 - distance / (height * 0.25)).clamp(-0.02, 1.02)[None]
    rgb = torch.stack(
        (
            x / width * 2.1 - 1.05,
            y / height * 1.8 - 0.9,
            0.4 + (x - y) / (width + height) + t * 0.02,
        )
    )
    return (
        rgb
        if hidden is None
        else torch.where(alpha > 0, rgb, torch.tensor(hidden)[:, None, None, None])
    ), alpha


def noise(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, *shape, generator=generator) * 2 - 1, torch.rand(
        1, *shape, generator=generator
    )


def steps(rgb, alpha):
    """What 8 bit should hold, not rounded: float (T, H, W, 4) in 0..255."""
    rgba = torch.cat(((rgb.clamp(-1, 1) + 1) / 2, alpha.clamp(0, 1)))
    return (rgba * 255).permute(1, 2, 3, 0).numpy()


def read(paths):
    return read_rgba(paths[0]) if len(paths) == 1 else read_pair(*paths)


def over_black(rgba):
    return rgba[..., :3] * (rgba[..., 3:] / 255.0)


def mean_error(a, b):
    return np.abs(a.astype(np.float64) - b).mean()


def opaque_frames(path):
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", ["png", "apng", "webp"])
@pytest.mark.parametrize("make", [film, noise])
def test_exact_formats(tmp_path, name, make):
    rgb, alpha = make() if make is film else make(3, 9, 7)
    (path,) = write_clip(tmp_path / "a", rgb, alpha, 24, [name])
    clip, expected = read_rgba(path), np.rint(steps(rgb, alpha)).astype(np.uint8)
    assert np.array_equal(clip.frames[..., 3], expected[..., 3]) and not clip.lossy
    visible = (expected[..., 3:] > 0) | (name != "webp")  # WebP drops colour that nobody sees
    assert np.array_equal(clip.frames * visible, expected * visible)


# Mean errors in steps of 255 of this clip, measured with FFmpeg 8.1: webm 2.69, 0.18, 0.41; pair
# 2.68, 0.30, 0.45; prores 0.26, 0.07, 0.06, which is the reader's rounding to 8 bits. The limits
# leave a margin of a half. The colour of 4:2:0 is so far off because the reader repeats chroma over
# 2x2 pixels and this clip has 5 steps a pixel.
@pytest.mark.parametrize(
    ("name", "limits"),
    [("webm", (4.0, 0.3, 0.6)), ("pair", (4.0, 0.5, 0.7)), ("prores", (0.4, 0.1, 0.1))],
)
def test_lossy_formats(tmp_path, name, limits):
    rgb, alpha = film()
    clip, expected = read(write_clip(tmp_path / "a", rgb, alpha, 24, [name])), steps(rgb, alpha)
    errors = (
        mean_error(clip.frames[..., :3], expected[..., :3]),
        mean_error(clip.frames[..., 3], expected[..., 3]),
        mean_error(over_black(clip.frames), over_black(expected)),
    )
    assert clip.frames.shape == expected.shape and clip.lossy
    assert all(error <= limit for error, limit in zip(errors, limits, strict=True)), errors


@pytest.mark.parametrize("name", ["webm", "pair"])
def test_hidden_color_stays_hidden(tmp_path, name):
    rgb, alpha = film()
    loud, _ = film(hidden=(1.0, -1.0, 1.0))
    visible = steps(rgb, alpha)[..., 3] > 5
    quiet_error, loud_error = (
        mean_error(
            read(write_clip(tmp_path / "a", color, alpha, 24, [name])).frames[visible],
            steps(rgb, alpha)[visible],
        )
        for color in (rgb, loud)
    )
    assert loud_error < quiet_error + 0.6  # 0.3 measured; 3 if chroma were the plain mean


@pytest.mark.parametrize("name", ["png", "apng", "webp", "webm", "prores", "pair"])
def test_rounded_not_truncated(tmp_path, name):
    def written(color, alpha):
        """The right half; the left is transparent, for a WebP that is opaque all over has no alpha
        to read."""
        alpha = torch.full((1, 1, 16, 32), alpha) * (torch.arange(32) >= 16)
        paths = write_clip(tmp_path / "a", torch.full((3, 1, 16, 32), color), alpha, 24, [name])
        return read(paths).frames[:, :, 20:].astype(int)

    step = 1 if name in ("webm", "pair") else 0
    assert (written(0.999, 0.999)[..., 3] == 255).all()
    assert np.abs(written(0.999, 0.999) - 255).max() <= step
    assert np.abs(written(2 * 100.6 / 255 - 1, 100.6 / 255) - 101).max() <= step
    assert np.abs(written(2 * 100.4 / 255 - 1, 100.4 / 255) - 100).max() <= step


def test_low_precision_and_gradients_are_fine(tmp_path):
    rgb, alpha = (tensor.bfloat16().requires_grad_() for tensor in film(2))
    (path,) = write_clip(tmp_path / "a", rgb, alpha, 24, ["png"])
    assert np.array_equal(
        read_rgba(path).frames, np.rint(steps(rgb.detach().float(), alpha.detach().float()))
    )


def test_prores_keeps_ten_bits(tmp_path):
    """Every level of a 10-bit ramp comes back, in alpha exactly and in luma within the codec's
    loss."""
    ramp = (torch.arange(1024) / 1023).view(1, 1, 16, 64)
    (path,) = write_clip(tmp_path / "a", (ramp * 2 - 1).expand(3, -1, -1, -1), ramp, 24, ["prores"])
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.profile, context.codec_tag) == ("4444", "ap4h")
        (frame,) = container.decode(video=0)
        assert frame.colorspace == 1 and frame.color_range == 1  # BT.709, limited
    bits = frame.format.components[3].bits
    luma, alpha = (
        np.frombuffer(frame.planes[i], np.uint16).reshape(-1, frame.planes[i].line_size // 2)[
            :16, :64
        ]
        for i in (0, 3)
    )
    assert np.array_equal(np.rint(alpha / (2**bits - 1) * 1023).ravel(), np.arange(1024))
    expected = 64 + 876 * ramp[0, 0].numpy()
    # a quarter of an 8-bit step; 0.3 measured
    assert mean_error(luma / 2 ** (bits - 10), expected) < 1
    data = path.read_bytes()
    # BT.709 primaries, transfer, matrix in the container
    assert b"colrnclc" + bytes((0, 1, 0, 1, 0, 1)) in data
    header = data.index(b"icpf")
    assert data[header + 18 : header + 21] == bytes((1, 1, 1))  # and in the frame


def test_webm_says_that_it_has_alpha(tmp_path):
    (path,) = write_clip(tmp_path / "a", *film(), 24, ["webm"])
    assert bytes((0x53, 0xC0, 0x81, 1)) in path.read_bytes()  # AlphaMode = 1
    assert describe(path).alpha


def rate(path):
    """Of a video what its header says, with alpha or without."""
    if path.is_dir() or path.suffix not in (".mov", ".webm", ".mp4"):
        return read_rgba(path).fps
    with av.open(path) as container:
        return float(container.streams.video[0].average_rate)


@pytest.mark.parametrize("fps", [16, 24000 / 1001])
@pytest.mark.parametrize("name", FORMATS)
def test_length_and_rate(tmp_path, name, fps):
    for frames in (1, 5):
        for path in write_clip(tmp_path / f"{frames}", *film(frames), fps, [name]):
            header = describe(path)
            enlarged = 12 if name == "preview" else 1
            assert (header.frames, header.width, header.height) == (
                frames,
                48 * enlarged,
                32 * enlarged,
            )
            still = name == "png" or (frames == 1 and name in ("webp", "apng"))
            # WebP counts milliseconds: half of one in the length of the clip.
            tolerance = 0.51 / (1000 * frames / fps) if name == "webp" else 1e-6
            assert rate(path) is None if still else rate(path) == pytest.approx(fps, rel=tolerance)


def test_equal_frames_stay_apart(tmp_path):
    rgb, alpha = (tensor.expand(-1, 4, -1, -1) for tensor in film(1))
    for path in write_clip(tmp_path / "a", rgb, alpha, 12, ["apng", "webm", "prores"]):
        assert (describe(path).frames, rate(path)) == (4, 12)


@pytest.mark.parametrize("name", FORMATS)
def test_odd_sides(tmp_path, name):
    paths = write_clip(tmp_path / "a", *film(2, 31, 45), 24, [name])
    size = {"webm": (46, 32), "pair": (46, 32), "preview": (585 + 1, 403 + 1)}.get(name, (45, 31))
    assert [(describe(path).width, describe(path).height) for path in paths] == [size] * len(paths)
    if name in ("webm", "pair"):
        frames = read(paths).frames.astype(int)
        assert (
            np.abs(frames[:, 31] - frames[:, 30]).max() <= 16
            and np.abs(frames[:, :, 45] - frames[:, :, 44]).max() <= 16
        )


def test_preview_is_the_clip_over_a_checkerboard(tmp_path):
    rgb, alpha = film()
    (path,) = write_clip(tmp_path / "a", rgb, alpha, 24, ["preview"])
    shown = over(rgb.clamp(-1, 1), alpha.clamp(0, 1), checkerboard(32, 48, cell=1))
    expected = ((shown + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    large = expected.repeat(12, 1).repeat(12, 2)  # 32x48 to 384 pixels on the short side
    assert mean_error(opaque_frames(path), large) <= 3
    assert not describe(path).alpha
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((48, 48), (384, 384)),
        ((400, 200), (800, 400)),
        ((480, 832), (480, 832)),
        ((8, 512), (32, 2048)),
    ],
)
def test_preview_is_enlarged_by_whole_factors(tmp_path, size, shown):
    (path,) = write_clip(tmp_path / "a", *film(1, *size), 24, ["preview"])
    assert (describe(path).height, describe(path).width) == shown


def test_preview_shows_the_guide_and_its_way(tmp_path):
    """A circle of a third of the width that moves from the left to the right, along the middle
    row."""
    rgb, alpha = torch.full((3, 9, 48, 48), -1.0), torch.ones(1, 9, 48, 48)
    ellipses = torch.tensor([[2.5 + 3 * cell, 5.5, 4.0, 4.0, 0.0] for cell in range(3)])
    guide = outlines(ellipses, 12, 12, 9)
    (path,) = write_clip(tmp_path / "a", rgb, alpha, 24, ["preview"], guide)
    frames = [frame.astype(int)[..., 0] > 90 for frame in opaque_frames(path)]  # its red on black
    for shown, centre in ((frames[0], 96), (frames[4], 192), (frames[8], 288)):
        for x, y in ((centre - 64, 192), (centre + 64, 192), (centre, 128), (centre, 256)):
            assert shown[y - 4 : y + 4, x - 4 : x + 4].any()
        assert not shown[:120].any() and not shown[264:].any()
        assert shown[188:196, 100:284].any(0).mean() > 0.9  # the way of its centre
        assert shown[190:194, 286:290].all()  # and its end
    write_clip(tmp_path / "a", rgb, alpha, 24, ["preview"])
    assert max(frame.max() for frame in opaque_frames(path)) < 40


def test_paths_follow_the_formats(tmp_path):
    stem = tmp_path / "new" / "folder" / "horse.v2"  # a dot in the stem is no suffix
    paths = write_clip(stem, *film(1), 24, ["pair", "png", "webm", "png"])
    assert [path.name for path in paths] == [
        "horse.v2_fgr.mp4",
        "horse.v2_pha.mp4",
        "horse.v2_png",
        "horse.v2.webm",
    ]
    assert sorted(stem.parent.iterdir()) == sorted(paths)
    assert [file.name for file in paths[2].iterdir()] == ["0000.png"]
    assert write_clip(stem, *film(1), 24, []) == []


def test_every_format_has_a_writer():
    assert set(FORMATS) == set(SUFFIXES) == set(video_out.WRITERS)


def test_unknown_format_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"'gif' is unknown; choose from png, webm, prores"):
        write_clip(tmp_path / "a", *film(), 24, ["png", "gif"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rgb", "alpha"),
    [((3, 5, 8, 8), (1, 4, 8, 8)), ((3, 5, 8, 8), (3, 5, 8, 8)), ((4, 5, 8, 8), (1, 5, 8, 8))]
    + [((1, 3, 5, 8, 8), (1, 1, 5, 8, 8)), ((3, 0, 8, 8), (1, 0, 8, 8)), ((3, 8, 8), (1, 8, 8))],
)
def test_bad_shapes(tmp_path, rgb, alpha):
    with pytest.raises(ValueError, match=r"rgb: \(.*alpha: \(.*a clip is rgb \(3, T, H, W\)"):
        write_clip(tmp_path / "a", torch.zeros(rgb), torch.zeros(alpha), 24, ["png"])
    assert not list(tmp_path.iterdir())


def test_bad_values(tmp_path):
    rgb, alpha = film()
    rgb[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="rgb: 1 of 23040 values are not finite"):
        write_clip(tmp_path / "a", rgb, alpha, 24, ["png"])
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps: "):
            write_clip(tmp_path / "a", *film(), fps, ["png"])
    assert not list(tmp_path.iterdir())
