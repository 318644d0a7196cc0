import csv
import json

import pytest

from acetate.commands import inherited
from acetate.commands.evaluate import measure
from tests.compose import composed
from tests.processes import program

SMALL = [
    "data.frames=5",
    "data.height=16",
    "data.width=16",
    "data.batch_size=2",
    "data.num_workers=0",
]


def run(log, name, *arguments):
    code, printed = program(
        log, name, "experiment=vae_rgba", *SMALL, "data.val_clips=2", *arguments
    )
    assert code == 0, printed[-2000:]
    return printed


@pytest.mark.long
@pytest.mark.slow
def test_train_then_evaluate(tmp_path, shards):
    places = [f"paths.outputs={tmp_path}", f"data.shards={shards}", f"paths.cache={tmp_path}"]
    places.append("callbacks=ema")
    run(
        tmp_path / "trained",
        "train.py",
        *places,
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    )
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
    record = sorted(path.parent.rglob(".hydra/**/*"))
    before = path.read_bytes()
    for changed, name in (
        (["data.val_clips=1"], "evaluation_val_clips-1.json"),
        ([], "evaluation.json"),
    ):
        code, printed = program(tmp_path / f"{name}.log", "acetate.commands.evaluate",
            f"run={tmp_path}/vae_rgba",
                                f"paths.outputs={tmp_path}/elsewhere", *changed)  # fmt: skip
        assert code == 0, printed[-2000:]
        assert ("WARNING: not the data of" in printed) == bool(changed)
        assert (path.parent / name).is_file()
    assert path.read_bytes() == before  # the run's own settings give the run's own figures
    assert (
        sorted(path.parent.rglob(".hydra/**/*")) == record and not (tmp_path / "elsewhere").exists()
    )


@pytest.mark.slow
def test_a_dora_beside_the_base(tmp_path, cached):
    latents, adapters = cached
    arguments = [
        "experiment=dit_dora", f"paths.outputs={tmp_path}", f"data.latents={latents}",
        f"rgba_vae={adapters}",
        "task.rank=2", "data.batch_size=1", "data.num_workers=0", "callbacks.samples=null",
        "trainer.max_steps=2",
    ]  # fmt: skip
    code, printed = program(tmp_path / "a", "train.py", *arguments, "trainer.val_check_interval=2")
    assert code == 0, printed[-2000:]
    code, printed = program(tmp_path / "b", "acetate.commands.evaluate", f"run={tmp_path}/dit_dora")
    assert code == 0, printed[-2000:]
    (path,) = tmp_path.glob("dit_dora/*/evaluation.json")
    rows = json.loads(path.read_text())
    assert list(rows) == ["base DiT, without DoRA", "DoRA, last.ckpt"]
    with (path.parent / "metrics.csv").open() as file:
        (logged,) = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert rows["DoRA, last.ckpt"]["loss"] == pytest.approx(logged, rel=1e-6)
    assert rows["base DiT, without DoRA"]["loss"] != rows["DoRA, last.ckpt"]["loss"]
    shared = composed(path.parent, *arguments, "task.context_parallel=2")  # of several ranks
    again, _ = measure(shared, None)
    assert again["base DiT, without DoRA"]["loss"] == pytest.approx(
        rows["base DiT, without DoRA"]["loss"], rel=1e-6
    )


def test_help_and_errors(tmp_path):
    code, printed = program(tmp_path / "a", "acetate.commands.evaluate", "--help")
    assert code == 0
    assert "acetate evaluate run=outputs/mine" in printed
    code, printed = program(tmp_path / "none", "acetate.commands.evaluate", "run=none")
    assert code != 0
    assert "run=none: no run there" in printed


def test_a_run_knows_its_checkpoint():
    with pytest.raises(ValueError, match="run=x and resume=last are both given"):
        inherited.evaluate(["run=x", "resume=last"])
