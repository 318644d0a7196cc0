"""What measuring clips costs."""

import json

import pytest

from tests.compose import called


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
