"""Small films for the tests of readers."""

import av
import numpy as np


def card(frames=5, height=32, width=48):
    """A flat colour with an opaque block, a soft bar of alpha 128 and nothing else."""
    clip = np.zeros((frames, height, width, 4), np.uint8)
    clip[..., 0] = 200
    clip[:, 8:24, 8:40, 3] = 255
    clip[:, 24:28, 8:40, 3] = 128
    return clip


def write(path, frames, codec, pixels, fps=10, trc=None, primaries=None, **options):
    """RGBA or RGB frames (T, H, W, C) by one of FFmpeg's encoders."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        if trc is not None:
            stream.codec_context.color_trc, stream.codec_context.color_primaries = trc, primaries
        for frame in frames:
            name = "rgba" if frames.shape[-1] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=name).reformat(format=pixels)
            if trc is not None:
                picture.color_trc, picture.color_primaries = trc, primaries
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path
