"""Frames that are shown for unequal times become a clip of constant rate."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from acetate.media.clip import MediaError

# ms: browsers show frames with no more than this for 100 ms, which their authors see
SHORTEST_DELAY = 10
SHOWN_INSTEAD = 100


class Rate(NamedTuple):
    """indices: which frame stands at each place of the clip. note: what was changed, if
    anything."""

    fps: float
    indices: NDArray[np.intp]
    note: str | None


def delays_as_shown(delays: list[float]) -> list[float]:
    """Returns the delays of an animated image, in ms, as browsers show them."""
    return [SHOWN_INSTEAD if delay <= SHORTEST_DELAY else delay for delay in delays]


def constant_rate(
    name: object, starts: NDArray[np.float64], end: float | None, tick: float, max_frames: int
) -> Rate:
    """Finds a constant rate. starts: when each frame appears, increasing; end: of the last one,
    where the file says; tick: its clock, seconds.

    Times that a constant rate explains but for the clock's rounding are left as they are. Otherwise
    the most common delay (of equally common ones the shortest) is the new clip's, and each of its
    frames is the one that is shown in the middle of that time: longer ones repeat, shorter ones may
    go. Raises MediaError, which names the file, past max_frames.
    """
    if len(starts) == 1:
        return Rate(
            1 / (end - starts[0]) if end is not None and end > starts[0] else 1.0,
            np.arange(1),
            None,
        )
    delays = np.diff(starts)
    usual = most_common(delays if end is None else np.append(delays, end - starts[-1]), tick)
    end = starts[-1] + usual if end is None else end
    mean = (end - starts[0]) / len(starts)
    if np.abs(starts - starts[0] - np.arange(len(starts)) * mean).max() <= 1.5 * tick:
        return Rate(1 / mean, np.arange(len(starts)), None)
    count = max(1, round((end - starts[0]) / usual))
    if count > max_frames:
        raise MediaError(
            f"{name}: its frames last up to {max(delays.max(), end - starts[-1]):.3g} s, most of "
            f"them {usual:.3g} s: {count} frames at a constant rate; a clip has at most "
            f"max_frames={max_frames}. Cut it or raise max_frames"
        )
    middles = starts[0] + (np.arange(count) + 0.5) * usual
    indices = np.searchsorted(starts, middles, side="right") - 1
    kept = len(np.unique(indices))
    note = (
        f"frames shown for {1000 * delays.min():.0f} to "
        f"{1000 * max(delays.max(), end - starts[-1]):.0f} ms, resampled to the most common, "
        f"{1000 * usual:.3g} ms: {len(starts)} frames became {count}, {len(starts) - kept} dropped"
    )
    return Rate(1 / usual, indices, note)


def most_common(delays: NDArray[np.float64], tick: float) -> float:
    """Returns the mean of those that round to the most common number of ticks or its neighbours."""
    ticks = np.rint(delays / tick)
    values, counts = np.unique(ticks, return_counts=True)
    mode = values[counts.argmax()]
    # clocks round 33.3 to 33 and 34
    near = np.abs(ticks - mode) <= 1 if mode > 10 else ticks == mode
    return max(float(delays[near].mean()), tick)
