"""Brings the colour that a file states into straight sRGB: the one place that decides it, whichever
decoder ran.

A file states its colour as an ICC profile, as code points of ITU-T H.273 (CICP: primaries and
transfer), or as chromaticities and a gamma. What it does not state is sRGB.
"""

import io
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from acetate.media.clip import MediaError, to_uint8

UNSPECIFIED = 2
LINEAR = 8
D65 = (0.3127, 0.3290)
# x and y of red, green, blue and white, by H.273's number of the primaries (Table 2)
PRIMARIES = {
    1: (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, *D65),  # BT.709, sRGB
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, 0.310, 0.316),  # BT.470 M
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *D65),  # BT.601 625
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *D65),  # BT.601 525
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *D65),  # SMPTE 240M
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, 0.310, 0.316),  # film, illuminant C
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *D65),  # BT.2020
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),  # DCI-P3
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *D65),  # Display P3
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, *D65),  # EBU 3213
}
AP0 = (0.7347, 0.2653, 0.0, 1.0, 0.0001, -0.077, 0.32168, 0.33767)  # ACES 2065-1
PRIMARY_NAMES = {
    4: "BT.470 M", 5: "BT.601 (625 lines)", 6: "BT.601 (525 lines)", 7: "SMPTE 240M", 8: "film",
    9: "BT.2020", 11: "DCI-P3", 12: "Display P3", 22: "EBU 3213",
}  # fmt: skip
# Curves that every player shows as it shows sRGB
AS_SRGB = {1, UNSPECIFIED, 4, 6, 7, 11, 12, 13, 14, 15}
GAMMA = {5: 2.8}
REFUSED_TRANSFERS = {
    9: "a logarithmic curve", 10: "a logarithmic curve", 16: "PQ (HDR)", 17: "a cinema curve",
    18: "HLG (HDR)",
}  # fmt: skip
NEAR_SRGB = (2.0, 2.4)  # gammas that are written where sRGB is meant
SAME = 0.002  # chromaticities nearer than this are the same primaries
# Bradford's cone responses, for the change of the white point (ICC.1:2022, annex E)
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
Unit = NDArray[np.float32]
Pixels = NDArray[np.uint8] | NDArray[np.uint16] | Unit


class Stated(NamedTuple):
    """A file's statements about its colour. primaries and transfer are H.273's numbers;
    chromaticities are x and y of red, green, blue and white, in place of a number; gamma: from code
    to light; narrow: RGB of 16 to 235 of 255."""

    icc: bytes | None = None
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    chromaticities: tuple[float, ...] | None = None
    gamma: float | None = None
    narrow: bool = False


class Conversion(NamedTuple):
    """apply: (H, W, 3) of uint8, uint16, or float32 in [0, 1] or linear light, to sRGB: uint8 of
    integers, float32 in [0, 1] of floats. note: what it does, in words."""

    apply: Callable[[Pixels], Pixels]
    note: str


@lru_cache(maxsize=64)
def conversion(stated: Stated) -> Conversion | None:
    """Returns what turns stated colours into sRGB; None where nothing is to be done. Raises
    MediaError for what has no one rendering in 8 bits."""
    if stated.icc is not None:
        return _of_profile(stated.icc)
    if stated.transfer in REFUSED_TRANSFERS:
        raise MediaError(
            f"its transfer is {REFUSED_TRANSFERS[stated.transfer]}, which has no one rendering in "
            "8 bits; tone-map it to BT.709 first, for example with ffmpeg -vf "
            "zscale=transfer=linear,tonemap,zscale=transfer=bt709"
        )
    places = stated.chromaticities
    if places is None and stated.primaries not in (0, 1, 3, UNSPECIFIED):
        if stated.primaries not in PRIMARIES:
            raise MediaError(
                f"its primaries are number {stated.primaries} of H.273, which is not read; convert "
                "it to BT.709"
            )
        places = PRIMARIES[stated.primaries]
    matrix = None if places is None else to_bt709(places)
    linear = stated.transfer == LINEAR
    gamma = GAMMA.get(stated.transfer, stated.gamma)
    if gamma is not None and NEAR_SRGB[0] <= gamma <= NEAR_SRGB[1]:
        gamma = None
    elif gamma is not None and abs(gamma - 1) < 0.01:
        linear = True
    if matrix is None and gamma is None and not linear and not stated.narrow:
        return None
    said = PRIMARY_NAMES.get(stated.primaries, "its own primaries")
    notes = [f"{said} brought into BT.709's"] if matrix is not None else []
    notes += ["linear light encoded as sRGB"] if linear else []
    notes += ["16 to 235 stretched"] if stated.narrow else []
    notes += [f"gamma {gamma:.3g} brought into sRGB's"] if gamma is not None and not linear else []

    def to_light(unit: Unit) -> Unit:
        if stated.narrow:
            unit = ((unit * 255 - 16) / 219).clip(0, 1)
        if linear:
            return unit
        return decode_srgb(unit) if gamma is None else unit.clip(0, 1) ** np.float32(gamma)

    return Conversion(_by_tables(to_light, matrix), ", ".join(notes))


def stated_or(first: Stated, second: Stated) -> Stated:
    """Takes each from `first` where it says something: a picture's own words before its
    container's."""
    return Stated(
        first.icc or second.icc,
        second.primaries if first.primaries == UNSPECIFIED else first.primaries,
        second.transfer if first.transfer == UNSPECIFIED else first.transfer,
        first.chromaticities or second.chromaticities,
        first.gamma or second.gamma,
        first.narrow or second.narrow,
    )


def to_bt709(places: tuple[float, ...]) -> NDArray[np.float32] | None:
    """Returns 3 x 3, light in other primaries to light in BT.709's, the white point adapted; None
    where they are the same. Raises MediaError for places that no colours have."""
    if np.abs(np.subtract(places, PRIMARIES[1])).max() < SAME:
        return None
    try:
        theirs, ours = _to_xyz(places), _to_xyz(PRIMARIES[1])
        whites = [BRADFORD @ _xyz(*corners[6:8]) for corners in (places, PRIMARIES[1])]
        adapted = np.linalg.inv(BRADFORD) @ np.diag(whites[1] / whites[0]) @ BRADFORD
        matrix = np.linalg.inv(ours) @ adapted @ theirs
    except (np.linalg.LinAlgError, ZeroDivisionError, FloatingPointError) as error:
        raise MediaError(f"its chromaticities {places} are those of no colours") from error
    if not np.isfinite(matrix).all():
        raise MediaError(f"its chromaticities {places} are those of no colours")
    return matrix.astype(np.float32)


def encode_srgb(linear: Unit) -> Unit:
    """Encodes light as IEC 61966-2-1 does, [0, 1] to [0, 1]."""
    linear = linear.clip(0, 1)
    return np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    ).astype(np.float32)


def decode_srgb(unit: Unit) -> Unit:
    """Computes the inverse of `encode_srgb`."""
    unit = unit.clip(0, 1)
    return np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4).astype(
        np.float32
    )


def _by_tables(to_light: Callable[[Unit], Unit], matrix: Unit | None) -> Callable[[Pixels], Pixels]:
    """Integers go through tables of the two curves, ten times as fast as the curves."""
    tables = {
        top: to_light(np.arange(top + 1, dtype=np.float32) / np.float32(top))
        for top in (255, 65535)
    }
    encoded = to_uint8(encode_srgb(np.arange(65536, dtype=np.float32) / np.float32(65535)))

    def apply(pixels: Pixels) -> Pixels:
        integers = pixels.dtype != np.float32
        light = tables[np.iinfo(pixels.dtype).max][pixels] if integers else to_light(pixels)
        if matrix is not None:
            light = light @ matrix.T
        if not integers:
            return encode_srgb(light)
        return encoded[(light.clip(0, 1) * 65535 + 0.5).astype(np.uint16)]

    return apply


def _of_profile(icc: bytes) -> Conversion | None:
    """Converts by relative colorimetry, by Little CMS on 8 bits; None for sRGB. A profile that
    cannot be read is passed over, as in browsers, and the note says so."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = {"RGB": "RGB", "GRAY": "L"}[profile.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            profile, ImageCms.createProfile("sRGB"), mode, "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
        return Conversion(
            _by_tables(decode_srgb, None), "its ICC profile cannot be read: taken as sRGB"
        )
    name = " ".join(ImageCms.getProfileDescription(profile).split()) or "without a name"

    def apply(pixels: Pixels) -> Pixels:
        unit = pixels if pixels.dtype == np.float32 else pixels / np.iinfo(pixels.dtype).max
        eight = pixels if pixels.dtype == np.uint8 else to_uint8(unit.astype(np.float32))
        image = Image.fromarray(np.ascontiguousarray(eight[..., 0] if mode == "L" else eight))
        done = np.asarray(ImageCms.applyTransform(image, transform))
        return done if pixels.dtype != np.float32 else done.astype(np.float32) / np.float32(255)

    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.meshgrid(levels, levels, levels)
    probe = np.stack(cube if mode == "RGB" else [cube[0]] * 3, axis=-1).reshape(1, -1, 3)
    if np.abs(apply(probe).astype(int) - probe).max() <= 1:
        return None
    return Conversion(apply, f"ICC profile {name} converted to sRGB")


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _to_xyz(places: tuple[float, ...]) -> NDArray[np.float64]:
    """Returns what turns light in these primaries into CIE XYZ (SMPTE RP 177)."""
    corners = np.stack([_xyz(*places[i : i + 2]) for i in (0, 2, 4)], axis=1)
    return corners * np.linalg.solve(corners, _xyz(*places[6:8]))
