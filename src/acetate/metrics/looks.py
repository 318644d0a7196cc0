"""Measures a clip's transparency without a true one, a frame at a time: what is left over where it
should be empty, what is missing inside, and what its edges are like.

Video is (B, C, T, H, W): rgb straight in [-1, 1], alpha in [0, 1]. Loops over frames run on the
CPU.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from acetate.alpha import border_mean, frames
from acetate.metrics.alpha import centre_of_mass
from acetate.regions import inside

SUBJECT = 0.5  # alpha from which a pixel belongs to the subject
SOLID, SOFT = 0.95, 0.05  # alpha from which a pixel is solid, and up to which it is no edge
AWAY = 16  # pixels from the subject, where the background begins
NEAR = 8  # pixels from a solid pixel, within which an edge has its color
STEPS = 16  # of alpha, at which holes are looked for
Plane = NDArray[np.float32]


class AlphaLooks(Metric):
    """coverage: mean alpha. soft: share of the pixels strictly between 0 and 1. border: mean alpha
    of the outermost rows and columns. background: mean alpha of what is more than 16 pixels away
    from every pixel of alpha 0.5. holes: share of the shape that is missing inside of it, where
    what alpha encloses counts as inside. edge_sharpness: change of alpha a pixel at its contour,
    0.5 for a cut, 1/w for a ramp of w pixels. halo: see `halo_of_frame`.

    Figures of what does not occur in a clip are left out. Pieces of a clip count as the whole.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    names = ("coverage", "soft", "border", "background", "holes", "edge_sharpness", "halo")

    def __init__(self) -> None:
        super().__init__()
        for name in ("sums", "counts"):
            start = torch.zeros(len(self.names), dtype=torch.float64)
            self.add_state(name, start, dist_reduce_fx="sum")

    def update(self, rgb: Tensor, alpha: Tensor) -> None:
        """Adds clips."""
        with torch.autocast(rgb.device.type, enabled=False):
            unit, alpha = (rgb.float().clamp(-1, 1) + 1) / 2, alpha.float().clamp(0, 1)
            colors, mattes = frames(unit).cpu(), frames(alpha).cpu()
        for color, matte in zip(colors, mattes, strict=True):
            plane = matte[0].numpy()
            found = [
                (plane.sum(dtype=np.float64), plane.size),
                (((plane > 0) & (plane < 1)).sum(), plane.size),
                (float(border_mean(matte[None, :, None])[0]), 1),
                _background(plane),
                holes_of_frame(plane),
                _sharpness(plane),
                halo_of_frame(color.permute(1, 2, 0).numpy(), plane),
            ]
            new = torch.tensor(found, dtype=torch.float64, device=self.sums.device)
            self.sums, self.counts = self.sums + new[:, 0], self.counts + new[:, 1]

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name."""
        return {
            name: total / count
            for name, total, count in zip(self.names, self.sums, self.counts, strict=True)
            if count > 0
        }


def _background(alpha: Plane) -> tuple[float, int]:
    """Returns the sum of alpha (H, W) away from the subject, and the pixels there; none where there
    is no subject."""
    subject = alpha >= SUBJECT
    if not subject.any():
        return 0.0, 0
    near = np.asarray(ndimage.maximum_filter(subject, 2 * AWAY + 1, mode="nearest"), bool)
    away = alpha[~near]
    return float(away.sum(dtype=np.float64)), away.size


def holes_of_frame(alpha: Plane) -> tuple[float, float]:
    """Returns what is missing inside of a matte (H, W), and the size of the shape with it, both in
    pixels of alpha 1.

    At 16 thresholds, what the shape encloses is a hole; their mean is the volume between the matte
    and the matte with its basins filled, to 1/32 of alpha.
    """
    missing, size = 0, 0
    for step in range(STEPS):
        shape = alpha >= (step + 0.5) / STEPS
        size += int(shape.sum())
        if not shape.any() or shape.all():
            continue
        labels = np.empty(shape.shape, np.int32)
        ndimage.label(~shape, output=labels)
        count = int(labels.max())
        edges = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        outside = np.unique(np.concatenate(edges))
        if count + 1 > len(outside) + (0 not in outside):
            held = np.bincount(labels.ravel(), minlength=count + 1)
            held[[0, *outside]] = 0
            missing += int(held.sum())
    return missing / STEPS, (size + missing) / STEPS


def _sharpness(alpha: Plane) -> tuple[float, int]:
    """Returns the sum of the gradient's magnitude at the contour, and its pixels: those of the
    subject with a neighbour outside of it."""
    subject = np.pad(alpha >= SUBJECT, 1, mode="edge")
    around = subject[:-2, 1:-1] & subject[2:, 1:-1] & subject[1:-1, :-2] & subject[1:-1, 2:]
    contour = subject[1:-1, 1:-1] & ~around
    wide = np.pad(alpha, 1, mode="edge")
    down, right = (wide[2:, 1:-1] - wide[:-2, 1:-1]) / 2, (wide[1:-1, 2:] - wide[1:-1, :-2]) / 2
    return float(np.hypot(down, right)[contour].sum(dtype=np.float64)), int(contour.sum())


def halo_of_frame(color: Plane, alpha: Plane) -> tuple[float, int]:
    """Returns the sum over edge pixels of how far composites over black and over white contradict
    each other, and the pixels. color (H, W, 3) and alpha (H, W) in [0, 1].

    Edge pixels have alpha between 0.05 and 0.95 and a solid pixel within 8 pixels; S is the color
    of the nearest one. Over black a pixel shows alpha C, over white alpha C + 1 - alpha: each of
    them implies how much of S is there. What no one amount explains in both, as the root of the
    mean square over the six channels, is 0 for C = S and grows with a dark, a light or a colored
    fringe. A softer or harder edge of the right color is no halo.
    """
    solid = alpha >= SOLID
    edge = (alpha > SOFT) & ~solid
    if not solid.any() or not edge.any():
        return 0.0, 0
    found = ndimage.distance_transform_edt(~solid, return_indices=True)
    assert isinstance(found, tuple)
    distance, nearest = found
    edge &= distance <= NEAR
    thing = color[nearest[0][edge], nearest[1][edge]].astype(np.float64)
    shown, weight = color[edge].astype(np.float64), alpha[edge].astype(np.float64)[:, None]
    seen = np.concatenate([weight * shown, weight * (1 - shown)], 1)  # over black; 1 - over white
    whole = np.concatenate([thing, 1 - thing], 1)
    amount = (seen * whole).sum(1, keepdims=True) / (whole**2).sum(1, keepdims=True)
    apart = np.sqrt(((seen - amount * whole) ** 2).mean(1))
    return float(apart.sum()), len(apart)


class GuideAdherence(Metric):
    """guide_inside: share of alpha that lies in the guide's ellipse. guide_offset: distance of
    alpha's centre of mass from the ellipse's centre as a share of the shorter side, the mean over
    frames that show anything. Both are left out where no frame does."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # alpha inside, alpha, offsets, frames
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, alpha: Tensor, ellipses: Tensor) -> None:
        """Adds a clip, (1, 1, T, H, W), or a piece of it. ellipses: (T, 5) in pixels, as
        `regions.fit_ellipses` gives them; those of length 0 stand for no guide."""
        alpha, ellipses = alpha[0, 0].double().clamp(0, 1), ellipses.to(alpha.device).double()
        height, width = alpha.shape[1:]
        within = inside(ellipses, height, width)
        shares = centre_of_mass(alpha[:, None, None])
        scale = torch.tensor([width, height], device=alpha.device)
        apart = (shares * scale - 0.5 - ellipses[:, :2]).norm(dim=1) / min(height, width)
        guided = (ellipses[:, 2] > 0) & (alpha.amax((1, 2)) > 0)
        alpha = alpha[guided]
        new = (
            (alpha * within[guided]).sum(), alpha.sum(), apart[guided].sum(),
            guided.sum().double(),
        )  # fmt: skip
        self.sums = self.sums + torch.stack(new)

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name."""
        within, total, apart, count = self.sums
        return {"guide_inside": within / total, "guide_offset": apart / count} if count > 0 else {}
