"""OpenEXR, by its own library: which layer has the picture, and that layer's light and alpha."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import OpenEXR
from numpy.typing import NDArray

from acetate.media.clip import MediaError
from acetate.media.color import AP0, LINEAR, Stated
from acetate.media.placement import aspect_of

MAGIC = b"v/1\x01"
NOT_PICTURES = "crypto"  # begins the layers of Cryptomatte, whose R, G, B, A are no colour
NAMES = {"r": "R", "red": "R", "g": "G", "green": "G", "b": "B", "blue": "B", "a": "A",
    "alpha": "A", "y": "Y"}  # fmt: skip


class Layer(NamedTuple):
    """name: "" of the main one. channels: R, G, B (or Y) and A -> their names in the part."""

    part: int
    name: str
    channels: Mapping[str, str]

    @property
    def alpha(self) -> bool:
        return "A" in self.channels


class Header(NamedTuple):
    """width and height: of the display window, as stored."""

    width: int
    height: int
    aspect: float
    stated: Stated
    layer: Layer


def exr_header(path: Path, asked: str | None) -> Header:
    """Reads the header. asked: a layer by name; None: the main one if it has alpha, else the only
    one that has.

    Raises MediaError for deep pixels, for no or several layers to choose from, and for one that is
    not there.
    """
    with OpenEXR.File(str(path), header_only=True, separate_channels=True) as file:
        layer = _chosen(_layers(file), asked)
        part = file.parts[layer.part].header
        if "deep" in str(part.get("type", "")).lower():
            raise MediaError("deep pixels; save one flat RGBA picture")
        (left, top), (right, bottom) = part["displayWindow"]
        places = part.get("chromaticities")
        if places is None and part.get("acesImageContainerFlag"):
            places = AP0
        return Header(
            int(right) - int(left) + 1,
            int(bottom) - int(top) + 1,
            aspect_of(part.get("pixelAspectRatio")),
            Stated(
                transfer=LINEAR,
                chromaticities=None if places is None else tuple(map(float, places)),
            ),
            layer,
        )


def read_exr(path: Path, layer: Layer) -> NDArray[np.float32]:
    """Reads (H, W, 3 or 4) of the display window as stored; transparent where there are no data."""
    with OpenEXR.File(str(path), separate_channels=True, num_threads=0) as file:
        part = file.parts[layer.part]
        (left, top), (right, bottom) = part.header["displayWindow"]
        names = [layer.channels.get(name) or layer.channels["Y"] for name in "RGB"]
        names += [layer.channels["A"]] if layer.alpha else []
        planes = [_plane(part.channels[name]) for name in names]
        x, y = (int(low) - int(first) for low, first in zip(
            part.header["dataWindow"][0], (left, top), strict=True))  # fmt: skip
        size = int(bottom) - int(top) + 1, int(right) - int(left) + 1
        whole = np.zeros((*size, len(planes)), np.float32)
        height, width = planes[0].shape
        inside = whole[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
        data = np.stack(planes, axis=-1)[max(-y, 0) :, max(-x, 0) :]
        inside[:] = data[: inside.shape[0], : inside.shape[1]]
        return whole


def _plane(channel: Any) -> NDArray[np.float32]:
    if (channel.xSampling, channel.ySampling) != (1, 1):
        raise MediaError(f"channel {channel.name} is subsampled; save it as RGBA")
    if channel.pixels.dtype == np.uint32:
        raise MediaError(
            f"channel {channel.name} holds whole numbers (UINT), which are no light and no share; "
            "save it as half or float"
        )
    return np.nan_to_num(channel.pixels.astype(np.float32), posinf=3e38, neginf=-3e38)


def _layers(file: Any) -> list[Layer]:
    """Returns the layers that hold a colour picture."""
    found = []
    for number, part in enumerate(file.parts):
        by_prefix: dict[str, dict[str, str]] = {}
        for name in (channel.name for channel in part.header["channels"]):
            prefix, _, channel = name.rpartition(".")
            if kind := NAMES.get(channel.lower()):
                by_prefix.setdefault(prefix, {}).setdefault(kind, name)
        for prefix, channels in by_prefix.items():
            picture = {"R", "G", "B"} <= channels.keys() or "Y" in channels
            own = part.header.get("name", "") if number else ""
            name = ".".join(filter(None, (own, prefix)))
            if picture and not name.lower().startswith(NOT_PICTURES):
                found.append(Layer(number, name, channels))
    return found


def _chosen(layers: list[Layer], asked: str | None) -> Layer:
    names = ", ".join(layer.name or "the main one" for layer in layers)
    if asked is not None:
        for layer in layers:
            if layer.name == asked:
                return layer
        raise MediaError(f"layer={asked} is not among its layers with colour: {names or 'none'}")
    if not layers:
        raise MediaError("no layer with the channels R, G and B; save one flat RGBA picture")
    main = next((layer for layer in layers if not layer.name), None)
    with_alpha = [layer for layer in layers if layer.alpha]
    if main is not None and (main.alpha or not with_alpha):
        return main
    if len(with_alpha) > 1:
        raise MediaError(
            f"several layers have colour and alpha: {', '.join(each.name for each in with_alpha)}. "
            "Choose one with layer=NAME, or in a table's column layer"
        )
    return (with_alpha or layers)[0]
