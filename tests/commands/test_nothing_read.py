"""Runs that could not read a single clip."""

import pytest

from tests.processes import program
from tests.servers import serving

SMALL = [
    "experiment=vae_rgba", "data.frames=5", "data.height=16", "data.width=16", "data.batch_size=1",
    "data.num_workers=0", "data.val_clips=2", "data.remote.retries=0", "logger=null",
]  # fmt: skip


def broken(path, headers):
    return (500, {}, b"broken") if path.endswith(".tar") else None


def test_a_run_that_read_nothing_fails_and_saves_nothing(tmp_path, shards):
    with serving(shards, broken) as server:
        places = [f"paths.outputs={tmp_path}/out", f"paths.cache={tmp_path}/cache"]
        data = [f"data.shards={server.url}", *places]
        code, printed = program(tmp_path / "log", "train.py", *SMALL, *data, "trainer.max_steps=2")
        assert code == 1, printed[-2000:]
        assert f"no clip of {server.url} could be read, 2 failed" in printed
        assert "500" in printed and "Traceback" not in printed
        saved = [
            path for path in tmp_path.glob("out/**/*") if path.suffix in (".ckpt", ".safetensors")
        ]
        assert not saved
        assert not list(tmp_path.rglob("finished"))


@pytest.mark.long
@pytest.mark.slow
def test_an_evaluation_that_read_nothing_fails(tmp_path, shards):
    places = [f"paths.outputs={tmp_path}/out", f"paths.cache={tmp_path}/cache"]
    local = [*SMALL, *places, f"data.shards={shards}", "trainer.max_steps=1"]
    code, printed = program(tmp_path / "trained", "train.py", *local)
    assert code == 0, printed[-2000:]
    with serving(shards, broken) as server:
        run = [f"run={tmp_path}/out/vae_rgba", f"data.shards={server.url}"]
        code, printed = program(tmp_path / "log", "acetate.commands.evaluate", *run, *places)
    assert code == 1, printed[-2000:]
    assert f"no clip of {server.url} could be read" in printed and "Traceback" not in printed
    assert not list(tmp_path.rglob("evaluation*.json"))
