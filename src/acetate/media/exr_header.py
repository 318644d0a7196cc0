"""The few attributes of an OpenEXR header that say how large its picture is."""

import struct

from acetate.media.clip import MediaError


def exr_size(head: bytes) -> tuple[int, int, set[str]]:
    """Width and height of the display window, and the channels' names. MediaError if it is none
    that we read.

    Layout: magic, version, then attributes of name, type, length and value, until an empty name
    (openexr.com, "OpenEXR File Layout").
    """
    (version,) = struct.unpack_from("<I", head, 4)
    if version & 0x1800:
        raise MediaError(
            "an OpenEXR file with several parts or deep pixels; save one flat RGBA picture"
        )
    size, channels, at = None, set[str](), 8
    while at < len(head) and head[at]:
        name, at = _text(head, at)
        _, at = _text(head, at)
        (length,) = struct.unpack_from("<I", head, at)
        value, at = head[at + 4 : at + 4 + length], at + 4 + length
        if name == "displayWindow":
            left, top, right, bottom = struct.unpack("<4i", value)
            size = right - left + 1, bottom - top + 1
        elif name == "channels":
            channels = set(_channels(value))
    if size is None or not channels:
        raise MediaError("an OpenEXR header without displayWindow or channels; the file is damaged")
    return *size, channels


def _channels(value: bytes) -> list[str]:
    """Each is a name and 16 bytes of its type and sampling."""
    names, at = [], 0
    while at < len(value) and value[at]:
        name, at = _text(value, at)
        names.append(name)
        at += 16
    return names


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(b"\0", at)
    return data[at:end].decode("latin-1"), end + 1
