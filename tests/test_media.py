"""The main job on real transparent clips: ingest, shard, train. ACETATE_MEDIA names their
folder."""

import os
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.processes import program

MEDIA = Path(os.environ.get("ACETATE_MEDIA", ROOT.parent / "shared/media"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MEDIA.is_dir(),
        reason=f"no real clips at {MEDIA}; set ACETATE_MEDIA to a folder of them",
    ),
]


@pytest.mark.long
def test_real_clips_train(tmp_path):
    def run(name, *arguments):
        code, printed = program(tmp_path / "log", name, *arguments)
        assert code == 0, printed[-2000:]

    source = MEDIA / "pairs" if (MEDIA / "pairs").is_dir() else MEDIA
    manifest, shards = tmp_path / "manifest.jsonl", tmp_path / "shards"
    run("data_prep.ingest", f"source='{source}'", f"out={manifest}", "bad_clip_budget=1000000")
    run("data_prep.shard", f"manifest={manifest}", f"out={shards}", "max_side=96", "max_frames=9")
    run(
        "train.py", "experiment=vae_rgba", f"data.shards={shards}",
        f"paths.outputs={tmp_path}/runs",
        "data.frames=5", "data.height=32", "data.width=32", "data.val_clips=1",
        "data.num_workers=0",
        "trainer.max_steps=4", "trainer.val_check_interval=4",
    )  # fmt: skip
    assert list(tmp_path.glob("runs/vae_rgba/*/panels/*/*.png"))
