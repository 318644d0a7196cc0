import os
import signal

import pytest
import torch
from hydra.utils import instantiate
from lightning import Callback
from torch.utils.data import DataLoader

from acetate.callbacks.checkpoints import StepCheckpoint
from acetate.callbacks.preemption import EXIT_CODE, Preempted, Preemption
from acetate.steps import StepTrainer
from tests.callbacks.test_ema import Counter
from tests.compose import composed


class SignalAt(Callback):
    """Of this process to itself, in batch after batch."""

    def __init__(self, *batches: int, number: signal.Signals = signal.SIGTERM):
        self.batches, self.number = batches, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.batches:
            os.kill(os.getpid(), self.number)


class SignalWhileSaving(StepCheckpoint):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)


class SignalBefore(Callback):
    def on_fit_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


class SignalInLoader(DataLoader):
    """When its iterator is made."""

    def __iter__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__iter__()


def fit(
    root,
    *callbacks,
    checkpoint=StepCheckpoint,
    steps=4,
    resume=None,
    every=100,
    loader=DataLoader,
    **settings,
):
    module = Counter()
    saves = checkpoint(
        dirpath=root, filename="{step}", save_last=True, every_n_train_steps=every, save_top_k=0
    )
    stops = Preemption(signals=["SIGTERM"], requeue=["SIGUSR1"])
    trainer = StepTrainer(
        max_steps=steps, max_epochs=-1, callbacks=[stops, *callbacks, saves], logger=False,
        default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, **settings,
    )  # fmt: skip
    trainer.fit(module, loader(torch.zeros(100)), ckpt_path=resume)
    return trainer, module


def saved_step(root):
    return torch.load(root / "last.ckpt", weights_only=True)["global_step"]


def test_the_optimizer_step_is_finished_and_saved(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stop:
        # the first of three batches of step 2
        fit(tmp_path, SignalAt(3), accumulate_grad_batches=3)
    assert stop.value.code == EXIT_CODE
    assert saved_step(tmp_path) == 2
    assert signal.getsignal(signal.SIGTERM) == before
    trainer, module = fit(tmp_path, resume=str(tmp_path / "last.ckpt"), accumulate_grad_batches=3)
    assert trainer.global_step == module.weight.item() == 4


def test_further_signals_while_saving_change_nothing(tmp_path):
    with pytest.raises(Preempted):
        fit(tmp_path, SignalAt(0, 1), checkpoint=SignalWhileSaving)
    assert saved_step(tmp_path) == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("callbacks", "loader"), [([SignalBefore()], DataLoader), ([], SignalInLoader)]
)
def test_a_signal_before_the_first_step_waits_for_it(tmp_path, callbacks, loader):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # outside of tests it ends the process
    try:
        with pytest.raises(Preempted):
            fit(tmp_path, *callbacks, loader=loader)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved_step(tmp_path) == 1


def test_a_job_goes_back_into_the_queue(tmp_path, monkeypatch):
    said = fake_scontrol(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(Preempted):
        fit(tmp_path / "a", SignalAt(0))
    assert not said.exists()  # SIGTERM is also what scancel sends
    with pytest.raises(Preempted):
        fit(tmp_path / "b", SignalAt(0, number=signal.SIGUSR1))
    assert said.read_text() == "requeue 123\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "120")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(Preempted):
        fit(tmp_path / "c", SignalAt(0, number=signal.SIGUSR1))
    assert said.read_text() == "requeue 123\nrequeue 120_3\n"


def test_a_queue_that_refuses_is_reported(tmp_path, monkeypatch, caplog):
    fake_scontrol(tmp_path, monkeypatch, "echo Requeue is disabled >&2; exit 1")
    with pytest.raises(Preempted):
        fit(tmp_path / "a", SignalAt(0, number=signal.SIGUSR1))
    assert "scontrol requeue 123 failed: Requeue is disabled" in caplog.text
    assert saved_step(tmp_path / "a") == 1


def fake_scontrol(folder, monkeypatch, then):
    """One on the PATH that notes how it was called."""
    said = folder / "said"
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {said}\n{then}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    return said


def test_the_last_step_ends_as_ever(tmp_path):
    trainer, _ = fit(tmp_path, SignalAt(3))
    assert trainer.global_step == 4 == saved_step(tmp_path)


class SignalInValidation(Callback):
    def on_validation_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_in_the_validation_that_a_run_goes_on_with(tmp_path, monkeypatch):
    """With the callbacks in their order in conf/."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    settings = ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.checkpoint.best=null"]
    conf = composed(tmp_path, "callbacks=base", *settings).callbacks

    def fit(steps, *callbacks, resume=None):
        ours = [instantiate(conf[name]) for name in conf if name in ("preemption", "checkpoint")]
        trainer = StepTrainer(
            max_steps=steps, max_epochs=-1, callbacks=[*callbacks, *ours], logger=False,
            default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            val_check_interval=2,
            check_val_every_n_epoch=None,
        )  # fmt: skip
        trainer.fit(
            Counter(), DataLoader(torch.zeros(100)), DataLoader(torch.zeros(1)), ckpt_path=resume
        )

    fit(2)

    def unhandled(number, frame):
        raise AssertionError("outside of tests this signal ends the process")

    before = signal.signal(signal.SIGUSR1, unhandled)
    try:
        with pytest.raises(Preempted):
            fit(4, SignalInValidation(), resume=str(tmp_path / "checkpoints/last.ckpt"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert saved_step(tmp_path / "checkpoints") == 3


def test_unknown_signals_are_named():
    with pytest.raises(ValueError, match="'SIGUSER1' is no signal"):
        Preemption(signals=["SIGTERM"], requeue=["SIGUSER1"])


@pytest.fixture
def heard():
    """SIGINT is, also where a shell has started the tests with &."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c(root, *batches):
    with pytest.raises(Preempted) as stop:
        fit(root, SignalAt(*batches, number=signal.SIGINT))
    return stop.value.code


def test_ctrl_c_finishes_the_step(tmp_path, caplog, capfd, heard):
    before = signal.getsignal(signal.SIGINT)
    assert ctrl_c(tmp_path, 1) == 130
    assert saved_step(tmp_path) == 2
    assert signal.getsignal(signal.SIGINT) == before
    assert "asked to stop: saved after step 2" in caplog.text
    assert "once more ends at once" in capfd.readouterr().err
