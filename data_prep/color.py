"""Is colour straight, or mixed with black, white or another colour where alpha is soft? Measured on
8 x 8 blocks.

Two models of a block whose thing has one colour F, with 0 <= F <= 1: colour C = F (straight), and C
= a F + (1 - a) B, mixed with a backdrop B that all blocks share (black: premultiplied). The model
that leaves the smaller residual is the likelier one; a mixture is excluded by colour that no F can
give, and by colour under alpha 0 that is not the backdrop's.
"""

import math
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
    frames: NDArray[np.uint8], low: int, high: int, lossy: bool, straight_format: bool
) -> dict[str, Mixture] | None:
    """Returns backdrop (black, white, #rrggbb) -> evidence; None without soft pixels. frames: (T,
    H, W, 4), some of a clip; soft: low < alpha < high."""
    blocks = _blocks(frames)
    alpha = blocks[..., 3]
    hidden = blocks[(alpha <= low).all(axis=1)]
    margin = 8  # steps of alpha: nearer to 0 and 1 the models do not differ
    soft = (alpha > max(low, margin)) & (alpha < min(high, 255 - margin))
    chosen = np.flatnonzero(soft.mean(axis=1) >= 1 / 32)
    if not len(chosen):
        return None
    if len(chosen) > MOST_BLOCKS:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MOST_BLOCKS).astype(int)]
    blocks, soft = blocks[chosen].astype(np.float32) / 255, soft[chosen]
    noise, tolerance = (6, 8) if lossy else (1.5, 1.5)
    found = {}
    candidates = BACKDROPS | _other_backdrop(blocks, soft, hidden, tolerance)
    for name, backdrop in candidates.items():
        behind = np.array(backdrop, np.float32) / 255
        # of a mixture this is a F
        lit = blocks[..., :3] - (1 - blocks[..., 3:]) * behind
        known = hidden[..., :3]
        if name not in BACKDROPS and not known.any():
            known = known[:0]  # wiped: that says nothing
        shown = np.abs(known.astype(np.int16) - backdrop).max(axis=-1)
        seen = blocks[..., 3:] * (blocks[..., 3:] > low / 255)
        fit, informative = _fit(blocks[..., :3], lit, behind, seen, noise / 255)
        broken = _broken(lit, blocks[..., 3], soft, tolerance / 255)
        uncovered = float((shown > 20).mean()) if len(known) else math.nan
        prior = PRIOR.get(name, PRIOR_OTHER) + PRIOR_STRAIGHT_FORMAT * straight_format
        log_odds = (
            prior
            + 0.5 * fit * INDEPENDENT_FITS * informative / (informative + INDEPENDENT_FITS)
            + against(broken, len(chosen))
            + (
                against(uncovered, len(known))
                or COVERED.get(name, COVERED_OTHER) * bool(len(known))
            )
        )
        found[name] = Mixture(log_odds, fit, informative, broken, uncovered)
    return found


def sampled(count: int) -> NDArray[np.intp]:
    """Returns which frames of a clip `mixtures` looks at."""
    return np.unique(np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int))


def _other_backdrop(
    blocks: NDArray[np.float32],
    soft: NDArray[np.bool_],
    hidden: NDArray[np.uint8],
    tolerance: float,
) -> dict[str, tuple[int, int, int]]:
    """Finds the one colour that shows under alpha 0, or, where that is wiped, the one that things
    of many colours fade into; none if that is nearly black or white."""
    colors = hidden[..., :3].reshape(-1, 3)
    if len(colors) and colors.any():
        middle = np.median(colors, axis=0)
        agree = (np.abs(colors - middle).max(axis=-1) <= 2 + tolerance).mean()
    else:
        middle, agree = _fades_into(blocks, soft)
    if agree < ONE_COLOR or middle.max() < APART or middle.min() > 255 - APART:
        return {}
    red, green, blue = (int(level) for level in middle.round())
    return {f"#{red:02x}{green:02x}{blue:02x}": (red, green, blue)}


def _fades_into(
    blocks: NDArray[np.float32], soft: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], float]:
    """Finds where the lines through colour over alpha of the blocks meet at alpha 0, and the share
    of them that do, if they end apart at alpha 1: else one thing's own colour were the backdrop."""
    weight = soft[..., None].astype(np.float64)
    count = weight.sum(axis=1).clip(1)
    alpha, color = blocks[..., 3:], blocks[..., :3]
    mean_alpha, mean_color = (weight * alpha).sum(1) / count, (weight * color).sum(1) / count
    spread = (weight * (alpha - mean_alpha[:, None]) ** 2).sum(1)
    steep = spread[:, 0] > 0.1  # the others' lines are anybody's
    if steep.sum() < 4:
        return np.zeros(3), 0.0
    both = (weight * (alpha - mean_alpha[:, None]) * (color - mean_color[:, None])).sum(1)
    slope = (both / spread.clip(1e-6))[steep]
    start = mean_color[steep] - slope * mean_alpha[steep]
    middle, end = np.median(start, axis=0), start + slope
    agree = (np.abs(start - middle).max(axis=-1) < 0.08).mean()
    apart = np.abs(end - np.median(end, axis=0)).max(axis=-1).mean()
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


def _blocks(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Divides (T, H, W, 4) into (N, BLOCK * BLOCK, 4); a frame that is no multiple repeats its last
    rows and columns."""
    pads = [-side % BLOCK for side in frames.shape[1:3]]
    frames = np.pad(frames, ((0, 0), (0, pads[0]), (0, pads[1]), (0, 0)), mode="edge")
    count, height, width, channels = frames.shape
    tiles = frames.reshape(count, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return tiles.swapaxes(2, 3).reshape(-1, BLOCK * BLOCK, channels)


def _fit(
    color: NDArray[np.float32],
    lit: NDArray[np.float32],
    behind: NDArray[np.float32],
    alpha: NDArray[np.float32],
    noise: float,
) -> tuple[float, float]:
    """Returns the mean log ratio of the models' residuals, straight to mixed; and how many blocks
    could tell them apart.

    colour and lit, what the backdrop leaves of it: (N, P, 3), alpha: (N, P, 1), all in [0, 1].
    Weighted by alpha, for what it hides is nobody's colour.
    """
    weight = alpha / alpha.sum(axis=1, keepdims=True)
    mean = (weight * color).sum(axis=1, keepdims=True)
    straight = (weight * (color - mean) ** 2).sum(axis=1).mean(axis=-1)
    mixed_color = (weight * alpha * lit).sum(axis=1, keepdims=True) / (weight * alpha**2).sum(
        axis=1, keepdims=True
    )
    mixed = (weight * (lit - alpha * mixed_color.clip(0, 1)) ** 2).sum(axis=1).mean(axis=-1)
    # A mixture's colour would vary as much as alpha does; what that is beside the noise is what a
    # block can tell.
    mean_alpha = (weight * alpha).sum(axis=1)[:, 0]
    spread = (weight * alpha**2).sum(axis=1)[:, 0] / mean_alpha**2 - 1
    signal = ((mean[:, 0] - behind) ** 2).mean(axis=-1) * spread.clip(0)
    tells = signal / (signal + 4 * noise**2)
    ratio = np.log((straight + noise**2) / (mixed + noise**2)).clip(-3, 3)
    informative = float(tells.sum())
    return float((tells * ratio).sum() / (informative + 1)), informative


def _broken(
    lit: NDArray[np.float32], alpha: NDArray[np.float32], soft: NDArray[np.bool_], by: float
) -> float:
    """Returns the share of blocks whose soft pixels are brighter than a mixture can be, a F > a, or
    darker, a F < 0, on the mean over a block.

    The mean, because subsampled chroma and ringing cancel within a block, and straight colour does
    not.
    """
    count = soft.sum(axis=1)
    sums = (lit * soft[..., None]).sum(axis=1)
    excess = np.maximum(sums.max(axis=-1) - (alpha * soft).sum(axis=1), -sums.min(axis=-1))
    return float((excess / count > by).mean())
