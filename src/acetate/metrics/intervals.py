"""Says how sure a figure of several clips is, by the interval of a bootstrap."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

RESAMPLES = 1000


def interval(
    count: int, value: Callable[..., float], method: str = "percentile"
) -> tuple[float, float]:
    """Returns 95 % of the bootstrap over `count` clips; value: of the places of clips. The same for
    the same clips.

    method: percentile for means. `basic` for a Frechet distance, which grows where clips are drawn
    twice, with a fourth of the draws.
    """
    resamples = RESAMPLES if method == "percentile" else RESAMPLES // 4
    return _drawn(count, value, method, resamples, vectorized=False)


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns the mean of a value of each clip and the 95 % of its bootstrap; of one clip there is
    none, NaN."""
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")

    def mean_at(places: NDArray[np.intp], axis: int = -1) -> NDArray[np.float64]:
        return values[places].mean(axis)

    return float(values.mean()), *_drawn(len(values), mean_at, "percentile", RESAMPLES, True)


def _drawn(
    count: int, value: Callable[..., float], method: str, resamples: int, vectorized: bool
) -> tuple[float, float]:
    found = bootstrap(
        (np.arange(count),), value, n_resamples=resamples, vectorized=vectorized, method=method,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
