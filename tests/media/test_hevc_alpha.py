from fractions import Fraction

import av
import numpy as np
import pytest

from acetate.media.hevc_alpha import AlphaLayer, with_alpha
from acetate.media.videos import describe_video, read_video
from tests.media.films import card

START = b"\0\0\0\1"


def units(data):
    """NAL units of an Annex B stream."""
    return [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1")[1:]]


def encoded(planes):
    """One HEVC packet per frame, parameter sets first, of 4:2:0 full-range frames given by their
    luma."""
    context = av.CodecContext.create("libx265", "w")
    context.width, context.height, context.pix_fmt = planes.shape[2], planes.shape[1], "yuv420p"
    context.time_base, context.framerate, context.color_range = Fraction(1, 10), Fraction(10), 2
    context.options = {"x265-params": "log-level=error:bframes=0:keyint=1:info=0:qp=4:range=full"}
    packets = []
    for i, plane in enumerate(planes):
        frame = av.VideoFrame(planes.shape[2], planes.shape[1], "yuv420p")
        frame.pts, frame.color_range = i, 2
        for part, values in zip(
            frame.planes, (plane, np.uint8([[128]]), np.uint8([[128]])), strict=True
        ):
            np.frombuffer(part, np.uint8).reshape(part.height, -1)[:, : part.width] = values
        packets += context.encode(frame)
    return [bytes(packet) for packet in packets + context.encode(None)]


def layered(path, luma, alpha, claim=1):
    """A MOV as Apple writes it: NAL units of alpha carry layer 1; an SEI message says how colour is
    mixed."""
    sei = bytes((78, 1, 165, 4, claim << 4, 0, 0x7F, 0x90, 0x80))
    packets = list(zip(encoded(luma), encoded(alpha), strict=True))
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("libx265", rate=10)
        stream.width, stream.height, stream.pix_fmt = luma.shape[2], luma.shape[1], "yuv420p"
        stream.codec_context.options = {"x265-params": "log-level=error"}
        stream.codec_context.extradata = packets[0][0]
        for i, (base, second) in enumerate(packets):
            upper = [bytes((unit[0], unit[1] | 8)) + unit[2:] for unit in units(second)]
            packet = av.Packet(b"".join(START + unit for unit in (*units(base), sei, *upper)))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    return path


def test_the_second_layer_is_alpha(tmp_path):
    frames = card(3, 64, 64)
    path = layered(tmp_path / "a.mov", np.full((3, 64, 64), 90, np.uint8), frames[..., 3])
    with av.open(str(path)) as container:
        # the trap: FFmpeg says nothing
        assert next(container.decode(video=0)).format.name.startswith("yuv")
    clip = read_video(path)
    assert describe_video(path).alpha and clip.frames.shape == (3, 64, 64, 4)
    assert np.abs(clip.frames[..., 3].astype(int) - frames[..., 3]).max() <= 6
    assert np.abs(clip.frames[..., :3].astype(int) - 90).max() <= 4
    assert clip.notes == ("it calls its colour premultiplied",)


def test_what_the_file_claims(tmp_path):
    for claim, premultiplied in ((0, False), (1, True)):
        path = layered(
            tmp_path / "a.mov", np.full((1, 64, 64), 90, np.uint8), card(1, 64, 64)[..., 3], claim
        )
        with av.open(str(path)) as container:
            assert AlphaLayer.of(path, container.streams.video[0]).premultiplied is premultiplied


def test_layers_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="layers have one size"):
        with_alpha(av.VideoFrame(64, 64, "yuv420p"), av.VideoFrame(32, 64, "yuv420p"))
