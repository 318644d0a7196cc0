"""Each private part of Lightning that is used, by the plain name that it has here; and that no
other file uses one."""

import ast
import signal

import pytest
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from acetate import lightning_seams as seams
from acetate.formats.training import ShardedStrategy
from acetate.steps import StepTrainer
from tests.paths import ROOT
from tests.processes import launch


class Rows(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


class Task(LightningModule):
    """Two batches a step; notes what the seams say in each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.due, self.numbers, self.done, self.validated = [], [], [], 0

    def training_step(self, batch, batch_idx):
        self.due.append(seams.step_is_due(self.trainer))
        self.numbers.append(seams.batch_number(self.trainer))
        self.done.append(seams.batches_done(self.trainer))
        self.log("loss", self.weight.sum())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)


class AtEnds(Callback):
    """Calls a function of the trainer when training starts, and another after every batch."""

    def __init__(self, start=lambda trainer: None, batch=lambda trainer: None):
        self.start, self.batch = start, batch

    def on_train_start(self, trainer, pl_module):
        self.start(trainer)

    def on_train_batch_end(self, trainer, *arguments):
        self.batch(trainer)


def fit(folder, *callbacks, validation=True, logger=False, **settings):
    task = Task()
    settings = {"max_steps": 2, "max_epochs": -1, "val_check_interval": 100, **settings}
    trainer = StepTrainer(
        callbacks=list(callbacks), logger=logger, default_root_dir=folder, accelerator="cpu",
        log_every_n_steps=1,
        accumulate_grad_batches=2, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c,
        ModelCheckpoint) for c in callbacks),
        **settings,
    )  # fmt: skip
    loaders = (DataLoader(torch.zeros(3)), DataLoader(torch.zeros(1)) if validation else None)
    trainer.fit(task, *loaders)
    return trainer, task


def test_step_is_due_batch_number_and_batches_done(tmp_path):
    """Over an epoch of three batches, whose end is amid a step."""
    after = []
    _, task = fit(tmp_path, AtEnds(batch=lambda trainer: after.append(seams.step_is_due(trainer))))
    assert task.due[:2] == after[:2] == [False, True]
    assert task.numbers == task.done == list(range(len(task.numbers)))


def test_validates(tmp_path):
    said = []
    fit(tmp_path, AtEnds(batch=lambda trainer: said.append(seams.validates(trainer))))
    assert all(said)
    said.clear()
    fit(
        tmp_path,
        AtEnds(batch=lambda trainer: said.append(seams.validates(trainer))),
        validation=False,
    )
    assert not any(said)


def test_clip_fused(tmp_path, monkeypatch):
    def fused(task):
        optimizer = torch.optim.AdamW([task.weight], lr=1.0, fused=True)
        seams.clip_fused(optimizer)
        return optimizer

    monkeypatch.setattr(Task, "configure_optimizers", fused)
    _, task = fit(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert task.weight.item() < -1


def test_validate_now(tmp_path):
    _, task = fit(tmp_path, AtEnds(start=seams.validate_now))
    assert task.validated == 1 and task.due  # and training went on


def test_has_trainer(tmp_path):
    assert not seams.has_trainer(Task())
    assert seams.has_trainer(fit(tmp_path)[1])


def test_log_row_and_log_step(tmp_path):
    rows = Rows()
    fit(
        tmp_path,
        AtEnds(start=lambda trainer: seams.log_row(trainer, {"x": 1.0}), batch=seams.log_step),
        logger=rows,
    )
    (step, first), *steps = rows.rows
    assert (step, first["x"]) == (0, 1.0)
    assert [step for step, _ in steps] == [1, 2]
    assert all({"loss", "lr-SGD", "epoch"} <= row.keys() for _, row in steps)


def test_replaces_samplers():
    assert seams.replaces_samplers(Trainer(logger=False, accelerator="cpu"))
    assert not seams.replaces_samplers(
        Trainer(logger=False, accelerator="cpu", use_distributed_sampler=False)
    )


def test_leave_signals_alone(tmp_path):
    def mine(*_):
        raise AssertionError

    class Listens(Callback):
        def setup(self, trainer, pl_module, stage):
            seams.leave_signals_alone(trainer)
            signal.signal(signal.SIGTERM, mine)

    during, before = [], signal.getsignal(signal.SIGTERM)
    fit(
        tmp_path,
        Listens(),
        AtEnds(start=lambda trainer: during.append(signal.getsignal(signal.SIGTERM))),
    )
    assert during == [mine]
    assert signal.getsignal(signal.SIGTERM) is before


def test_set_ddp():
    strategy = DDPStrategy()
    seams.set_ddp(strategy, broadcast_buffers=False)
    assert strategy._ddp_kwargs["broadcast_buffers"] is False


def left_out():
    """On each rank: a module whose two weights are the rank's number, one of them left to it."""
    module = nn.ParameterDict({name: torch.full((1,), float(dist.get_rank())) for name in "ab"})
    seams.leave_out_of_ddp(module, ["b"])
    wrapped = DistributedDataParallel(module)
    return [float(wrapped.module[name]) for name in "ab"]


def test_leave_out_of_ddp():
    assert launch(2, left_out) == [[0.0, 0.0], [0.0, 1.0]]


def test_share_data_among_all(monkeypatch):
    """Before Lightning makes the device mesh of those two numbers."""
    for name in ("_data_parallel_size", "_tensor_parallel_size"):
        assert hasattr(ModelParallelStrategy(), name)
    strategy = ShardedStrategy()
    monkeypatch.setattr(ModelParallelStrategy, "num_processes", 4)
    strategy.num_nodes = 2
    seams.share_data_among_all(strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (8, 1)


def test_count_in_steps(tmp_path):
    """Validations and rows fall on steps of two batches, and a run that is over still starts and
    ends."""
    rows, at = Rows(), []

    class Validated(Callback):
        def on_validation_start(self, trainer, pl_module):
            at.append(trainer.global_step)

    fit(tmp_path, Validated(), logger=rows, max_steps=4, val_check_interval=2)
    assert at == [2, 4]
    assert [step for step, _ in rows.rows] == [1, 2, 3, 4]
    bases = {
        seams._Fit: "skip",
        seams._Steps: "_should_check_val_fx",
        seams._StepLogs: "update_train_step_metrics",
    }
    for ours, name in bases.items():
        assert hasattr(ours.__base__, name), f"Lightning's {ours.__base__.__name__} has no {name}"


def test_steered_checkpoint(tmp_path):
    """Lightning saves, replaces and deletes through the plain names."""
    seen = []

    class Steered(seams.SteeredCheckpoint):
        def write(self, trainer, path):
            super().write(trainer, path)
            seen.append(
                ("write", path.rpartition("/")[2], self.saved_step, self.saved_path == path)
            )

        def delete(self, trainer, path):
            super().delete(trainer, path)
            seen.append(("delete", path.rpartition("/")[2]))

        def may_save(self, trainer):
            seen.append("asked")
            return super().may_save(trainer)

        def on_train_batch_end(self, trainer, *arguments):
            if self.may_save(trainer) and trainer.global_step:
                self.save_top_k_of(trainer)
                self.save_as_last(trainer)

    saves = Steered(
        dirpath=tmp_path,
        filename="{step}",
        every_n_train_steps=7,
        save_last=True,
        enable_version_counter=False,
    )
    assert saves.every_n_steps == 7
    fit(tmp_path, saves)
    events = [event for event in seen if event != "asked"]
    assert len(seen) > len(events)
    assert events == [
        ("write", "step=1.ckpt", 1, True), ("write", "last.ckpt", 1, True), ("write", "step=2.ckpt",
        2, True),
        ("delete", "step=1.ckpt"), ("write", "last.ckpt", 2, True),
    ]  # fmt: skip
    saves.take_as_saved(9, "x")
    assert (saves.saved_step, saves.saved_path) == (9, "x")


def private_names() -> set[str]:
    """Of the trainer, its loops and connectors, modules, strategies and ModelCheckpoint."""
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    parts = (trainer, *vars(trainer).values(), trainer.fit_loop.epoch_loop, LightningModule(),
        ModelCheckpoint(),
             DDPStrategy(), ModelParallelStrategy())  # fmt: skip
    ours = [part for part in parts if type(part).__module__.startswith("lightning.")]
    shared = set(dir(nn.Module()))
    return {
        n for part in ours for n in dir(part) if n[0] == "_" and not n.startswith("__")
    } - shared


def touched(source: str, names: set[str]) -> list[str]:
    """Lines of `source` that touch a private part, or reach into the loops."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (
            node.attr in names or node.attr in ("fit_loop", "epoch_loop")
        ):
            found.append(f"{node.lineno}: .{node.attr}")
        if (
            isinstance(node, ast.FunctionDef)
            and node.name in names
            and ast.unparse(node.args)[:4] == "self"
        ):
            found.append(f"{node.lineno}: def {node.name}")
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "__class__"
            and isinstance(node.ctx, ast.Store)
        ):
            found.append(f"{node.lineno}: .__class__ =")
    return found


def test_no_other_file_touches_a_private_part():
    names = private_names()
    assert {
        "_should_accumulate",
        "_results",
        "_logger_connector",
        "_save_checkpoint",
        "_ddp_kwargs",
    } <= names
    for file in sorted((ROOT / "src/acetate").rglob("*.py")):
        source = file.read_text()
        if file.name != "lightning_seams.py" and "lightning" in source:
            assert touched(source, names) == [], file


@pytest.mark.parametrize(
    "line",
    [
        "x.fit_loop.run()",
        "self._should_skip_saving_checkpoint(t)",
        "t.y.__class__ = Z",
        "def _save_checkpoint(self): 0",
    ],
)
def test_the_checker_sees(line):
    assert touched(line, private_names())
