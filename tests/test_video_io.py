import io

import av
import numpy as np
import pytest
from PIL import Image

from acetate.video_io import (
    KEY,
    MediaError,
    decode_ffv1,
    describe,
    encode_ffv1,
    read_packed,
    read_pair,
    read_rgba,
    write_video,
)
from tests.media.films import card, write


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_luma(path, luma, color_range):
    """H.264 whose luma plane holds exactly these values, (T, H, W)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = luma.shape[2], luma.shape[1], "yuv420p"
        stream.codec_context.color_range = color_range
        for plane in luma:
            grey = np.full((luma.shape[1] // 2, luma.shape[2]), 128, np.uint8)
            frame = av.VideoFrame.from_ndarray(np.concatenate((plane, grey)), format="yuv420p")
            frame.color_range = color_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("shape", [(5, 16, 16, 4), (1, 3, 5, 4), (14, 33, 47, 4)])
def test_ffv1_keeps_every_bit(shape):
    frames = noise(*shape)
    data = encode_ffv1(frames, 24)
    decoded, fps = decode_ffv1(data, "clip", shape[:3])
    assert np.array_equal(decoded, frames) and fps == 24
    assert encode_ffv1(frames, 24) == data  # no clock, no random identifier


def test_ffv1_keeps_broadcast_rates():
    data = encode_ffv1(noise(2, 8, 8, 4), 24000 / 1001)
    assert decode_ffv1(data, "clip", (2, 8, 8))[1] == pytest.approx(24000 / 1001)


@pytest.mark.parametrize(
    "frames", [noise(2, 8, 8, 3), noise(8, 8, 4), noise(0, 8, 8, 4), np.zeros((1, 8, 8, 4))]
)
def test_ffv1_refuses_other_arrays(frames):
    with pytest.raises(ValueError, match=r"uint8 \(T, H, W, 4\)"):
        encode_ffv1(frames, 24)


@pytest.mark.parametrize("span", [(0, 1), (3, 9), (8, 12), (12, 13), (0, 13)])
def test_frames_of_a_clip_are_decoded_without_the_others(span):
    """Every other frame is damaged: those before its key frame, and those after it."""
    first, last = span
    frames = np.random.default_rng(0).integers(0, 256, (13, 16, 24, 4), dtype=np.uint8)
    data = encode_ffv1(frames, 24)
    with av.open(io.BytesIO(data)) as film:
        packets = [bytes(packet) for packet in film.demux(video=0) if packet.size]
    key = first - first % KEY
    for packet in packets[:key] + packets[last:]:
        assert data.count(packet) == 1
        data = data.replace(packet, bytes(len(packet)))
    found, _ = decode_ffv1(data, "clip", (13, 16, 24), span)
    assert np.array_equal(found, frames[first:last])


def test_ffv1_errors_name_the_clip(tmp_path):
    with pytest.raises(MediaError, match="horse: cannot be decoded"):
        decode_ffv1(b"not a film", "horse", (2, 16, 16))
    opaque = write(tmp_path / "a.mkv", noise(2, 16, 16, 3), "ffv1", "bgr0")
    with pytest.raises(MediaError, match=r"horse: pixel format bgr0.*alpha"):
        decode_ffv1(opaque.read_bytes(), "horse", (2, 16, 16))


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_still(tmp_path, name):
    frames = noise(1, 9, 7, 4)
    Image.fromarray(frames[0]).save(tmp_path / name, lossless=True, exact=True)
    clip = read_rgba(tmp_path / name)
    assert np.array_equal(clip.frames, frames)
    assert (clip.fps, clip.lossy, clip.premultiplied) == (None, False, False)
    assert describe(tmp_path / name).frames == 1


def test_palette_with_transparency_is_rgba(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    frame = read_rgba(tmp_path / "a.png").frames[0]
    assert frame[0, 0].tolist() == [0, 255, 0, 255] and frame[1, 1, 3] == 0


def test_still_without_alpha(tmp_path):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"a\.png: mode RGB has no alpha"):
        read_rgba(tmp_path / "a.png")
    assert not describe(tmp_path / "a.png").alpha


def test_damaged_missing_and_unknown_files(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    (tmp_path / "cut.mov").write_bytes(b"\0" * 100)
    (tmp_path / "a.psd").write_bytes(b"")
    for name, message in (
        ("cut.png", "cannot be decoded"),
        ("cut.mov", "cannot be decoded"),
        ("none.png", "no such file"),
        ("none.webm", "no such file"),
        ("a.psd", "suffix"),
    ):
        with pytest.raises(MediaError, match=message) as error:
            read_rgba(tmp_path / name)
        assert name in str(error.value)


def test_cut_off_png_is_an_error(tmp_path):
    Image.fromarray(noise(64, 64, 4)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_rgba(tmp_path / "a.png")


def test_sequence_in_natural_order(tmp_path):
    frames = noise(12, 6, 6, 4)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"f{i}.png")
    clip = read_rgba(tmp_path)
    assert np.array_equal(clip.frames, frames) and clip.fps is None  # f2 before f10
    assert describe(tmp_path).frames == 12
    Image.fromarray(noise(6, 5, 4)).save(tmp_path / "f12.png")
    with pytest.raises(MediaError, match=r"f12\.png is 5x6, f0\.png is 6x6"):
        read_rgba(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(MediaError, match="no image in the folder"):
        read_rgba(tmp_path)


@pytest.mark.parametrize("name", ["a.apng", "a.webp"])
def test_animation_is_composed_and_timed(tmp_path, name):
    frames = card()
    for i, frame in enumerate(frames):  # little changes: encoders store partial frames
        frame[8:12, 8 + i : 12 + i] = (0, 0, 255, 255)
    frames[3, 24:28] = 0
    images = [Image.fromarray(frame) for frame in frames]
    durations = [100, 100, 200, 50, 50]
    options = {"lossless": True, "exact": True} if name == "a.webp" else {"format": "PNG"}
    images[0].save(
        tmp_path / name, save_all=True, append_images=images[1:], duration=durations, **options
    )
    clip = read_rgba(tmp_path / name)
    # 100 and 50 ms are equally common: the shorter one
    shown = frames[[0, 0, 1, 1, 2, 2, 2, 2, 3, 4]]
    visible = shown[..., 3:] > 0
    assert np.array_equal(clip.frames[..., 3], shown[..., 3])
    assert np.array_equal(clip.frames * visible, shown * visible)
    assert (
        clip.fps == pytest.approx(20)
        and not clip.lossy
        and "50 ms: 5 frames became 10, 0 dropped" in clip.notes[0]
    )
    header = describe(tmp_path / name)
    assert (header.frames, header.alpha) == (5, True)


def test_apng_default_image_is_not_a_frame(tmp_path):
    frames = noise(4, 6, 6, 4)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        tmp_path / "a.apng",
        format="PNG",
        save_all=True,
        append_images=images[1:],
        default_image=True,
    )
    assert np.array_equal(read_rgba(tmp_path / "a.apng").frames, frames[1:])
    assert describe(tmp_path / "a.apng").frames == 3


def test_lossy_webp_says_so(tmp_path):
    Image.fromarray(noise(16, 16, 4)).save(tmp_path / "a.webp", quality=50)
    assert read_rgba(tmp_path / "a.webp").lossy and describe(tmp_path / "a.webp").lossy


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.mp4", "libx264")])
def test_video_without_alpha(tmp_path, name, codec):
    path = write(tmp_path / name, card(), codec, "yuv420p")
    with pytest.raises(MediaError, match=r"has no alpha.*NAME_fgr"):
        read_rgba(path)
    assert not describe(path).alpha


@pytest.mark.parametrize(("color_range", "low", "high"), [(1, 16, 235), (2, 0, 255)])
def test_pair_stretches_the_luma(tmp_path, color_range, low, high):
    luma = np.full((3, 16, 64), low, np.uint8)
    luma[..., 32:] = high
    luma[..., :8] = max(low - 10, 0)  # below black
    fgr = write(tmp_path / "a_fgr.mp4", noise(3, 16, 64, 3), "libx264", "yuv420p")
    clip = read_pair(fgr, write_luma(tmp_path / "a_pha.mp4", luma, color_range))
    assert clip.frames.shape == (3, 16, 64, 4) and clip.lossy and clip.premultiplied is None
    assert (clip.frames[..., :32, 3] == 0).all() and (clip.frames[..., 32:, 3] == 255).all()


def test_pair_of_images(tmp_path):
    color, alpha = noise(8, 8, 3), noise(8, 8)
    Image.fromarray(color).save(tmp_path / "a_fgr.png")
    Image.fromarray(alpha).save(tmp_path / "a_pha.png")
    clip = read_pair(tmp_path / "a_fgr.png", tmp_path / "a_pha.png")
    assert np.array_equal(clip.frames[0], np.dstack((color, alpha))) and not clip.lossy


def test_pair_must_match(tmp_path):
    fgr = write(tmp_path / "a_fgr.mp4", noise(4, 16, 32, 3), "libx264", "yuv420p")
    short = write(tmp_path / "b_pha.mp4", noise(3, 16, 32, 3), "libx264", "yuv420p")
    small = write(tmp_path / "c_pha.mp4", noise(4, 16, 16, 3), "libx264", "yuv420p")
    with pytest.raises(MediaError, match=r"a_fgr\.mp4: 4 frames, b_pha\.mp4: 3"):
        read_pair(fgr, short)
    with pytest.raises(MediaError, match=r"a_fgr\.mp4: 32x16, c_pha\.mp4: 16x16"):
        read_pair(fgr, small)


def test_packed_video(tmp_path):
    picture = np.zeros((3, 32, 96, 3), np.uint8)
    picture[:, :, :64] = (180, 60, 60)
    picture[:, 8:16, 64:80] = 255  # alpha at half size, opaque in its lower half
    path = write(tmp_path / "a.mp4", picture, "libx264", "yuv444p", qp="0")
    clip = read_packed(path, (0, 0, 64, 32), (64, 0, 16, 16))
    assert clip.frames.shape == (3, 32, 64, 4)
    assert (clip.frames[:, :12, :, 3] == 0).all() and (clip.frames[:, 20:, :, 3] == 255).all()
    assert np.abs(clip.frames[..., :3].astype(int) - (180, 60, 60)).max() <= 4
    with pytest.raises(MediaError, match=r"alpha rectangle \[64, 0, 64, 32\].*96x32"):
        read_packed(path, (0, 0, 64, 32), (64, 0, 64, 32))


def test_write_video_pads_odd_sides(tmp_path):
    frames = np.zeros((4, 31, 45, 3), np.uint8)
    frames[..., 1] = 200
    path = tmp_path / "a.mp4"
    write_video(path, frames, 12)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 12
    assert np.stack(decoded).shape == (4, 32, 46, 3)
    assert np.abs(np.stack(decoded).astype(int) - (0, 200, 0)).max() <= 3


def test_write_video_leaves_nothing_half_done(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \(T, H, W, 3\)"):
        write_video(tmp_path / "a.mp4", noise(2, 8, 8, 4), 12)
    with pytest.raises(FileNotFoundError):
        write_video(tmp_path / "none" / "a.mp4", noise(2, 8, 8, 3), 12)
    assert not list(tmp_path.iterdir())
