import pytest

from tests.soak import soak


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xdist_group("runs")
def test_a_run_that_is_killed_three_times(tmp_path):
    """Once each: a data worker, itself, amid a checkpoint. `python -m tests.soak` does it twenty
    times."""
    counts = soak(tmp_path, kills=3, seed=1, steps=15, workers=1)
    assert counts["process"] == counts["checkpoint"] == counts["worker"] == 1
