"""Errors of alpha over time that follow the motion of what is seen."""

import torch
from torch import Tensor
from torchmetrics import Metric

from acetate.metrics.history import History
from acetate.metrics.motion import motion, moved


class TemporalErrors(Metric):
    """messddt: mean over pixels and steps of |e(p, t) - e(p + v, t + 1)|, e the squared error of
    alpha and v the true matte's motion, times 1e3 (Erofeev et al. 2015, "Perceptually motivated
    benchmark for video matting"). An error that goes along with the thing costs nothing.

    The motion is FFmpeg's block matching, in whole pixels; the benchmark's own flow is not
    published. Long clips may be given in pieces, as to `MattingErrors`.
    """

    full_state_update = False
    changes: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("changes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self._before = History(keep=1)

    def update(self, prediction: Tensor, target: Tensor, goes_on: bool = False) -> None:
        """Adds clips (B, 1, T, H, W). Raises ValueError for pieces that do not fit."""
        with torch.autocast(target.device.type, enabled=False):
            pieces = (prediction.float().clamp(0, 1), target.float())
            whole, _ = self._before.joined(pieces, goes_on)
            for one, true in zip(whole[0][:, 0], whole[1][:, 0], strict=True):
                error = (one - true).square()
                after = moved(error[1:], motion(true)[1])
                for change in (error[:-1] - after).abs():
                    self.changes = self.changes + 1e3 * change.double().mean()
                self.count = self.count + len(after)

    def reset(self) -> None:
        super().reset()
        self._before.clear()

    def compute(self) -> dict[str, Tensor]:
        """Returns messddt, where there were two frames."""
        return {"messddt": self.changes / self.count} if self.count > 0 else {}
