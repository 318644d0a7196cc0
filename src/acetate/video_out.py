"""Writes a sampled RGBA clip into the files that editors, compositors and browsers open."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from acetate.alpha import checkerboard, over
from acetate.replacing import remove, rename_over
from acetate.video_io import Frames, write_video

FORMATS = ("png", "webm", "prores", "webp", "apng", "pair", "preview")
SUFFIXES: dict[str, tuple[str, ...]] = {
    "png": ("_png",),
    "webm": (".webm",),
    "prores": (".mov",),
    "webp": (".webp",),
    "apng": (".apng",),
    "pair": ("_fgr.mp4", "_pha.mp4"),
    "preview": ("_preview.mp4",),
}

PREVIEW_SIDE, PREVIEW_MOST = 384, 2048  # pixels: the short side at least, the long side at most
GUIDE = (255, 0, 160)  # seen on a checkerboard, on black and on white

Picture = NDArray[np.float32]  # (4, H, W) in [0, 1], straight colour
Planes = Sequence[NDArray[np.integer]]  # Y, Cb, Cr and perhaps A; chroma may be half the size

# Recommendation ITU-R BT.709, items 3.2 and 3.3: R'G'B' in [0, 1] to Y' in [0, 1], C'B and C'R in
# [-0.5, 0.5].
LUMA = np.array([0.2126, 0.7152, 0.0722])
YCBCR = np.stack((LUMA, ([0, 0, 1] - LUMA) / 1.8556, ([1, 0, 0] - LUMA) / 1.5748)).astype(
    np.float32
)
BT709 = 1  # FFmpeg's number for BT.709, as primaries and as transfer characteristic


@dataclass(frozen=True)
class _Clip:
    """rgb (3, T, H, W) and alpha (1, T, H, W), unclamped; pictures are made one by one to save
    memory."""

    rgb: Tensor
    alpha: Tensor
    fps: float
    guide: Tensor | None = None

    def floats(self) -> Iterator[Tensor]:
        """Yields (4, H, W) per frame, clamped: rgb in [-1, 1], alpha in [0, 1]."""
        for rgb, alpha in zip(self.rgb.unbind(1), self.alpha.unbind(1), strict=True):
            rgb, alpha = rgb.detach().float().cpu(), alpha.detach().float().cpu()
            yield torch.cat((rgb.clamp(-1, 1), alpha.clamp(0, 1)))

    def pictures(self) -> Iterator[Picture]:
        for frame in self.floats():
            yield torch.cat(((frame[:3] + 1) / 2, frame[3:])).numpy()

    def images(self) -> Iterator[Frames]:
        """Yields uint8 (H, W, 4) per frame."""
        for picture in self.pictures():
            yield _to_uint8(picture)


def write_clip(
    stem: Path,
    rgb: Tensor,
    alpha: Tensor,
    fps: float,
    formats: Sequence[str],
    guide: Tensor | None = None,
) -> list[Path]:
    """Writes the clip once per format and returns the paths, in the order of `formats`.

    rgb (3, T, H, W): straight colour, about [-1, 1]. alpha (1, T, H, W): about [0, 1]. Both are
    clamped and rounded. guide (T, N, 2), as of `regions.outlines`: drawn in the preview alone.

    | format  | path                        | what it keeps                                   |
    |---------|-----------------------------|-------------------------------------------------|
    | png     | STEM_png/0000.png, ...      | 8 bit, every bit; no frame rate                 |
    | webm    | STEM.webm                   | VP9 with alpha, 8 bit 4:2:0                     |
    | prores  | STEM.mov                    | ProRes 4444, 10 bit 4:4:4; alpha in 10 bit      |
    | webp    | STEM.webp                   | 8 bit, exact where alpha > 0; milliseconds      |
    | apng    | STEM.apng                   | 8 bit, every bit                                |
    | pair    | STEM_fgr.mp4, STEM_pha.mp4  | H.264, straight colour, grey matte, 8 bit 4:2:0 |
    | preview | STEM_preview.mp4            | H.264 over a checkerboard; small ones enlarged  |

    webm, pair and preview have even sides: an odd one repeats its last row or column. WebP stores a
    frame that equals the one before it as a longer duration, and a clip that is opaque all over
    without alpha. One frame is enough for every format; WebP and APNG of one frame are stills.

    A file or folder gets its name only once it is whole, and then replaces what had that name, a
    folder with all its contents. ValueError for unknown formats, shapes, rates and values that are
    not finite, before anything is written. OSError if a format cannot be written; formats already
    written stay.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"formats: {unknown[0]!r} is unknown; choose from {', '.join(FORMATS)}")
    _check_clip(rgb, alpha, fps)
    clip = _Clip(rgb, alpha, fps, guide)
    written = []
    for name in dict.fromkeys(formats):
        paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES[name]]
        with _whole(paths) as temporaries:
            WRITERS[name](temporaries, clip)
        written += paths
    return written


def _check_clip(rgb: Tensor, alpha: Tensor, fps: float) -> None:
    if rgb.ndim != 4 or alpha.shape != (1, *rgb.shape[1:]) or len(rgb) != 3 or not rgb.numel():
        raise ValueError(
            f"rgb: {tuple(rgb.shape)}, alpha: {tuple(alpha.shape)}; a clip is rgb (3, T, H, W) "
            "with alpha (1, T, H, W), not empty. Write the clips of a batch one by one."
        )
    for name, tensor in (("rgb", rgb), ("alpha", alpha)):
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{name}: {bad} of {tensor.numel()} values are not finite; sample in a wider dtype"
            )
    if not (isfinite(fps) and fps > 0):
        raise ValueError(f"fps: {fps}; a rate is finite and above 0 frames per second")


def _write_png(paths: Sequence[Path], clip: _Clip) -> None:
    (folder,) = paths
    folder.mkdir()
    for i, image in enumerate(clip.images()):
        Image.fromarray(image).save(folder / f"{i:04}.png")


def _write_webp(paths: Sequence[Path], clip: _Clip) -> None:
    """Writes whole milliseconds: rounding the times, not the durations, keeps the clip's length."""
    images = [Image.fromarray(image) for image in clip.images()]
    times = np.rint(np.arange(len(images) + 1) * 1000 / clip.fps).astype(int)
    options = {
        "save_all": True,
        "append_images": images[1:],
        "duration": np.diff(times).tolist(),
        "loop": 0,
    }
    images[0].save(paths[0], format="WEBP", lossless=True, **options)


def _write_apng(paths: Sequence[Path], clip: _Clip) -> None:
    """Writes with FFmpeg, which keeps equal frames apart and the rate as a fraction; PIL joins them
    and rounds to ms."""
    planes = ([image.reshape(len(image), -1)] for image in clip.images())
    _encode(paths[0], "apng", "rgba", clip, planes, {"pred": "mixed"}, {"plays": "0"})


def _write_webm(paths: Sequence[Path], clip: _Clip) -> None:
    """Writes two VP9 streams in one, colour and alpha; the muxer marks them with AlphaMode = 1,
    which browsers ask for.

    crf 8: what is lost is chroma resolution by then, 0.36 steps of 255 over a background at
    240x416. crf 4 has 0.34 in a file 1.4 times as large.
    """
    planes = (
        [*_ycbcr(picture, 8, halve=True), _to_levels(picture[3], 255)] for picture in _even(clip)
    )
    # b 0: no bit rate limits the quality
    options = {"crf": "8", "b": "0", "row-mt": "1", "cpu-used": "2", **CENTRED}
    _encode(paths[0], "libvpx-vp9", "yuva420p", clip, planes, options)


def _write_prores(paths: Sequence[Path], clip: _Clip) -> None:
    """Writes alpha_bits 16: ten bits go in and come back unchanged (with 8 only every fourth level
    survives)."""
    planes = (
        [*_ycbcr(picture, 10, halve=False), _to_levels(picture[3], 1023)]
        for picture in clip.pictures()
    )
    # some editors ask for Apple's vendor code
    options = {"profile": "4444", "alpha_bits": "16", "vendor": "apl0"}
    # The frame header repeats the container's tags; the encoder leaves two of the three empty.
    tags = "prores_metadata=color_primaries=bt709:color_trc=bt709:colorspace=bt709"
    _encode(paths[0], "prores_ks", "yuva444p10le", clip, planes, options, packet_filter=tags)


def _write_pair(paths: Sequence[Path], clip: _Clip) -> None:
    """Writes the matte as limited-range luma, 16..235: players and editors stretch it whether or
    not they read the tag."""
    color = (_ycbcr(picture, 8, halve=True) for picture in _even(clip))
    _encode(paths[0], "libx264", "yuv420p", clip, color, {"crf": "8", **CENTRED}, FASTSTART)
    matte = (_grey(picture[3]) for picture in _even(clip))
    _encode(paths[1], "libx264", "yuv420p", clip, matte, {"crf": "8", **CENTRED}, FASTSTART)


def _write_preview(paths: Sequence[Path], clip: _Clip) -> None:
    """Enlarges small clips by a whole factor: a player's own scaling would blur them."""
    height, width = clip.rgb.shape[2:]
    factor = max(1, min(-(-PREVIEW_SIDE // min(height, width)), PREVIEW_MOST // max(height, width)))
    board = checkerboard(height, width, cell=-(-8 // factor))[:, 0]
    pictures = []
    for t, frame in enumerate(clip.floats()):
        picture = _to_uint8(((over(frame[:3], frame[3:], board) + 1) / 2).numpy())
        for axis in (0, 1):
            picture = picture.repeat(factor, axis)
        image = Image.fromarray(picture)
        if clip.guide is not None:
            draw_guide(image, clip.guide, t)
        pictures.append(np.asarray(image))
    write_video(paths[0], np.stack(pictures), clip.fps)


def draw_guide(image: Image.Image, guide: Tensor, t: int) -> None:
    """Draws the guide's outline at frame t, and its centre's way with a dot at the end where it
    moves.

    guide (T, N, 2): x and y as shares of the picture's width and height, as of `regions.outlines`.
    """
    draw, thick = ImageDraw.Draw(image), max(1, min(image.size) // 192)
    points = guide * torch.tensor(image.size) - 0.5
    centres = points.mean(1)
    centres = centres[~centres.isnan().any(1)]
    lines = [] if points[t].isnan().any() else [points[t][[*range(len(points[t])), 0]]]
    moves = len(centres) > 0 and float((centres - centres[0]).norm(dim=1).max()) >= 1
    lines += [centres] if moves else []
    for line in lines:
        draw.line([(x, y) for x, y in line.tolist()], GUIDE, thick)
    if moves:
        draw.circle(tuple(centres[-1].tolist()), 2 * thick, GUIDE)


WRITERS: dict[str, Callable[[Sequence[Path], _Clip], None]] = {
    "png": _write_png,
    "webm": _write_webm,
    "prores": _write_prores,
    "webp": _write_webp,
    "apng": _write_apng,
    "pair": _write_pair,
    "preview": _write_preview,
}
FASTSTART = {"movflags": "+faststart"}
# of 2x2 pixels, as `_ycbcr` takes it; players assume the left edge
CENTRED = {"chroma_sample_location": "center"}


def _to_levels(unit: NDArray[np.float32], top: int) -> NDArray[np.integer]:
    return np.rint(unit * top).astype(np.uint16 if top > 255 else np.uint8)


def _to_uint8(picture: NDArray[np.float32]) -> Frames:
    """Turns (C, H, W) in [0, 1] into (H, W, C)."""
    return cast(Frames, np.ascontiguousarray(_to_levels(picture, 255).transpose(1, 2, 0)))


def _even(clip: _Clip) -> Iterator[Picture]:
    for picture in clip.pictures():
        yield np.pad(picture, ((0, 0), *((0, side % 2) for side in picture.shape[1:])), mode="edge")


def _ycbcr(picture: Picture, bits: int, halve: bool) -> list[NDArray[np.integer]]:
    """Returns BT.709 Y', C'B, C'R in limited range; `halve` takes chroma over blocks of 2x2,
    weighted by alpha.

    Colour under alpha 0 stays as the model made it, it is part of the straight clip; but a plain
    mean of the chroma would mix it into visible pixels. Error of the visible colour in VP9 at
    32x48, hidden magenta, in steps of 255: 6.4 with the plain mean, 3.3 with weights, 3.2 if the
    colour at the edge also replaces the hidden one, 3.1 with nothing to mix in. At 240x416 all of
    them are within 0.01 over a background. 4:4:4 has no such mean and needs no weights.
    """
    luma, *chroma = np.tensordot(YCBCR, picture[:3], 1)  # (3, H, W)
    if halve:
        weight = picture[3] + 1e-3  # where all is transparent, the plain mean
        chroma = [_blocks(c * weight).sum((1, 3)) / _blocks(weight).sum((1, 3)) for c in chroma]
    unit, dtype = 2 ** (bits - 8), np.uint8 if bits == 8 else np.uint16
    levels = [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]
    return [np.rint(plane).astype(dtype) for plane in levels]


def _grey(alpha: NDArray[np.float32]) -> list[NDArray[np.integer]]:
    """Returns (H, W) in [0, 1] as luma 16..235 with neutral chroma of half the size."""
    neutral = np.full([side // 2 for side in alpha.shape], 128, np.uint8)
    return [np.rint(16 + 219 * alpha).astype(np.uint8), neutral, neutral]


def _blocks(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    height, width = plane.shape
    return plane.reshape(height // 2, 2, width // 2, 2)


def _encode(
    path: Path,
    codec: str,
    pixels: str,
    clip: _Clip,
    frames: Iterable[Planes],
    options: dict[str, str],
    container_options: dict[str, str] | None = None,
    packet_filter: str | None = None,
) -> None:
    """Encodes planes as they are into a file: the scaler, which truncates where we round, has no
    part in it."""
    rate = Fraction(clip.fps).limit_denominator(1001)
    height, width = (side + side % 2 if "420" in pixels else side for side in clip.rgb.shape[2:])
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=options))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if pixels != "rgba":
            context = stream.codec_context
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries = context.color_trc = BT709
        container.start_encoding()
        filters = BitStreamFilterContext(packet_filter, stream) if packet_filter else None
        for planes in chain(frames, (None,)):  # None flushes
            packets = stream.encode(
                None if planes is None else _frame(planes, pixels, width, height)
            )
            if filters is not None:
                packets = [out for packet in packets for out in filters.filter(packet)]
            container.mux(packets)


def _frame(planes: Planes, pixels: str, width: int, height: int) -> av.VideoFrame:
    frame = av.VideoFrame(width, height, pixels)
    if pixels != "rgba":
        frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.frombuffer(plane, values.dtype).reshape(-1, plane.line_size // values.itemsize)
        rows[: values.shape[0], : values.shape[1]] = values
    return frame


@contextmanager
def _whole(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields siblings to write to, with the same suffix; they take the names of `paths` if all goes
    well, else vanish.

    OSError names the file, the free space and the way out.
    """
    temporaries = [path.with_name(f".tmp-{path.name}") for path in paths]
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for temporary in temporaries:
            remove(temporary)  # of a run that was killed
        yield temporaries
        for temporary, path in zip(temporaries, paths, strict=True):
            rename_over(temporary, path)
    except (OSError, FFmpegError) as error:  # few of FFmpeg's errors are OSErrors
        names = " + ".join(str(path) for path in paths)
        raise OSError(
            error.errno,
            f"{names}: not written ({error.strerror or error}); {_free_space(paths[0].parent)}. "
            "Free some space, or name a folder that can be written.",
        ) from error
    finally:
        for temporary in temporaries:
            with suppress(OSError):
                remove(temporary)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}"
    except OSError:
        return f"{folder} cannot be opened"
