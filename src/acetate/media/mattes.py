"""Reads a matte file by what it means: its brightness, its own alpha, a mask of 0 and 1, or the
indices of a palette."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acetate.media.clip import LIMITS, Frames, Limits, MediaError, Stream, decoding
from acetate.media.images import (
    FORMATS,
    IMAGES,
    OPAQUE_IMAGES,
    describe_image,
    image_halves,
    read_image,
)
from acetate.media.sequences import check_frames, is_sequence, sequence_files
from acetate.media.videos import describe_video, luma, open_film, open_video

NEAR = 8  # of 255: what a codec does to a flat colour
LABELS = 32  # values of a lossless mask that are all below this are numbers of things
NAMED = 12  # values that a message names, and colours that a coloured mask has at most
Values = NDArray[np.unsignedinteger]


def open_matte(path: Path, limits: Limits = LIMITS) -> Stream:
    """Opens a matte: (H, W) of each picture of a video, an image or a sequence, in 0..255: alpha
    where it has one that varies, else luma.

    All pictures are looked at first where they may number things. Raises MediaError, also while it
    is iterated over, for what cannot be read, and for a mask that tells more than two things apart.
    """
    with decoding(path):
        if not is_sequence(path) and path.suffix.lower() not in IMAGES + OPAQUE_IMAGES:
            return _of_film(path, limits)
        files = sequence_files(path) if is_sequence(path) else [path]
        return _of_images(path, files, limits)


def _of_images(path: Path, files: list[Path], limits: Limits) -> Stream:
    check_frames(path, files)
    headers = [describe_image(file, limits) for file in files]
    limits.check(path, len(files), headers[0].width, headers[0].height)
    lossy = any(header.lossy for header in headers)

    def stream(pictures: Iterator[Frames], *notes: str) -> Stream:
        return Stream(pictures, len(files), None, lossy, None, list(notes))

    def alphas() -> Iterator[Frames]:
        return (read_image(file, limits).frames[0, ..., 3] for file in files)

    def lumas() -> Iterator[Frames]:
        return (image_halves(file, limits)[1] for file in files)

    def colors() -> Iterator[Values]:
        return (_packed(image_halves(file, limits)[0]) for file in files)

    if all(header.alpha for header in headers) and _varies(alphas()):
        return stream(alphas(), _its_alpha(path))
    if _numbers(files[0], limits) is not None:
        found, telling = set[int](), False
        for file in files:
            numbers = _numbers(file, limits)
            if numbers is None:
                telling = False
                break
            found |= set(np.unique(numbers[0]).tolist())
            telling |= numbers[1]
        if telling:
            pictures, note = _of_two(path, "indices", sorted(found))
            values = (numbers[0] for file in files if (numbers := _numbers(file, limits)))
            return stream(map(pictures, values), note)
    if lossy:
        return stream(lumas())
    first = image_halves(files[0], limits)[0]
    if np.ptp(first, axis=-1).max() > NEAR and len(np.unique(_packed(first))) <= NAMED:
        found = {value for picture in colors() for value in np.unique(picture).tolist()}
        pictures, note = _of_two(path, "colours", sorted(found))
        return stream(map(pictures, colors()), note)
    levels, notes = _of_few(path, lumas())
    return stream((levels[picture] for picture in lumas()), *notes)


def _of_film(path: Path, limits: Limits) -> Stream:
    if describe_video(path, limits).alpha and _varies(
        picture[..., 3] for picture in open_video(path, limits)
    ):
        clip = open_video(path, limits)
        clip.pictures = (picture[..., 3] for picture in clip.pictures)
        clip.notes.append(_its_alpha(path))
        return clip
    film = open_film(path, luma, limits)
    if film.lossy:
        return film
    levels, notes = _of_few(path, film)
    again = open_film(path, luma, limits)
    again.pictures = (levels[picture] for picture in again.pictures)
    again.notes += notes
    return again


def _varies(alphas: Iterable[Frames]) -> bool:
    least, most = 255, 0
    for alpha in alphas:
        least, most = min(least, int(alpha.min())), max(most, int(alpha.max()))
        if least < most:
            return True
    return False


def is_cutout(pictures: Iterable[Frames]) -> bool:
    """Tells whether RGBA pictures (H, W, 4) show something of their own under an alpha that varies,
    where a mask has one colour, or its alpha once more."""
    least, most = np.full(4, 255), np.zeros(4, int)
    mask = True
    for picture in pictures:
        pixels = picture.reshape(-1, 4).astype(np.int16)
        least[3], most[3] = min(least[3], pixels[:, 3].min()), max(most[3], pixels[:, 3].max())
        shown = pixels[pixels[:, 3] > NEAR]
        if not len(shown):
            continue
        least[:3] = np.minimum(least[:3], shown[:, :3].min(axis=0))
        most[:3] = np.maximum(most[:3], shown[:, :3].max(axis=0))
        grey = np.ptp(shown[:, :3], axis=1).max() <= NEAR
        ends = (shown[:, 0] <= NEAR) | (shown[:, 0] >= 255 - NEAR)
        again = np.abs(shown[:, 0] - shown[:, 3]) <= NEAR
        mask = mask and bool(grey and (ends | again).all())
    return bool(least[3] < most[3] and (most - least)[:3].max() > NEAR) and not mask


def _its_alpha(path: Path) -> str:
    return f"{path.name} has alpha of its own: that is the matte, not its brightness"


def _numbers(path: Path, limits: Limits) -> tuple[Values, bool] | None:
    """Returns (H, W): indices of a palette, or 16-bit values below LABELS; and whether they are
    more than shades of grey. None for any other picture."""
    with decoding(path), open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        limits.check(path, 1, *image.size)
        values = np.asarray(image) if image.mode == "P" or image.mode.startswith("I") else None
        if image.mode == "P" and values is not None:
            return values, bool(np.ptp(np.asarray(image.convert("RGB")), axis=-1).max() > NEAR)
        if values is not None and values.max() < LABELS:
            return values.astype(np.uint8), bool(values.max())
    return None


def _packed(picture: Frames) -> NDArray[np.uint32]:
    """Packs (H, W, 3) into (H, W): 0xRRGGBB."""
    return picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


def _of_two(path: Path, kind: str, found: list[int]) -> tuple[Callable[[Values], Frames], str]:
    """Returns what makes alpha of a mask that numbers things by indices or colours, the lower 0 and
    the other 255; and a note in words."""
    shown = [f"#{value:06x}" if kind == "colours" else str(value) for value in found]
    if len(found) > 2:
        more = ", ..." if len(found) > NAMED else ""
        raise MediaError(
            f"{path}: a mask with the {kind} {', '.join(shown[:NAMED])}{more}, which tell "
            f"{len(found)} things apart; a matte has two. Make the {kind} of what is to be shown "
            "255 and the others 0, in a grey picture"
        )
    empty = found[0] if len(found) == 2 else 0

    def alpha(values: Values) -> Frames:
        return np.where(values == empty, 0, 255).astype(np.uint8)

    return alpha, f"{path.name} has the {kind} {' and '.join(shown)}: taken as 0 and 255"


def _of_few(path: Path, pictures: Iterable[Frames]) -> tuple[Frames, list[str]]:
    """Returns (256,), what each value of a lossless mask becomes, and why: where they number
    things, 0 and 1 become 0 and 255."""
    counts = np.zeros(256, np.int64)
    for picture in pictures:
        counts += np.bincount(picture.ravel(), minlength=256)
    found = np.flatnonzero(counts).tolist()
    same = np.arange(256, dtype=np.uint8)
    if not found or not 0 < found[-1] < LABELS or len(found) > NAMED:
        return same, []
    if len(found) > 2 or found[0]:
        raise MediaError(
            f"{path}: a mask with the values {', '.join(map(str, found))}, which number things; a "
            "matte has 0 and 255 and what is between. Make what is to be shown 255 and all else 0"
        )
    stretched = np.where(same > 0, 255, 0).astype(np.uint8)
    return stretched, [f"{path.name} is a mask of 0 and {found[-1]}: stretched to 0 and 255"]
