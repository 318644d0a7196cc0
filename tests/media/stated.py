"""A picture of four colours, and files that state something of it."""

import struct
import zlib

import numpy as np
import OpenEXR

from acetate.media.color import decode_srgb, to_bt709
from acetate.media.png import SIGNATURE, chunks

QUARTERS = np.array([[(200, 40, 30), (40, 180, 60)], [(30, 60, 200), (220, 200, 40)]])


def picture(size=16):
    """sRGB (H, W, 4): four colours, and alpha that rises to the right."""
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[..., :3] = QUARTERS.repeat(size // 2, axis=0).repeat(size // 2, axis=1)
    rgba[..., 3] = np.linspace(0, 255, size).astype(np.uint8)
    return rgba


def png_of(parts):
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def with_chunks(path, **more):
    """A PNG with further chunks before its pixels."""
    parts = [*chunks(path.read_bytes())]
    at = next(i for i, (kind, _) in enumerate(parts) if kind == b"IDAT")
    parts[at:at] = [(kind.encode(), data) for kind, data in more.items()]
    path.write_bytes(png_of(parts))
    return path


def exr(path, layers, **header):
    """layers: prefix -> (H, W, C) of linear light; alpha is the fourth."""
    channels = {
        f"{prefix}{name}": np.ascontiguousarray(values[..., i], np.float32)
        for prefix, values in layers.items()
        for i, name in enumerate("RGBA"[: values.shape[-1]])
    }
    with OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, **header}, channels) as file:
        file.write(str(path))
    return path


def light(places=None):
    """Premultiplied linear light of the picture."""
    rgba = picture().astype(np.float32) / 255
    color = decode_srgb(rgba[..., :3])
    if places is not None:
        color = color @ np.linalg.inv(to_bt709(places)).T
    return np.concatenate((color * rgba[..., 3:], rgba[..., 3:]), axis=-1)
