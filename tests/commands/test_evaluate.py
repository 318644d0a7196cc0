import csv
import json

import pytest

from tests.processes import program

SMALL = ["data.frames=5", "data.height=16", "data.width=16", "data.batch_size=2", "data.num_workers=0"]


def run(log, name, *arguments):
    code, printed = program(log, name, "experiment=vae_rgba", *SMALL, "data.val_clips=2", *arguments)
    assert code == 0, printed[-2000:]
    return printed


@pytest.mark.slow
def test_train_then_evaluate(tmp_path, shards):
    places = [f"paths.outputs={tmp_path}", f"data.shards={shards}", f"paths.cache={tmp_path}"]
    places.append("callbacks=ema")
    run(tmp_path / "trained", "train.py", *places, "trainer.max_steps=2", "trainer.val_check_interval=2")
    printed = run(tmp_path / "evaluated", "acetate.commands.evaluate", *places, "resume=last")
    (path,) = tmp_path.glob("vae_rgba/*/evaluation.json")
    rows = json.loads(path.read_text())
    assert list(rows) == ["base VAE, plain RGB", "RGBA-VAE, step 0", "RGBA-VAE, last.ckpt, average"]
    assert all(row["rgb/psnr"] > 0 and 0 <= row["alpha/mae"] <= 1 for row in rows.values())
    with (path.parent / "metrics.csv").open() as file:
        (logged,) = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert rows["RGBA-VAE, last.ckpt, average"]["loss"] == pytest.approx(logged, rel=1e-6)
    assert str(path.parent / "panels") in printed
    assert list(path.parent.glob("panels/*/*.png"))
