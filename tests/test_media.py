"""The main job on real transparent clips: ingest, shard, train. ACETATE_MEDIA names their folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

MEDIA = Path(os.environ.get("ACETATE_MEDIA", ROOT.parent / "shared/media"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MEDIA.is_dir(), reason=f"no real clips at {MEDIA}; set ACETATE_MEDIA to a folder of them"),
]


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_real_clips_train(tmp_path):
    source = MEDIA / "pairs" if (MEDIA / "pairs").is_dir() else MEDIA
    run("-m", "data_prep.ingest", f"source='{source}'", f"out={tmp_path}/manifest.jsonl", "bad_clip_budget=1000000")
    run(
        "-m",
        "data_prep.shard",
        f"manifest={tmp_path}/manifest.jsonl",
        f"out={tmp_path}/shards",
        "max_side=96",
        "max_frames=9",
    )
    run(
        "train.py", "experiment=vae_rgba", f"data.shards={tmp_path}/shards", f"paths.outputs={tmp_path}/runs",
        "data.frames=5", "data.height=32", "data.width=32", "data.val_clips=1", "data.num_workers=0",
        "trainer.max_steps=4", "trainer.val_check_interval=4",
    )  # fmt: skip
    assert list(tmp_path.glob("runs/vae_rgba/*/panels/*/*.png"))
