"""Names what is wrong with a whole clip against the true one: its matte is shifted, early or late,
or its color was multiplied by alpha once too often."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from acetate.metrics.history import History

REACH = 2  # pixels and frames, to each side
SHIFTS = sorted(
    ((y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)),
    key=lambda shift: (shift[0] ** 2 + shift[1] ** 2, shift),
)  # the nearest first
DELAYS = (1, -1, 2, -2)
EXPLAINS = 0.5  # of the squared error that a fault has to take away to be named
LEAST = 1e-4  # mean squared difference that multiplying by alpha makes, for it to be told


class Faults(Metric):
    """shift_x, shift_y: pixels that the matte lies to the right of the true one, and below it.
    delay: frames that it is late; below 0 it is early. Of these one is named, that which explains
    most of the error, or none. Up to two pixels and two frames are looked at.

    multiplied: 0 for straight color, 1 where it was multiplied by alpha once more, below 0 where it
    was divided. squared: the same of alpha itself, 1 where it is the true one times itself. Both
    are left out where too few pixels are soft. Long clips may be given in pieces, as to
    `MattingErrors`.
    """

    full_state_update = False
    errors: Tensor
    counts: Tensor
    moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, kind in (("errors", torch.float64), ("counts", torch.long)):
            start = torch.zeros(len(SHIFTS) + len(DELAYS), dtype=kind)
            self.add_state(name, start, dist_reduce_fx="sum")
        # of multiplied and squared: products, squares, pixels
        self.add_state("moments", torch.zeros(2, 3, dtype=torch.float64), dist_reduce_fx="sum")
        self._before = History(keep=REACH)

    def update(
        self, rgb_hat: Tensor, alpha_hat: Tensor, rgb: Tensor, alpha: Tensor, goes_on: bool = False
    ) -> None:
        """Adds clips. Raises ValueError for pieces that do not fit."""
        with torch.autocast(rgb.device.type, enabled=False):
            alpha_hat, alpha = alpha_hat.float().clamp(0, 1), alpha.float()
            (seen, true), held = self._before.joined((alpha_hat, alpha), goes_on)
            for one, other in zip(seen[:, 0], true[:, 0], strict=True):
                self._displaced(one, other, held)
            unit_hat, unit = (rgb_hat.float().clamp(-1, 1) + 1) / 2, (rgb.float() + 1) / 2
            shown = alpha * (alpha_hat > 0)  # color that nobody sees is anything
            moments = (
                _moments(shown * (unit_hat - unit), shown * (alpha - 1) * unit),
                _moments(alpha_hat - alpha, alpha * (alpha - 1)),
            )
            self.moments = self.moments + torch.stack(moments)

    def _displaced(self, seen: Tensor, true: Tensor, held: int) -> None:
        """Adds squared errors of one clip, (T, H, W) with the held frames first."""
        height, width = true.shape[1:]
        edge = min(REACH, (min(height, width) - 1) // 2)
        errors, counts = torch.zeros_like(self.errors), torch.zeros_like(self.counts)
        for i in range(held, len(true)):
            inner = true[i, edge : height - edge, edge : width - edge]
            for place, (y, x) in enumerate(SHIFTS):
                if max(abs(y), abs(x)) <= edge:
                    rows = slice(edge + y, height - edge + y)
                    columns = slice(edge + x, width - edge + x)
                    errors[place] += (seen[i, rows, columns] - inner).square().mean().double()
                    counts[place] += 1
            for place, delay in enumerate(DELAYS, start=len(SHIFTS)):
                if i >= abs(delay):
                    one, other = (i, i - delay) if delay > 0 else (i + delay, i)
                    errors[place] += (seen[one] - true[other]).square().mean().double()
                    counts[place] += 1
        self.errors, self.counts = self.errors + errors, self.counts + counts

    def reset(self) -> None:
        super().reset()
        self._before.clear()

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name."""
        means = torch.where(self.counts > 0, self.errors / self.counts.clamp_min(1), torch.inf)
        best = int(means.argmin()) if len(means) else 0  # the first of equals: the nearest
        if not means[best] < EXPLAINS * means[0]:
            best = 0
        (y, x), delay = (
            (SHIFTS[best], 0) if best < len(SHIFTS) else ((0, 0), DELAYS[best - len(SHIFTS)])
        )
        figures = {
            name: torch.tensor(float(value))
            for name, value in (("shift_x", x), ("shift_y", y), ("delay", delay))
        }
        for name, moments in zip(("multiplied", "squared"), self.moments, strict=True):
            product, square, pixels = moments
            if square > LEAST * pixels:
                figures[name] = product / square
        return figures


def _moments(found: Tensor, step: Tensor) -> Tensor:
    """Returns sums that tell how many times `step` was made: products, squares, pixels."""
    size = torch.tensor(float(step.numel()), device=step.device, dtype=torch.float64)
    return torch.stack([(found * step).double().sum(), step.double().square().sum(), size])


def named(figures: Mapping[str, float]) -> list[str]:
    """Says in words what `Faults` found of a clip; nothing where it is sound."""
    found = []
    across, down = figures.get("shift_x", 0), figures.get("shift_y", 0)
    for size, (less, more) in ((across, ("left", "right")), (down, ("up", "down"))):
        if size:
            found.append(f"alpha is shifted {abs(size):g} px {more if size > 0 else less}")
    if delay := figures.get("delay", 0):
        count = f"{abs(delay):g} frame{'s' * (abs(delay) != 1)}"
        found.append(f"alpha is {count} {'late' if delay > 0 else 'early'}")
    if (often := figures.get("multiplied", 0)) > 0.5:
        found.append("colour is multiplied by alpha once too often")
    elif often < -0.5:
        found.append("colour is divided by alpha once too often")
    if figures.get("squared", 0) > 0.5:
        found.append("alpha is multiplied by itself")
    return found
