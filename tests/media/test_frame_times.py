import numpy as np
import pytest

from acetate.media.clip import MediaError
from acetate.media.frame_times import constant_rate, delays_as_shown


def rate(delays, tick=0.001, end=True, limit=1000):
    times = np.cumsum([0.0, *delays])
    return constant_rate("a.webp", times[:-1], times[-1] if end else None, tick, limit)


@pytest.mark.parametrize(
    "delays", [[0.041, 0.042, 0.042] * 4, [0.033, 0.033, 0.034] * 5, [0.1] * 3, [0.016, 0.017] * 9]
)
def test_a_rounding_clock_is_a_constant_rate(delays):
    found = rate(delays)
    assert found.note is None and found.fps == pytest.approx(len(delays) / sum(delays))
    assert found.indices.tolist() == list(range(len(delays)))


def test_long_frames_repeat_and_short_ones_go():
    found = rate([0.1, 0.1, 0.3, 0.02, 0.1, 0.08])
    assert found.fps == pytest.approx(10)
    # 0.7 s; frame 3 is never shown in a middle
    assert found.indices.tolist() == [0, 1, 2, 2, 2, 4, 5]
    assert "20 to 300 ms" in found.note and "6 frames became 7, 1 dropped" in found.note


def test_equally_common_delays_keep_the_shorter():
    assert rate([0.1, 0.05, 0.1, 0.05]).indices.tolist() == [0, 0, 1, 2, 2, 3]


def test_a_missing_frame_is_repeated():
    starts = np.array([0, 1, 2, 4, 5]) / 30
    found = constant_rate("a.mp4", starts, None, 1e-4, 100)
    assert found.fps == pytest.approx(30) and found.indices.tolist() == [0, 1, 2, 2, 3, 4]


def test_absurd_durations_are_refused_before_frames_are_made():
    with pytest.raises(
        MediaError, match=r"a\.webp: its frames last up to 3\.6e\+06 s.*max_frames=1000"
    ):
        rate([0.04, 0.04, 3.6e6])


def test_one_frame_and_browsers_shortest_delay():
    assert rate([0.5]).fps == 2
    assert delays_as_shown([0, 10, 11, 40]) == [100, 100, 11, 40]
