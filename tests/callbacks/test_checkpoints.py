import csv

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from acetate.callbacks.checkpoints import AdapterCheckpoint, StepCheckpoint
from acetate.callbacks.metrics_file import MetricsFile


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


def fit(root, steps, *, resume=None, every=2, module=None, checkpoint=StepCheckpoint, loggers=(), **settings):
    module = module or Pull()
    saves = checkpoint(
        dirpath=root, filename="{step}", save_last=True, every_n_train_steps=every, save_top_k=-1,
        enable_version_counter=False,
    )  # fmt: skip
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[saves], logger=[MetricsFile(str(root)), *loggers],
        default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
        check_val_every_n_epoch=None, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(100)), DataLoader(torch.zeros(1)), ckpt_path=resume)
    return module


def steps_saved(root):
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in root.glob("*.ckpt")}


def test_checkpoints_fall_on_optimizer_steps_also_after_resume(tmp_path):
    fit(tmp_path, 2, accumulate_grad_batches=3, val_check_interval=50)
    before = (tmp_path / "last.ckpt").stat().st_mtime_ns
    fit(tmp_path, 3, accumulate_grad_batches=3, resume=str(tmp_path / "last.ckpt"), every=2, val_check_interval=50)
    assert (tmp_path / "step=2.ckpt").stat().st_mtime_ns < before  # not again, amid the window of step 3
    assert steps_saved(tmp_path) == {"step=2.ckpt": 2, "step=3.ckpt": 3, "last.ckpt": 3}


def test_the_last_step_is_saved(tmp_path):
    fit(tmp_path, 5, every=4, val_check_interval=50)
    assert steps_saved(tmp_path) == {"step=4.ckpt": 4, "step=5.ckpt": 5, "last.ckpt": 5}
    assert fit(tmp_path, 7, every=4, val_check_interval=50, resume=str(tmp_path / "last.ckpt")).weight.item() == 7


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
    for root, expected in (("parts", [row for row in whole if row["value"] != "2.0"]), ("whole", whole)):
        last = str(tmp_path / root / "last.ckpt")
        module = fit(tmp_path / root, 4, val_check_interval=2, resume=last, loggers=[board])
        assert module.validated == [4] and module.weight.item() == 4
        assert logged(tmp_path / root) == expected
        events = EventAccumulator(str(tmp_path / "board")).Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")][-1:] == [(3, -3)]  # of the saved step


def test_leftovers_of_killed_writers_go(tmp_path):
    (tmp_path / ".last.ckpt.123.tmp").write_text("half of it")
    fit(tmp_path, 2, val_check_interval=50)
    assert not list(tmp_path.glob(".*"))


def test_adapters_that_cannot_be_written_leave_the_previous_checkpoint(tmp_path):
    fit(tmp_path, 1, val_check_interval=50, checkpoint=AdapterCheckpoint)
    (tmp_path / "step=2.safetensors").mkdir()  # which a file cannot be renamed to
    with pytest.raises(OSError, match=r"step=2\.safetensors could not be written .* resume=last"):
        fit(tmp_path, 2, val_check_interval=50, checkpoint=AdapterCheckpoint, resume=str(tmp_path / "last.ckpt"))
    assert steps_saved(tmp_path) == {"step=1.ckpt": 1, "last.ckpt": 1}
    assert not list(tmp_path.glob(".*.tmp"))
