"""What a matte file means: its brightness, its own alpha, a mask of 0 and 1, or the indices of a
palette."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acetate.media.clip import LIMITS, Frames, Limits, MediaError, decoding, joined
from acetate.media.images import (
    FORMATS,
    IMAGES,
    OPAQUE_IMAGES,
    describe_image,
    image_halves,
    read_image,
)
from acetate.media.sequences import check_frames, is_sequence, sequence_files
from acetate.media.videos import Film, describe_video, luma, read_film, read_video

NEAR = 8  # of 255: what a codec does to a flat colour
LABELS = 32  # values of a lossless mask that are all below this are numbers of things
NAMED = 12  # values that a message names, and colours that a coloured mask has at most


def read_matte(path: Path, limits: Limits = LIMITS) -> Film:
    """(T, H, W) of a video, an image or a sequence: alpha where it has one that varies, else luma,
    and in both cases 0..255.

    MediaError for what cannot be read, and for a mask that tells more than two things apart.
    """
    if not is_sequence(path) and path.suffix.lower() not in IMAGES + OPAQUE_IMAGES:
        return _film(path, limits)
    with decoding(path):
        return _pictures(path, sequence_files(path) if is_sequence(path) else [path], limits)


def _pictures(path: Path, files: list[Path], limits: Limits) -> Film:
    """Of an image or a sequence."""
    check_frames(path, files)
    headers = [describe_image(file, limits) for file in files]
    limits.check(path, len(files), headers[0].width, headers[0].height)
    limits.check_memory(path, len(files), 4 * headers[0].width * headers[0].height)
    if all(header.alpha for header in headers):
        alphas = (read_image(file, limits).frames[0, ..., 3] for file in files)
        alpha = joined(path, alphas, len(files))
        if alpha.min() < alpha.max():
            return Film(alpha, None, any(header.lossy for header in headers), (_its_alpha(path),))
    numbers = [_numbers(file, limits) for file in files]
    if any(telling for _, telling in numbers) and all(len(values) for values, _ in numbers):
        return _of_two(path, joined(path, (values for values, _ in numbers), len(files)))
    lossy, first = any(header.lossy for header in headers), image_halves(files[0], limits)[0]
    if (
        not lossy
        and np.ptp(first, axis=-1).max() > NEAR
        and len(np.unique(_packed(first))) <= NAMED
    ):
        packed = (_packed(image_halves(file, limits)[0]) for file in files)
        return _of_two(path, np.stack(list(packed)))
    stack = joined(path, (image_halves(file, limits)[1] for file in files), len(files))
    return Film(stack, None, True, ()) if lossy else _of_few(path, Film(stack, None, False, ()))


def is_cutout(frames: Frames) -> bool:
    """Whether RGBA frames (T, H, W, 4) show something of their own under an alpha that varies,
    where a mask has one colour, or its alpha once more."""
    alpha = frames[..., 3]
    if alpha.min() == alpha.max():
        return False
    shown = frames[alpha > NEAR]
    if not len(shown) or np.ptp(shown[:, :3], axis=0).max() <= NEAR:
        return False
    grey = int(np.ptp(shown[:, :3], axis=1).max()) <= NEAR
    ends = (shown[:, 0] <= NEAR) | (shown[:, 0] >= 255 - NEAR)
    again = np.abs(shown[:, 0].astype(np.int16) - shown[:, 3]) <= NEAR
    return not (grey and (ends | again).all())


def _film(path: Path, limits: Limits) -> Film:
    if describe_video(path, limits).alpha:
        clip = read_video(path, limits)
        alpha = clip.frames[..., 3]
        if alpha.min() < alpha.max():
            return Film(alpha, clip.fps, clip.lossy, (*clip.notes, _its_alpha(path)))
    film = read_film(path, luma, limits)
    return film if film.lossy else _of_few(path, film)


def _its_alpha(path: Path) -> str:
    return f"{path.name} has alpha of its own: that is the matte, not its brightness"


def _numbers(path: Path, limits: Limits) -> tuple[Frames, bool]:
    """(H, W): indices of a palette, or 16-bit values below LABELS; and whether they are more than
    shades of grey. An empty array for any other picture."""
    with decoding(path), open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        limits.check(path, 1, *image.size)
        values = np.asarray(image) if image.mode == "P" or image.mode.startswith("I") else None
        if image.mode == "P" and values is not None:
            return values, bool(np.ptp(np.asarray(image.convert("RGB")), axis=-1).max() > NEAR)
        if values is not None and values.max() < LABELS:
            return values.astype(np.uint8), bool(values.max())
    return np.empty(0, np.uint8), False


def _packed(picture: Frames) -> NDArray[np.uint32]:
    """(H, W): 0xRRGGBB of (H, W, 3)."""
    return picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


def _of_two(path: Path, values: NDArray[np.unsignedinteger]) -> Film:
    """Of a mask that numbers things, by indices or by colours, (T, H, W): the lower is 0, the other
    255."""
    found = [int(value) for value in np.unique(values)]
    kind, shown = "indices", [str(value) for value in found]
    if values.dtype == np.uint32:
        kind, shown = "colours", [f"#{value:06x}" for value in found]
    if len(found) > 2:
        more = ", ..." if len(found) > NAMED else ""
        raise MediaError(
            f"{path}: a mask with the {kind} {', '.join(shown[:NAMED])}{more}, which tell "
            f"{len(found)} things apart; a matte has two. Make the {kind} of what is to be shown "
            "255 and the others 0, in a grey picture"
        )
    empty = found[0] if len(found) == 2 else 0
    alpha = np.where(values == empty, 0, 255).astype(np.uint8)
    return Film(alpha, None, False, (f"{path.name} has the {kind} {' and '.join(shown)}: taken as "
                                     "0 and 255",))  # fmt: skip


def _of_few(path: Path, film: Film) -> Film:
    """A lossless film whose values number things: 0 and 1 become 0 and 255."""
    counts = np.bincount(film.frames.reshape(-1), minlength=256)
    found = np.flatnonzero(counts).tolist()
    if not 0 < found[-1] < LABELS or len(found) > NAMED:
        return film
    if len(found) > 2 or found[0]:
        raise MediaError(
            f"{path}: a mask with the values {', '.join(map(str, found))}, which number things; a "
            "matte has 0 and 255 and what is between. Make what is to be shown 255 and all else 0"
        )
    note = f"{path.name} is a mask of 0 and {found[-1]}: stretched to 0 and 255"
    frames = np.where(film.frames > 0, 255, 0).astype(np.uint8)
    return Film(frames, film.fps, film.lossy, (*film.notes, note))
