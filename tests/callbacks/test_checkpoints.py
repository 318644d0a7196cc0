import csv
import json
import os

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from acetate.callbacks.checkpoints import AdapterCheckpoint, StepCheckpoint
from acetate.callbacks.metrics_file import MetricsFile
from acetate.formats.training import WholeCheckpointIO
from acetate.models.adapters import read_adapter_file
from acetate.models.wan import replace_folder
from acetate.replacing import unwritten, write_tensors
from acetate.steps import StepTrainer


class Pull(LightningModule):
    """A weight that a linear loss pulls along."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.log("loss", -self.weight.sum())
        return {"loss": -self.weight.sum()}

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.trainer.global_step)
        self.log("value", self.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)

    def adapter_metadata(self):
        return {}


class Killed(Pull):
    """In the middle of a validation."""

    def validation_step(self, batch, batch_idx):
        raise InterruptedError


def fit(
    root,
    steps,
    *,
    resume=None,
    every=2,
    module=None,
    checkpoint=StepCheckpoint,
    loggers=(),
    kept=None,
    **settings,
):
    module = module or Pull()
    saves = checkpoint(
        dirpath=root, filename="{step}", save_last=True, every_n_train_steps=every,
        enable_version_counter=False, **{"save_top_k": -1, **(kept or {})},
    )  # fmt: skip
    trainer = StepTrainer(
        max_steps=steps, max_epochs=-1, callbacks=[saves], logger=[MetricsFile(str(root)),
        *loggers],
        default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=1,
        check_val_every_n_epoch=None, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(100)), DataLoader(torch.zeros(1)), ckpt_path=resume)
    return module


def steps_saved(root):
    return {
        path.name: torch.load(path, weights_only=True)["global_step"]
        for path in root.glob("*.ckpt")
    }


def test_checkpoints_fall_on_optimizer_steps_also_after_resume(tmp_path):
    fit(tmp_path, 2, accumulate_grad_batches=3, val_check_interval=50)
    before = (tmp_path / "last.ckpt").stat().st_mtime_ns
    fit(
        tmp_path,
        3,
        accumulate_grad_batches=3,
        resume=str(tmp_path / "last.ckpt"),
        every=2,
        val_check_interval=50,
    )
    # not again, amid the window of step 3
    assert (tmp_path / "step=2.ckpt").stat().st_mtime_ns < before
    assert steps_saved(tmp_path) == {"step=2.ckpt": 2, "step=3.ckpt": 3, "last.ckpt": 3}


def test_the_last_step_is_saved(tmp_path):
    fit(tmp_path, 5, every=4, val_check_interval=50)
    assert steps_saved(tmp_path) == {"step=4.ckpt": 4, "step=5.ckpt": 5, "last.ckpt": 5}
    assert (
        fit(
            tmp_path, 7, every=4, val_check_interval=50, resume=str(tmp_path / "last.ckpt")
        ).weight.item()
        == 7
    )


def test_a_resumed_run_begins_with_the_validation_that_was_due(tmp_path):
    assert fit(tmp_path, 6, val_check_interval=3).validated == [3, 6]
    fresh = tmp_path / "fresh"
    for step, expected in ((2, [3, 6]), (4, [6]), (6, [6])):
        module = fit(fresh, 7, val_check_interval=3, resume=str(tmp_path / f"step={step}.ckpt"))
        assert module.validated == expected


def logged(root):
    with (root / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_that_goes_on_from_its_last_step_has_all_its_rows(tmp_path):
    """Killed in the validation after it, or ended as it should."""
    fit(tmp_path / "whole", 4, val_check_interval=2)
    whole = logged(tmp_path / "whole")
    assert [row["value"] for row in whole if row["value"]] == ["2.0", "4.0"]
    board = TensorBoardLogger(tmp_path, name="", version="board")
    with pytest.raises(InterruptedError):
        fit(tmp_path / "parts", 4, val_check_interval=4, module=Killed())
    assert len(logged(tmp_path / "parts")) == 4
    for root, expected in (
        ("parts", [row for row in whole if row["value"] != "2.0"]),
        ("whole", whole),
    ):
        last = str(tmp_path / root / "last.ckpt")
        module = fit(tmp_path / root, 4, val_check_interval=2, resume=last, loggers=[board])
        assert module.validated == [4] and module.weight.item() == 4
        assert logged(tmp_path / root) == expected
        events = EventAccumulator(str(tmp_path / "board")).Reload()
        assert [(event.step, event.value) for event in events.Scalars("value")] == [(4, 4)] * (
            1 + (root == "whole")
        )


def test_leftovers_of_killed_writers_go(tmp_path):
    (tmp_path / ".last.ckpt.123.tmp").write_text("half of it")
    fit(tmp_path, 2, val_check_interval=50)
    assert not list(tmp_path.glob(".*"))


def test_adapters_that_cannot_be_written_leave_the_previous_checkpoint(tmp_path):
    fit(tmp_path, 1, val_check_interval=50, checkpoint=AdapterCheckpoint)
    (tmp_path / "step=2.safetensors").mkdir()  # which a file cannot be renamed to
    with pytest.raises(OSError, match=r"step=2\.safetensors could not be written .* resume=last"):
        fit(
            tmp_path,
            2,
            val_check_interval=50,
            checkpoint=AdapterCheckpoint,
            resume=str(tmp_path / "last.ckpt"),
        )
    assert steps_saved(tmp_path) == {"step=1.ckpt": 1, "last.ckpt": 1}
    assert not list(tmp_path.glob(".*.tmp"))


class Curve(Pull):
    """Whose validations measure `values`, by the step."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        self.log("val/mae", torch.tensor(self.values[self.trainer.global_step]))


CURVE = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.0}


def curve(root, steps, mode="min", checkpoint=AdapterCheckpoint, best="val/mae", **settings):
    kept = {"best": best, "best_mode": mode}
    fit(
        root,
        steps,
        module=Curve(CURVE),
        kept=kept,
        checkpoint=checkpoint,
        val_check_interval=1,
        **settings,
    )


def best(root):
    facts = json.loads((root / "best.json").read_text())
    for name in ("ckpt", "safetensors"):
        of_step = {
            "ckpt": lambda path: torch.load(path, weights_only=True)["state_dict"]["weight"],
            "safetensors": lambda path: read_adapter_file(path)[0]["weight"],
        }[name](root / f"best.{name}")
        assert of_step.item() == facts["step"]  # its weight is the number of steps
    assert read_adapter_file(root / "best.safetensors")[1]["best"] == facts
    return facts["step"], facts["value"], facts["mode"]


def test_best_is_the_step_that_was_measured(tmp_path):
    """Also of a run that was ended after a validation, or after its checkpoint, and goes on."""
    curve(tmp_path / "whole", 5)
    assert best(tmp_path / "whole") == (2, 1.0, "min")
    curve(tmp_path / "largest", 5, "max")
    assert best(tmp_path / "largest") == (1, 3.0, "max")
    for steps in (1, 2, 3, 4, 5):
        last = tmp_path / "parts/last.ckpt"
        curve(tmp_path / "parts", steps, resume=str(last) if steps > 1 else None)
    assert best(tmp_path / "parts") == (2, 1.0, "min")
    (tmp_path / "parts/best.json").unlink()  # as killed before it was written
    curve(tmp_path / "parts", 5, resume=str(tmp_path / "parts/last.ckpt"))
    assert best(tmp_path / "parts") == (5, 1.0, "min")


def test_what_no_validation_measures_cannot_be_best(tmp_path):
    with pytest.raises(
        ValueError, match="objective=val/mea is not what a validation measures: val/mae"
    ):
        curve(tmp_path, 1, best="val/mea")


def test_monitored_checkpoints_are_of_the_step_that_was_measured(tmp_path):
    fit(
        tmp_path, 5, module=Curve(CURVE), val_check_interval=1,
        kept={"monitor": "val/mae", "save_top_k": 2},
    )  # fmt: skip
    assert steps_saved(tmp_path) == {"step=2.ckpt": 2, "step=5.ckpt": 5, "last.ckpt": 5}


def test_a_checkpoint_comes_before_each_validation_in_optimizer_steps(tmp_path):
    module = fit(tmp_path, 5, every=4, accumulate_grad_batches=3, val_check_interval=3)
    assert module.validated == [3]
    assert steps_saved(tmp_path) == {
        "step=3.ckpt": 3,
        "step=4.ckpt": 4,
        "step=5.ckpt": 5,
        "last.ckpt": 5,
    }
    steps = [(row["step"], bool(row["value"])) for row in logged(tmp_path)]
    assert steps == [
        ("1", False),
        ("2", False),
        ("3", False),
        ("3", True),
        ("4", False),
        ("5", False),
    ]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        curve(tmp_path / "run", 2, plugins=[WholeCheckpointIO()])
        replace_folder(
            tmp_path / "export", lambda folder: save_file({}, f"{folder}/model.safetensors")
        )
    finally:
        os.umask(before)
    paths = [path for folder in ("run", "export") for path in (tmp_path / folder).rglob("*")]
    assert len(paths) > 8
    assert {path.name: path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {
        path.name: 0o666 & ~umask for path in paths if path.is_file()
    }
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o777 & ~umask


def test_equal_adapters_are_equal_bytes(tmp_path):
    metadata = {f"name {number}": json.dumps(f'"é{number}') for number in range(20)}
    for name in ("a", "b"):
        write_tensors({"x": torch.arange(3.0), "y": torch.ones(2)}, tmp_path / name, metadata)
        metadata = dict(reversed(metadata.items()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    state, facts = read_adapter_file(tmp_path / "a")
    assert torch.equal(state["x"], torch.arange(3.0)) and facts == {
        k: json.loads(v) for k, v in metadata.items()
    }


def test_the_first_checkpoint_that_cannot_be_written(tmp_path):
    with pytest.raises(
        OSError,
        match=r"last\.ckpt could not be written .* no earlier checkpoint: make room and start",
    ):
        raise unwritten(tmp_path / "last.ckpt", OSError("No space left"))
