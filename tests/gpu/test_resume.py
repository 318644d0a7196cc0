"""A run that stops and goes on, on a GPU: bit for bit the run that did not stop where
trainer.deterministic=true, and nearly so without it."""

import pytest

from tests.gpu.training import EXACT, losses
from tests.test_resume import assert_same_run

pytestmark = pytest.mark.gpu
# Of losses: sums by atomic additions come in any order, and rounding to bf16 makes that visible
NEARLY = 2e-3


def in_one_go_and_in_two(train, folder, *settings):
    whole = train(folder / "whole", *settings)
    train(folder / "parts", "trainer.max_steps=3", *settings)
    return whole, train(folder / "parts", "resume=last", *settings)


def check_exact(train, folder) -> None:
    assert_same_run(*in_one_go_and_in_two(train, folder, EXACT))


def check_nearly(train, folder) -> None:
    whole, parts = map(losses, in_one_go_and_in_two(train, folder))
    assert len(whole) == 6
    assert parts == pytest.approx(whole, rel=NEARLY)


def test_deterministic_runs_go_on_bit_for_bit(train, tmp_path):
    check_exact(train, tmp_path)


def test_other_runs_go_on_with_nearly_the_same_losses(train, tmp_path):
    check_nearly(train, tmp_path)
