"""Reads the released inference's Gaussian mask: a guide G, saved by torch.save as a tensor or a
numpy array."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from acetate.models.adapters import is_float

FLOATS = ("f2", "f4", "f8")


class _Given:
    """Stands in for numpy's constructors while a file is unpickled, so that none of them runs on a
    stranger's data."""

    state: tuple = ()

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple) -> None:
        self.state = state


# All that the pickle of a plain array names, in numpy 1 and in numpy 2
NUMPY = (
    "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
)  # fmt: skip


def read_gauss_mask(path: Path, grid: Sequence[int]) -> Tensor:
    """Reads a mask, (1, 1, F, h, w) in [0, 1], for a latent grid (F, h, w).

    The file's frames must be F; h and w are resized bilinearly, as the released inference does.
    Nothing is run: a file of anything but one tensor or array of floats raises ValueError, as do
    values outside of [0, 1].
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"guide.mask={path} does not exist; it is a file of torch.save, (frames, h, w)."
        )
    mask = _load(path)
    if mask.ndim != 3 or not mask.numel() or not is_float(mask) or mask.layout != torch.strided:
        layout = (
            "" if mask.layout == torch.strided else f", {str(mask.layout).removeprefix('torch.')}"
        )
        raise ValueError(
            f"{path} is {tuple(mask.shape)} of {mask.dtype}{layout}; a Gaussian mask is (frames, "
            "h, w) of floats of 16 bits or more, dense and not empty."
        )
    if len(mask) != grid[0]:
        raise ValueError(
            f"{path} has {len(mask)} frames, this clip {grid[0]} latent frames. Make a mask of "
            f"{grid[0]} frames, or a clip of {len(mask)} latent frames."
        )
    if not (mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(
            f"{path} is from {mask.min():.3g} to {mask.max():.3g}; a Gaussian mask is in [0, 1]."
        )
    resized = F.interpolate(
        mask.float()[:, None], size=tuple(grid[1:]), mode="bilinear", align_corners=False
    )
    return resized.transpose(0, 1)[None]


def _load(path: Path) -> Tensor:
    try:
        with torch.serialization.safe_globals([(_Given, name) for name in NUMPY]):
            held = torch.load(path, map_location="cpu", weights_only=True)
        return held if isinstance(held, Tensor) else _array(held)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{path} cannot be read as a Gaussian mask: no file of torch.save with one tensor or "
            "numpy array. Nothing in it was run."
        ) from error


def _array(held: _Given) -> Tensor:
    """Builds an array from the state that numpy pickles: version, shape, type, column order,
    bytes."""
    _, shape, dtype, columns, data = held.state
    (kind, *_), (_, order, *_) = dtype.arguments, dtype.state
    if kind not in FLOATS:
        raise ValueError(f"an array of {kind}")
    array = np.frombuffer(data, f"{order}{kind}").reshape(shape, order="F" if columns else "C")
    return torch.from_numpy(array.astype(f"={kind}"))  # a copy, which may be written to
