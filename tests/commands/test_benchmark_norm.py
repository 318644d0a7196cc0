import json

import pytest

from acetate.commands.benchmark_norm import measures
from tests.commands.test_benchmark import load, run
from tests.fake_gpu import fake_gpu


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(parts="[norm]", out="speed.json", **{"ceilings.repeats": 1})
    rows = json.loads((tmp_path / "speed.json").read_text())["norm"]["rows"]
    assert [row["shape"] for row in rows[::2]] == [[1, 4, 9, 16, 16], [1, 8, 9, 8, 8]]
    assert {(row["way"], row["direction"]) for row in rows} == {
        ("plain", "forward"), ("plain", "backward"),
    }  # fmt: skip
    assert "norm and SiLU" in capsys.readouterr().out and min(row["rate"] for row in rows) > 0


def test_on_a_card_ways_read_and_write_the_same():
    """On a fake one, where the kernel has shapes and layouts alone."""
    pytest.importorskip("triton")
    workload = load(precision="bfloat16")
    object.__setattr__(workload, "device", "cuda")
    with fake_gpu():
        found = []
        for way in ("plain", "kernel"):
            for direction, nbytes, call in measures(way, (1, 6, 3, 4, 4), workload):
                for made in call():  # the fake backward pass returns nothing
                    found.append((made.shape, made.stride(), made.dtype, made.device))
                found.append((direction, nbytes))
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert found[1:half] == [("forward", 2 * 6 * 4 * 4 * (3 + 5)), ("backward", 2 * 6 * 4 * 4 * 9)]
