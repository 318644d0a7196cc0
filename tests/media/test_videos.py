import json

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorTrc

from acetate.media.clip import Limits, MediaError
from acetate.media.videos import describe_video, read_video
from tests.media.films import by_ffmpeg, card, ffmpeg, needs_ffmpeg, write


@pytest.mark.parametrize(("matrix", "height"), [(1, 32), (6, 32), (9, 32), (2, 32), (2, 600)])
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range(tmp_path, matrix, height, full):
    """FFV1 keeps the planes, so that only our reading of them is tested. 2: the file does not
    say."""
    weights = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
    red, blue = weights[matrix if matrix != 2 else 1 if height > 576 else 6]
    rgb = np.array([0.8, 0.3, 0.2])
    luma = rgb @ (red, 1 - red - blue, blue)
    chroma = (rgb[2] - luma) / (2 - 2 * blue), (rgb[0] - luma) / (2 - 2 * red)
    scale = (255, 0, 255) if full else (219, 16, 224)
    planes = [luma * scale[0] + scale[1], *(c * scale[2] + 128 for c in chroma), 255]
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, height, "yuva444p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 2 if full else 1, matrix
        frame = av.VideoFrame(16, height, "yuva444p")
        frame.color_range, frame.colorspace = 2 if full else 1, matrix
        for plane, value in zip(frame.planes, planes, strict=True):
            np.frombuffer(plane, np.uint8)[:] = round(value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(read_video(path).frames[..., :3] - rgb * 255).max() <= 2.5


@pytest.mark.parametrize("trc", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
def test_hdr_is_refused(tmp_path, trc):
    path = write(
        tmp_path / "a.mov",
        card(),
        "prores_ks",
        "yuva444p10le",
        trc=trc,
        primaries=ColorPrimaries.BT2020,
    )
    with pytest.raises(
        MediaError,
        match=r"a\.mov: its transfer is (PQ|HLG) \(HDR\), which has no one rendering.*tone-map",
    ):
        read_video(path)


def test_wide_colors_become_bt709(tmp_path):
    path = write(
        tmp_path / "a.mov",
        card(),
        "prores_ks",
        "yuva444p10le",
        trc=14,
        primaries=ColorPrimaries.BT2020,
    )
    clip = read_video(path)
    assert clip.notes == ("BT.2020 brought into BT.709's",)
    assert np.abs(clip.frames[..., 3].astype(int) - card()[..., 3]).max() <= 2


@needs_ffmpeg
def test_rotation_pixel_shape_and_interlacing(tmp_path):
    frames = card()
    frames[:, 2:6, 2:6] = (0, 255, 0, 255)
    plain = write(tmp_path / "a.mov", frames, "qtrle", "argb")
    ffmpeg("-i", plain, "-c", "copy", "-metadata:s:v", "rotate=270", tmp_path / "turned.mov")
    turned = read_video(tmp_path / "turned.mov")
    header = describe_video(tmp_path / "turned.mov")
    assert turned.frames.shape[1:3] == (header.height, header.width) == (48, 32)
    # its player turns it, too
    ffmpeg("-i", tmp_path / "turned.mov", "-c:v", "qtrle", tmp_path / "upright.mov")
    assert np.array_equal(turned.frames, read_video(tmp_path / "upright.mov").frames)
    assert len(turned.notes) == 1 and "as the file says" in turned.notes[0]
    ffmpeg("-i", plain, "-vf", "setsar=2/1", "-c:v", "qtrle", tmp_path / "wide.mov")
    wide = read_video(tmp_path / "wide.mov")
    assert wide.frames.shape[1:3] == (32, 96) and wide.notes == ("pixels of 2:1 made square",)
    assert (wide.frames[:, 8:24, 18:78, 3] == 255).all() and (
        wide.frames[:, 8:24, 84:, 3] == 0
    ).all()
    ffmpeg("-i", plain, "-vf", "setfield=tff", "-c:v", "prores_ks", "-flags", "+ildct",
        "-profile:v", "4444",
           "-pix_fmt", "yuva444p10le", tmp_path / "woven.mov")  # fmt: skip
    assert read_video(tmp_path / "woven.mov").notes == (
        "interlaced: its fields are left woven together",
    )


def test_variable_frame_times(tmp_path):
    path = tmp_path / "a.mkv"
    frames = card(5)
    frames[np.arange(5), 0, 0, 3] = 50 * np.arange(5)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgra"
        for i, tenth in enumerate((0, 1, 2, 5, 6)):
            frame = av.VideoFrame.from_ndarray(frames[i], format="rgba").reformat(format="bgra")
            frame.pts = tenth
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_video(path)
    assert clip.fps == pytest.approx(10) and "5 frames became 7, 0 dropped" in clip.notes[0]
    assert (clip.frames[:, 0, 0, 3] // 50).tolist() == [0, 1, 2, 2, 2, 3, 4]


@needs_ffmpeg
def test_alpha_that_is_there_and_cannot_be_read(tmp_path):
    """Refused with a reason that says so, not as opaque."""
    av1 = ("-c:v", "libsvtav1", "-pix_fmt", "yuv420p")
    by_ffmpeg(card(5, 64, 64), *av1, "-vf", "setsar=3/2", tmp_path / "a.webm")
    display_width, alpha_mode = bytes((0x54, 0xB0, 0x81, 96)), bytes((0x53, 0xC0, 0x81, 1))
    data = (tmp_path / "a.webm").read_bytes()
    assert data.count(display_width) == 1
    (tmp_path / "a.webm").write_bytes(data.replace(display_width, alpha_mode))
    tracks = ("-filter_complex", "split[c][b];[b]alphaextract[m]", "-map", "[c]", "-map", "[m]")
    by_ffmpeg(card(5, 64, 64), *tracks, *av1, tmp_path / "b.mp4")
    by_ffmpeg(card(5, 64, 64), *av1, tmp_path / "c.mp4")
    for name, reason in (
        ("a.webm", "announces alpha .* decoder of (lib\\w+|av1) gives none"),
        ("b.mp4", "2 video tracks of one size.*pair"),
        ("c.mp4", "pixel format yuv420p has no alpha"),
    ):
        with pytest.raises(MediaError, match=rf"{name}: .*{reason}"):
            read_video(tmp_path / name)
        assert (describe_video(tmp_path / name).lost is None) == (name == "c.mp4")


def test_limits(tmp_path):
    path = write(tmp_path / "a.mov", card(), "qtrle", "argb")
    for limits, reason in (
        (Limits(max_pixels=1000), "48x32; a picture has at most max_pixels=1000"),
        (Limits(max_frames=4), "5 frames of 48x32; a clip has at most max_frames=4"),
        (Limits(max_bytes=30000), "5 frames are 0.00 GiB decoded; the limit is 0.00 GiB"),
    ):
        with pytest.raises(MediaError, match=reason):
            read_video(path, limits)


def test_playlists_are_not_followed(tmp_path):
    """A list of files, as FFmpeg reads them, is not a video: it could name any file of the
    machine."""
    write(tmp_path / "b.mov", card(), "qtrle", "argb")
    (tmp_path / "a.mov").write_text("ffconcat version 1.0\nfile b.mov\n")
    with pytest.raises(MediaError, match=r"a\.mov: cannot be decoded"):
        read_video(tmp_path / "a.mov")
    (tmp_path / "a.mov").write_text(json.dumps({}))
    with pytest.raises(MediaError, match=r"a\.mov: cannot be decoded"):
        read_video(tmp_path / "a.mov")
