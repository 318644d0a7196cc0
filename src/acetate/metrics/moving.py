"""Measures how a clip's transparency moves, without a true one: whether it flickers, goes another
way than its color, or comes late.

Video is (B, C, T, H, W): rgb straight in [-1, 1], alpha in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from acetate.metrics.history import History
from acetate.metrics.motion import BLOCK, motion, moved

REACH = 3  # frames that alpha may come late or early
LAGS = tuple(sorted(range(-REACH, REACH + 1), key=lambda lag: (abs(lag), lag)))
CONTRAST = 8 / 255  # of brightness in a block, from which its motion is told
ALIKE = 0.1  # correlation of changes, from which a lag is told
LUMA = (0.2126, 0.7152, 0.0722)  # Recommendation ITU-R BT.709


class AlphaMotion(Metric):
    """flicker: mean alpha by which a pixel differs from both of its neighbours in time, along
    alpha's own motion and to the same side; the mean over frames but the first and last, where
    anything is seen. Fading and moving are no flicker.

    motion_disagreement: mean change of alpha along the motion of color from frame to frame, where
    anything is seen and color has a pattern that tells its motion. lag: frames by which changes of
    alpha come after those of color, the best of their correlations, from -3 to 3.

    Figures that a clip does not tell are left out: one picture has no motion, color that goes on
    under alpha 0 no lag. Motion is FFmpeg's block matching. Long clips may be given in pieces, as
    to `MattingErrors`.
    """

    full_state_update = False
    flickers: Tensor
    disagreements: Tensor
    products: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("flickers", (2,)), ("disagreements", (2,)), ("products", (7, 3))):
            # sums and pixels; of each lag: alpha times color, alpha and color squared
            start = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, start, dist_reduce_fx="sum")
        self._before = History(keep=REACH + 1)

    def update(self, rgb: Tensor, alpha: Tensor, goes_on: bool = False) -> None:
        """Adds clips. Raises ValueError for pieces that do not fit."""
        with torch.autocast(rgb.device.type, enabled=False):
            pieces = ((rgb.float().clamp(-1, 1) + 1) / 2, alpha.float().clamp(0, 1))
            (color, whole), held = self._before.joined(pieces, goes_on)
            for one, matte in zip(color, whole[:, 0], strict=True):
                self._flickering(matte[max(0, held - 2) :])
                self._disagreeing(one[:, max(0, held - 1) :], matte[max(0, held - 1) :])
                self._lagging(one, matte, held)

    def _flickering(self, alpha: Tensor) -> None:
        """Adds the frames of (T, H, W) that have one before and one after."""
        before, after = (vectors[1:] for vectors in motion(alpha))
        steps = alpha[1:-1] - moved(alpha[:-2], before), alpha[1:-1] - moved(alpha[2:], after)
        turned = torch.where(
            steps[0] * steps[1] > 0, torch.minimum(steps[0].abs(), steps[1].abs()), 0
        )
        seen = (alpha[:-2] > 0) | (alpha[1:-1] > 0) | (alpha[2:] > 0)
        for one, where in zip(turned, seen, strict=True):
            new = torch.stack([one.double().sum(), where.sum().double()])
            self.flickers = self.flickers + new

    def _disagreeing(self, color: Tensor, alpha: Tensor) -> None:
        """Adds the steps between frames of color (3, T, H, W) and alpha (T, H, W)."""
        weights = torch.tensor(LUMA, device=color.device)[:, None, None, None]
        bright = (color * weights).sum(0)
        there = moved(alpha[1:], motion(bright)[1])
        change, seen = (there - alpha[:-1]).abs(), (there > 0) | (alpha[:-1] > 0)
        for one, where, picture in zip(change, seen, bright, strict=False):
            where = where & _patterned(picture)
            new = torch.stack([one[where].double().sum(), where.sum().double()])
            self.disagreements = self.disagreements + new

    def _lagging(self, color: Tensor, alpha: Tensor, held: int) -> None:
        """Adds the changes of color and alpha that a frame behind the held ones takes part in."""
        colors = (color[:, 1:] - color[:, :-1]).abs().mean(0)
        alphas = (alpha[1:] - alpha[:-1]).abs()
        fresh = max(0, held - 1)  # the first change that no piece before had
        products = torch.zeros_like(self.products)
        for place, lag in enumerate(LAGS):
            for i in range(max(0, lag), min(len(alphas), len(colors) + lag)):
                if max(i, i - lag) >= fresh:
                    one, other = alphas[i], colors[i - lag]
                    found = ((one * other).mean(), one.square().mean(), other.square().mean())
                    products[place] += torch.stack(found).double()
        self.products = self.products + products

    def reset(self) -> None:
        super().reset()
        self._before.clear()

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures by name."""
        figures = {}
        for name, sums in (
            ("flicker", self.flickers), ("motion_disagreement", self.disagreements),
        ):  # fmt: skip
            if sums[1] > 0:
                figures[name] = sums[0] / sums[1]
        both, ones, others = self.products.unbind(1)
        alike = both / (ones * others).sqrt().clamp_min(1e-12)
        if alike.max() >= ALIKE:
            figures["lag"] = torch.tensor(float(LAGS[int(alike.argmax())]))
        return figures


def _patterned(bright: Tensor) -> Tensor:
    """Tells where brightness (H, W) has contrast within a block."""
    height, width = bright.shape
    wide = F.pad(bright[None, None], (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    spread = F.max_pool2d(wide, BLOCK) + F.max_pool2d(-wide, BLOCK)
    told = (spread[0, 0] > CONTRAST).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return told[:height, :width]
