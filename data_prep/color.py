"""Is colour straight, or mixed with black, white or another colour where alpha is soft? Measured on
8 x 8 blocks.

Two models of a block whose thing has one colour F, with 0 <= F <= 1: colour C = F (straight), and C
= a F + (1 - a) B, mixed with a backdrop B that all blocks share (black: premultiplied). The model
that leaves the smaller residual is the likelier one; a mixture is excluded by colour that no F can
give, and by colour under alpha 0 that is not the backdrop's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 8  # pixels: small enough for one colour, large enough for an edge to pass through
MOST_BLOCKS = 20_000
FRAMES = 13
# Blocks are alike in space and time, so that a million of them say little more than these many
# independent ones.
INDEPENDENT_FITS = 8
INDEPENDENT_BOUNDS = 100
# share of blocks that break a bound through a codec's fault (measured: at most 4 %, median 0)
STRAY = 0.01
# Log-odds before anything is measured; and for hidden colour that is the backdrop's: black is what
# most writers leave there in any case, white is rare.
PRIOR = {"black": 0.0, "white": -1.0}
PRIOR_OTHER = -2.0
COVERED = {"black": 0.0, "white": 1.5}
COVERED_OTHER = 1.5
BACKDROPS = {"black": (0, 0, 0), "white": (255, 255, 255)}
APART = 24  # levels: nearer to black or white than this, a backdrop is that
ONE_COLOR = 0.9  # share of the hidden pixels, or of the edges, that must agree on a backdrop
# files exist that break their format's definition; they must show it clearly
PRIOR_STRAIGHT_FORMAT = -2.0


@dataclass(frozen=True)
class Mixture:
    """The evidence for colour mixed with one backdrop: log-odds against straight colour, and their
    parts."""

    log_odds: float
    # mean log of the ratio of the residuals straight : mixed, over the blocks that can tell
    fit: float
    informative: float  # how many blocks could tell
    broken: float  # share of soft blocks whose colour no F can give
    # share of hidden blocks that show another colour than the backdrop's; nan: none is hidden
    uncovered: float


def mixtures(
    frames: Sequence[NDArray[np.uint8]], low: int, high: int, lossy: bool, straight_format: bool
) -> dict[str, Mixture] | None:
    """Returns backdrop (black, white, #rrggbb) -> evidence; None without soft pixels. frames: (H,
    W, 4) each, some of a clip; soft: low < alpha < high."""
    margin = 8  # steps of alpha: nearer to 0 and 1 the models do not differ
    bounds = max(low, margin), min(high, 255 - margin)
    telling, hidden = [], []
    for frame in frames:
        blocks = _blocks(frame)
        hidden.append(blocks[:3].compress((blocks[3] <= low).all(axis=0), axis=-1))
        soft = _soft(blocks[3], bounds).sum(axis=0, dtype=np.uint8) >= BLOCK * BLOCK / 32
        telling.append(blocks.compress(soft, axis=-1))
    blocks = np.concatenate(telling, axis=-1)
    count = blocks.shape[-1]
    if not count:
        return None
    if count > MOST_BLOCKS:
        blocks = blocks.take(np.linspace(0, count - 1, MOST_BLOCKS).astype(int), axis=-1)
    soft = _soft(blocks[3], bounds)
    blocks = blocks.astype(np.float32) / 255
    noise, tolerance = (6, 8) if lossy else (1.5, 1.5)
    color, alpha = blocks[:3], blocks[3]
    seen = alpha * (alpha > low / 255)
    found = {}
    candidates = BACKDROPS | _other_backdrop(blocks, soft, hidden, tolerance)
    for name, backdrop in candidates.items():
        behind = np.array(backdrop, np.float32)[:, None, None] / 255
        lit = color - (1 - alpha) * behind  # of a mixture this is a F
        # wiped colour says nothing of another backdrop
        known = hidden if name in BACKDROPS or any(map(np.any, hidden)) else []
        places = sum(part.shape[-1] for part in known)
        uncovered = 1 - _near(known, backdrop, 20) if places else math.nan
        fit, informative = _fit(color, lit, behind[..., 0], seen, noise / 255)
        broken = _broken(lit, alpha, soft, tolerance / 255)
        prior = PRIOR.get(name, PRIOR_OTHER) + PRIOR_STRAIGHT_FORMAT * straight_format
        log_odds = (
            prior
            + 0.5 * fit * INDEPENDENT_FITS * informative / (informative + INDEPENDENT_FITS)
            + against(broken, blocks.shape[-1])
            + (against(uncovered, places) or COVERED.get(name, COVERED_OTHER) * bool(places))
        )
        found[name] = Mixture(log_odds, fit, informative, broken, uncovered)
    return found


def _soft(alpha: NDArray[np.uint8], bounds: tuple[int, int]) -> NDArray[np.bool_]:
    return (alpha > bounds[0]) & (alpha < bounds[1])


def _near(parts: Sequence[NDArray[np.uint8]], color: Iterable[float], by: float) -> float:
    """Returns the share of the pixels none of whose channels is further from a colour. parts: (3,
    ...) each, not all of them empty."""
    bounds = [(math.ceil(level - by), math.floor(level + by)) for level in color]
    agree = count = 0
    for part in parts:
        within = [
            (plane >= least) & (plane <= most)
            for plane, (least, most) in zip(part, bounds, strict=True)
        ]
        agree += np.count_nonzero(within[0] & within[1] & within[2])
        count += within[0].size
    return agree / count


def sampled(count: int) -> NDArray[np.intp]:
    """Returns which frames of a clip `mixtures` looks at."""
    return np.unique(np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int))


def _other_backdrop(
    blocks: NDArray[np.float32],
    soft: NDArray[np.bool_],
    hidden: Sequence[NDArray[np.uint8]],
    tolerance: float,
) -> dict[str, tuple[int, int, int]]:
    """Finds the one colour that shows under alpha 0, or, where that is wiped, the one that things
    of many colours fade into; none if that is nearly black or white."""
    if any(map(np.any, hidden)):
        middle = np.array([_median([part[channel] for part in hidden]) for channel in range(3)])
        agree = _near(hidden, middle, 2 + tolerance)
    else:
        middle, agree = _fades_into(blocks, soft)
    if agree < ONE_COLOR or middle.max() < APART or middle.min() > 255 - APART:
        return {}
    red, green, blue = (int(level) for level in middle.round())
    return {f"#{red:02x}{green:02x}{blue:02x}": (red, green, blue)}


def _median(parts: Sequence[NDArray[np.uint8]]) -> float:
    """Returns the median of all their levels together."""
    counts = sum(np.bincount(part.ravel(), minlength=256) for part in parts)
    up_to = np.cumsum(counts)
    middle = np.searchsorted(up_to, [(up_to[-1] - 1) // 2, up_to[-1] // 2], side="right")
    return float(middle.mean())


def _fades_into(
    blocks: NDArray[np.float32], soft: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], float]:
    """Finds where the lines through colour over alpha of the blocks meet at alpha 0, and the share
    of them that do, if they end apart at alpha 1: else one thing's own colour were the backdrop."""
    weight = soft.astype(np.float64)
    count = weight.sum(axis=0).clip(1)
    color, alpha = blocks[:3], blocks[3]
    mean_alpha = (weight * alpha).sum(axis=0) / count
    off = weight * (alpha - mean_alpha)
    spread = (off * (alpha - mean_alpha)).sum(axis=0)
    steep = spread > 0.1  # the others' lines are anybody's
    if steep.sum() < 4:
        return np.zeros(3), 0.0
    mean_color = (weight * color).sum(axis=1) / count  # (3, N)
    both = (off * (color - mean_color[:, None])).sum(axis=1)
    slope = (both / spread.clip(1e-6))[:, steep]
    start = mean_color[:, steep] - slope * mean_alpha[steep]
    middle, end = np.median(start, axis=1), start + slope
    agree = (np.abs(start - middle[:, None]).max(axis=0) < 0.08).mean()
    apart = np.abs(end - np.median(end, axis=1)[:, None]).max(axis=0).mean()
    return 255 * middle.clip(0, 1), float(agree) if apart > 0.15 else 0.0


def against(share: float, count: int) -> float:
    """Returns log-odds, never above 0, from a bound that `share` of `count` blocks break.

    Binomial with rate STRAY against any rate alike (whose integral is 1 / (n + 1)). A bound that
    holds proves nothing: dark colour keeps it as well.
    """
    n = min(count, INDEPENDENT_BOUNDS)
    if not n or math.isnan(share):
        return 0.0
    k = share * n
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return min(0.0, choose + k * math.log(STRAY) + (n - k) * math.log1p(-STRAY) + math.log(n + 1))


def confidence(log_odds: float) -> float:
    """Returns how far log-odds are from a coin's toss, in [0, 1]."""
    return abs(math.tanh(log_odds / 2))


def _blocks(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Divides (H, W, 4) into (4, BLOCK * BLOCK, N); a frame that is no multiple repeats its last
    rows and columns."""
    pads = [-side % BLOCK for side in frame.shape[:2]]
    if any(pads):
        frame = np.pad(frame, ((0, pads[0]), (0, pads[1]), (0, 0)), mode="edge")
    height, width, channels = frame.shape
    tiles = frame.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return tiles.transpose(4, 1, 3, 0, 2).reshape(channels, BLOCK * BLOCK, -1)


def _fit(
    color: NDArray[np.float32],
    lit: NDArray[np.float32],
    behind: NDArray[np.float32],
    alpha: NDArray[np.float32],
    noise: float,
) -> tuple[float, float]:
    """Returns the mean log ratio of the models' residuals, straight to mixed; and how many blocks
    could tell them apart.

    color and lit, what the backdrop leaves of it: (3, P, N), behind: (3, 1), alpha: (P, N), all in
    [0, 1]. Weighted by alpha, for what it hides is nobody's colour.
    """
    weight = alpha / _summed(alpha)
    mean = (weight * color).sum(axis=1)  # (3, N)
    straight = (weight * (color - mean[:, None]) ** 2).sum(axis=1).mean(axis=0)
    squares = _summed(weight * alpha**2)
    mixed_color = (weight * alpha * lit).sum(axis=1) / squares
    apart = lit - alpha * mixed_color.clip(0, 1)[:, None]
    mixed = (weight * apart**2).sum(axis=1).mean(axis=0)
    # A mixture's colour would vary as much as alpha does; what that is beside the noise is what a
    # block can tell.
    spread = squares / _summed(weight * alpha) ** 2 - 1
    signal = ((mean - behind) ** 2).mean(axis=0) * spread.clip(0)
    tells = signal / (signal + 4 * noise**2)
    ratio = np.log((straight + noise**2) / (mixed + noise**2)).clip(-3, 3)
    informative = float(tells.sum())
    return float((tells * ratio).sum() / (informative + 1)), informative


def _summed(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums (P, N) into (N,), pairwise, as numpy adds what lies side by side."""
    return np.ascontiguousarray(values.T).sum(axis=1)


def _broken(
    lit: NDArray[np.float32], alpha: NDArray[np.float32], soft: NDArray[np.bool_], by: float
) -> float:
    """Returns the share of blocks whose soft pixels are brighter than a mixture can be, a F > a, or
    darker, a F < 0, on the mean over a block.

    The mean, because subsampled chroma and ringing cancel within a block, and straight colour does
    not.
    """
    sums = (lit * soft).sum(axis=1)
    excess = np.maximum(sums.max(axis=0) - _summed(alpha * soft), -sums.min(axis=0))
    return float((excess / soft.sum(axis=0) > by).mean())
