"""What measuring clips costs."""

import json

import pytest

from acetate.commands.benchmark_evaluate import EvaluateLoad
from tests.compose import called


def test_clips_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"evaluate\.clips=1; must be at least 2"):
        EvaluateLoad(clips=1, frames=9, size=64, seed=0)


@pytest.mark.long
@pytest.mark.slow
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ("evaluate.clips=3", "evaluate.frames=5", "evaluate.size=64")
    called("benchmark", "parts=[evaluate]", "out=cost.json", *small)
    results = json.loads((tmp_path / "cost.json").read_text())["evaluate"]
    assert results["few"]["frames"] == 10 and results["all"]["frames"] == 15
    for one in (results["few"], results["all"]):
        assert 0 < one["decoding"] < one["metrics"] < 1 and one["seconds"] > 0
        assert 2**28 < one["peak_memory"] < 2**31
    assert "core s/frame" in capsys.readouterr().out
