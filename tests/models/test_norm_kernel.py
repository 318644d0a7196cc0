"""The kernel as Triton's interpreter runs it on a CPU; tests/gpu/test_norm.py asks a card."""

import json
import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.long
def test_the_kernel_is_the_norm():
    """In a process of its own, since Triton decides when a kernel is declared who runs it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    program = [sys.executable, "-m", "tests.models.norm_cases"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    from tests.models.norm_cases import CASES, check_errors

    for case, errors in zip(CASES, found["errors"], strict=True):
        check_errors(case, errors)
    assert found["agreement"]["gradients"] == 185
    assert found["agreement"]["gradient"] > 0  # or both steps ran without it
