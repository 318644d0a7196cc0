"""Small films for the tests of readers."""

import shutil
import subprocess

import av
import numpy as np
import pytest
import torch

from acetate.data.synthetic import render

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program")


def card(frames=5, height=32, width=48):
    """A flat colour with an opaque block, a soft bar of alpha 128 and nothing else."""
    clip = np.zeros((frames, height, width, 4), np.uint8)
    clip[..., 0] = 200
    clip[:, 8:24, 8:40, 3] = 255
    clip[:, 24:28, 8:40, 3] = 128
    return clip


def drawn(kind, seed, frames=3, height=64, width=None):
    """A procedural clip as 8 bits."""
    clip = render(kind, seed, frames, height, width or height)
    rgba = torch.cat(((clip.rgb + 1) / 2, clip.alpha)).permute(1, 2, 3, 0)
    return rgba.mul(255).round().byte().contiguous().numpy()


def write(path, frames, codec, pixels, fps=10, trc=None, primaries=None, **options):
    """RGBA or RGB frames (T, H, W, C) by one of FFmpeg's encoders."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        if trc is not None:
            stream.codec_context.color_trc, stream.codec_context.color_primaries = trc, primaries
        for frame in frames:
            name = "rgba" if frames.shape[-1] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=name).reformat(
                format=pixels
            )
            if trc is not None:
                picture.color_trc, picture.color_primaries = trc, primaries
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def ffmpeg(*arguments, pipe=b""):
    """What the ffmpeg program writes to its standard output."""
    command = ["ffmpeg", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, input=pipe, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def by_ffmpeg(frames, *arguments, fps=10):
    """RGBA frames (T, H, W, 4) into whatever the arguments name."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    ffmpeg(
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgba",
        "-s",
        size,
        "-r",
        fps,
        "-i",
        "-",
        *arguments,
        pipe=frames.tobytes(),
    )
