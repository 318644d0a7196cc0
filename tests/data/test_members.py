"""Members of a tar that are not what the manifest promises."""

import io
import resource
import struct
import time
import zlib
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from acetate.data.shards import BadClip, index_shards, read_clip
from acetate.data.writer import EncodedClip, ShardWriter
from acetate.video_io import encode_ffv1

SHAPE = (9, 48, 48)
SDP = b"""v=0
o=- 0 0 IN IP4 127.0.0.1
s=x
c=IN IP4 0.0.0.0
t=0 0
m=video 45678 RTP/AVP 96
a=rtpmap:96 H264/90000
"""


def ref_of(folder, media, kind="rgba.mkv", shape=SHAPE):
    with ShardWriter(folder, max_clips=9, max_bytes=10**9, made_by={}) as writer:
        writer.add(
            "a",
            EncodedClip(media, kind, *shape[:1], *shape[:0:-1], 16),
            split="train",
            prompt="",
            source="",
            licence="",
            lossy=False,
            premultiplied_source=False,
        )
    return index_shards([folder])[0]


def film(container="matroska", codecs=("ffv1",), pixels="bgra", shape=SHAPE):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        streams = [out.add_stream(codec, rate=16) for codec in codecs]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = shape[2], shape[1], pixels
        blank = av.VideoFrame.from_ndarray(np.zeros((*shape[1:], 4), np.uint8), format="rgba")
        for stream in streams:
            for _ in range(shape[0]):
                out.mux(stream.encode(blank.reformat(format=pixels)))
            out.mux(stream.encode())
    return buffer.getvalue()


def still(kind="PNG", size=(48, 48), **more):
    buffer = io.BytesIO()
    Image.new("RGBA", size).save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["ffconcat", "sdp", "hls", "avi", "mov", "nut", "png", "gif"])
def test_no_other_demuxer_reads_a_clip(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mkv").write_bytes(encode_ffv1(np.zeros((*SHAPE, 4), np.uint8), 16))
    texts = {
        "ffconcat": b"ffconcat version 1.0\nfile other.mkv\n",
        "sdp": SDP,
        "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mkv\n#EXT-X-ENDLIST\n",
        "png": still(),
        "gif": still("GIF"),
        "mov": film("mov", ("png",), "rgba"),
    }
    ref = ref_of(tmp_path / "out", texts[name] if name in texts else film(name))
    start = time.monotonic()
    with pytest.raises(BadClip, match="cannot be decoded"):
        read_clip(ref)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("codecs", "pixels", "message"),
    [
        (("libx264",), "yuv420p", "holds h264; a clip is one of FFV1"),
        (("mjpeg",), "yuvj420p", "holds mjpeg"),
        (("ffv1", "ffv1"), "bgra", "holds ffv1, ffv1"),
        (("ffv1",), "yuva420p", "pixel format yuva420p"),
    ],
)
def test_only_one_stream_of_ffv1_is_a_clip(tmp_path, codecs, pixels, message):
    with pytest.raises(BadClip, match=message):
        read_clip(ref_of(tmp_path, film(codecs=codecs, pixels=pixels)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF", "ICO", "JPEG2000"])
def test_only_png_is_a_still(tmp_path, kind):
    with pytest.raises(BadClip, match="cannot be decoded"):
        read_clip(ref_of(tmp_path, still(kind), "rgba.png", (1, 48, 48)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9, 1024, 2048), "pictures are larger, promised are 48x48"),
        ((9, 40, 48), "pictures are 40x48, promised are 48x48"),
        ((100, 48, 48), "more than the promised 9 frames"),
        ((8, 48, 48), "8 frames, promised are 9"),
    ],
)
def test_decoding_of_a_clip_stops_at_the_promised_size(tmp_path, shape, message):
    ref = ref_of(tmp_path, film(shape=shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadClip, match=message):
        read_clip(ref)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # KiB


@pytest.mark.parametrize(
    ("size", "more", "message"),
    [
        ((8000, 8000), {}, "1x8000x8000 .*, promised are 1x48x48"),
        ((48, 40), {}, "1x40x48 .*, promised are 1x48x48"),
        ((2**16, 2**16), {}, "DecompressionBombError"),  # PIL's own limit
        ((48, 48), {"save_all": True, "append_images": [Image.new("RGBA", (48, 48), "red")]}, "2x"),
    ],
)
def test_the_header_of_a_still_is_asked_first(tmp_path, size, more, message):
    media = bytearray(still(**more))
    media[16:24] = struct.pack(">II", *size)
    media[29:33] = struct.pack(">I", zlib.crc32(media[12:29]))
    ref = ref_of(tmp_path, bytes(media), "rgba.png", (1, 48, 48))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadClip, match=message):
        read_clip(ref)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # KiB


def test_what_cannot_be_as_promised_is_not_even_read(tmp_path):
    ref = ref_of(tmp_path, bytes(2**22))
    with pytest.raises(BadClip, match="4194304 bytes; at most"):
        read_clip(ref)
    with pytest.raises(BadClip, match=r"decoded; the limit is 4\.00 GiB"):
        read_clip(replace(ref, frames=10**5, height=2000, width=2000))
    noise = np.random.default_rng(0).integers(0, 256, (*SHAPE, 4), dtype=np.uint8)
    media = encode_ffv1(noise, 16)
    whole = ref_of(tmp_path / "noise", media)
    assert whole.crc32 == zlib.crc32(media) and np.array_equal(read_clip(whole).frames, noise)
