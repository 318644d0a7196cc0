import pytest

from tests.soak import soak


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xdist_group("runs")
def test_a_run_that_is_killed_three_times(tmp_path):
    """Once each: a data worker, itself, amid a checkpoint. `python -m tests.soak` does it twenty
    times."""
    counts = soak(tmp_path, kills=3, seed=1, steps=15, workers=1)
    # on a busy machine a run may have no worker left when its turn comes: it is killed itself
    assert counts["checkpoint"] == 1 and counts["process"] + counts["worker"] == 2
