"""Is colour straight, or mixed with black or white where alpha is soft? Measured on 8 x 8 blocks.

Three models of a block whose thing has one colour F, with 0 <= F <= 1: colour C = F (straight), C =
a F (mixed with black, premultiplied), C = a F + 1 - a (mixed with white). The last one is the
second for 1 - C. The model that leaves the smaller residual is the likelier one; a mixture is
excluded by colour that no F can give, and by colour under alpha 0, which a mixture has covered.
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
COVERED = {"black": 0.0, "white": 1.5}
# files exist that break their format's definition; they must show it clearly
PRIOR_STRAIGHT_FORMAT = -2.0


@dataclass(frozen=True)
class Mixture:
    """What speaks for colour mixed with one backdrop: log-odds against straight colour, and their
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
    """Backdrop -> evidence; None without soft pixels. frames: (T, H, W, 4); soft: low < alpha <
    high."""
    sample = frames[
        np.unique(np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int))
    ]
    blocks = _blocks(sample)
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
    for backdrop in ("black", "white"):
        colour = blocks[..., :3] if backdrop == "black" else 1 - blocks[..., :3]
        shown = (
            hidden[..., :3].max(axis=-1)
            if backdrop == "black"
            else 255 - hidden[..., :3].min(axis=-1)
        )
        fit, informative = _fit(
            colour, blocks[..., 3:] * (blocks[..., 3:] > low / 255), noise / 255
        )
        broken = _broken(colour, blocks[..., 3], soft, tolerance / 255)
        uncovered = float((shown > 20).mean()) if len(hidden) else math.nan
        prior = PRIOR[backdrop] + PRIOR_STRAIGHT_FORMAT * straight_format
        log_odds = (
            prior
            + 0.5 * fit * INDEPENDENT_FITS * informative / (informative + INDEPENDENT_FITS)
            + against(broken, len(chosen))
            + (against(uncovered, len(hidden)) or COVERED[backdrop] * bool(len(hidden)))
        )
        found[backdrop] = Mixture(log_odds, fit, informative, broken, uncovered)
    return found


def against(share: float, count: int) -> float:
    """Log-odds, never above 0, from a bound that `share` of `count` blocks break.

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
    """How far from a coin's toss, in [0, 1]."""
    return abs(math.tanh(log_odds / 2))


def _blocks(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(T, H, W, 4) -> (N, BLOCK * BLOCK, 4); a frame that is no multiple repeats its last rows and
    columns."""
    pads = [-side % BLOCK for side in frames.shape[1:3]]
    frames = np.pad(frames, ((0, 0), (0, pads[0]), (0, pads[1]), (0, 0)), mode="edge")
    count, height, width, channels = frames.shape
    tiles = frames.reshape(count, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return tiles.swapaxes(2, 3).reshape(-1, BLOCK * BLOCK, channels)


def _fit(
    colour: NDArray[np.float32], alpha: NDArray[np.float32], noise: float
) -> tuple[float, float]:
    """Mean log ratio of the models' residuals, C = F to C = a F; and how many blocks could tell
    them apart.

    colour: (N, P, 3), alpha: (N, P, 1), both in [0, 1]. Weighted by alpha, for what it hides is
    nobody's colour.
    """
    weight = alpha / alpha.sum(axis=1, keepdims=True)
    mean = (weight * colour).sum(axis=1, keepdims=True)
    straight = (weight * (colour - mean) ** 2).sum(axis=1).mean(axis=-1)
    mixed_colour = (weight * alpha * colour).sum(axis=1, keepdims=True) / (weight * alpha**2).sum(
        axis=1, keepdims=True
    )
    mixed = (weight * (colour - alpha * mixed_colour.clip(0, 1)) ** 2).sum(axis=1).mean(axis=-1)
    # A mixture's colour would vary as much as alpha does; what that is beside the noise is what a
    # block can tell.
    mean_alpha = (weight * alpha).sum(axis=1)[:, 0]
    spread = (weight * alpha**2).sum(axis=1)[:, 0] / mean_alpha**2 - 1
    signal = (mean[:, 0] ** 2).mean(axis=-1) * spread.clip(0)
    tells = signal / (signal + 4 * noise**2)
    ratio = np.log((straight + noise**2) / (mixed + noise**2)).clip(-3, 3)
    informative = float(tells.sum())
    return float((tells * ratio).sum() / (informative + 1)), informative


def _broken(
    colour: NDArray[np.float32], alpha: NDArray[np.float32], soft: NDArray[np.bool_], by: float
) -> float:
    """Share of blocks whose soft pixels are brighter than a mixture can be, C > a, on the mean over
    a block.

    The mean, because subsampled chroma and ringing cancel within a block, and straight colour does
    not.
    """
    count = soft.sum(axis=1)
    excess = (colour * soft[..., None]).sum(axis=1).max(axis=-1) - (alpha * soft).sum(axis=1)
    return float((excess / count > by).mean())
