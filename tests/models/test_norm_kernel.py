"""The kernel as Triton's interpreter runs it on a CPU; tests/gpu/test_norm.py asks a card."""

import json
import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

triton = pytest.importorskip("triton")


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


@pytest.mark.slow
@pytest.mark.parametrize("channels", [96, 384])
def test_it_compiles_for_a_card(channels):
    """For an H100, which need not be there; memory is read and written 16 bytes at a time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from acetate.models.norm_kernel import VALUES, _backward, _forward

    columns = triton.next_power_of_2(channels)
    sizes = {"C": channels, "ROWS": VALUES // columns, "COLUMNS": columns}
    for kernel, tensors in ((_forward, ["y"]), (_backward, ["dy", "dx", "sums"])):
        types = {name: "*fp32" if name == "sums" else "*bf16" for name in ("x", "gamma", *tensors)}
        types |= dict.fromkeys(("rows", "clip", "zeros"), "i32") | {"scale": "fp32"}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types) - 1)}
        source = ASTSource(kernel, types | dict.fromkeys(sizes, "constexpr"), sizes, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "ld.global.v4.b32" in made and "st.global.v4.b32" in made
