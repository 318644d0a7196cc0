import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from acetate.draws import ClipDraws, generator_for, stable_hash

CPU = torch.device("cpu")


def test_stable_hash_stays_what_it_is():
    """Another value would re-split data sets and redraw every resumed run."""
    assert stable_hash("train", 3, "clip-7") == 1775004395198388325


def test_stable_hash_keeps_parts_apart():
    different = [(), ("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), (1, 23), (12, 3), (123,)]
    hashes = {stable_hash(*parts) for parts in different}
    assert len(hashes) == len(different)
    assert all(0 <= value < 2**63 for value in hashes)


def test_stable_hash_is_the_same_in_another_process():
    """Python's own hash() of a string is not."""
    code = "from acetate.draws import stable_hash; print(stable_hash(0, 'train', 'clip'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert int(result.stdout) == stable_hash(0, "train", "clip")


def test_generator_repeats():
    first, second = (torch.randn(4, generator=generator_for(0, "val", "a")) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    other = torch.randn(4, generator=generator_for(1, "val", "a"))
    assert not torch.equal(first, other)


def draw(keys, *parts):
    draws = ClipDraws(keys, *parts, device=CPU)
    return draws.integers(1000), draws.normal((2, 3)), draws.integers(8)


def test_a_clip_draws_the_same_in_any_batch():
    together = draw(["a", "b", "c"], 0, "train", 5)
    reordered = draw(["c", "a"], 0, "train", 5)
    for whole, part in zip(together, reordered, strict=True):
        assert_close(part, whole[[2, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("parts", [(1, "train", 5), (0, "val", 5), (0, "train", 6)])
def test_seed_purpose_and_step_all_count(parts):
    _, noise, _ = draw(["a", "b"], 0, "train", 5)
    _, other, _ = draw(["a", "b"], *parts)
    assert (noise != other).all()


def test_clips_and_successive_draws_differ():
    draws = ClipDraws(["a", "b"], 0, device=CPU)
    first, second = draws.normal((4,)), draws.normal((4,))
    assert (first[0] != first[1]).all()
    assert (first != second).all()


def test_shapes_types_and_ranges():
    keys = [f"clip-{i}" for i in range(400)]
    draws = ClipDraws(keys, 0, device=CPU)
    integers, normal = draws.integers(8), draws.normal((16, 2))
    assert integers.shape == (400,)
    assert integers.dtype == torch.int64
    assert sorted(integers.unique().tolist()) == list(range(8))
    assert normal.shape == (400, 16, 2)
    assert normal.dtype == torch.float32
    # 12,800 draws: the standard error of the mean is 0.009, that of the standard deviation 0.006
    assert abs(normal.mean()) < 0.04
    assert abs(normal.std() - 1) < 0.03


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    draw(["a"], 0)
    assert_close(torch.randn(3), expected, rtol=0, atol=0)
