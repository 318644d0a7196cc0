"""Checkpoints that were edited: a run goes on from none of them, and says which part is wrong."""

import copy
import signal

import pytest
import torch
from hydra.utils import instantiate

from acetate.commands.runs import LAST
from acetate.formats.checkpoints import step_of
from acetate.formats.resumable import check_optimizers, check_resumable
from acetate.lightning_seams import guard_resume
from tests.tasks.test_dit import config_for

pytestmark = pytest.mark.slow
TRAINER = "epoch_loop.automatic_optimization.optim_progress"


def go_on(folder, cached, checkpoint, steps=4):
    """What `acetate train` does of a checkpoint, to the end of training."""
    config = config_for(folder, cached, f"trainer.max_steps={steps}", "callbacks=ema",
                        "callbacks.samples=null", "callbacks.curves=null",
                        "callbacks.progress=null")  # fmt: skip
    if checkpoint is not None:
        step_of(checkpoint)
    handlers = [signal.getsignal(name) for name in (signal.SIGUSR1, signal.SIGTERM)]
    callbacks = [held for held in instantiate(config.callbacks).values() if held is not None]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=False)
    trainer.ckpt_path = None if checkpoint is None else str(checkpoint)
    guard_resume(trainer, check_resumable, check_optimizers)
    trainer.fit(instantiate(config.task), instantiate(config.data), weights_only=True)
    for name, handler in zip((signal.SIGUSR1, signal.SIGTERM), handlers, strict=True):
        signal.signal(name, handler)
    return trainer.global_step


@pytest.fixture(scope="module")
def sound(cached, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    assert go_on(folder, cached, None, steps=2) == 2
    return folder / LAST


def put(*path, value):
    """An edit: the value at a path of names."""

    def edit(held):
        for name in path[:-1]:
            held = held[name]
        held[path[-1]] = value

    return edit


def drop(*path):
    def edit(held):
        for name in path[:-1]:
            held = held[name]
        del held[path[-1]]

    return edit


BATCHES = ("loops", "fit_loop", "epoch_loop.batch_progress", "total")
STEPS = ("loops", "fit_loop", TRAINER, "optimizer", "step", "total")
MOMENTS = ("optimizer_states", 0, "state", 0)
GROUP = ("optimizer_states", 0, "param_groups", 0)


@pytest.mark.parametrize(
    "edit, said",
    [
        *((drop(name), f"{name} is missing") for name in (
            "epoch", "loops", "optimizer_states", "lr_schedulers")),
        (drop("pytorch-lightning_version"), "pytorch-lightning_version"),
        (drop("global_step"), "global_step=None"),
        (put("global_step", value="x"), "global_step='x'"),
        (put("global_step", value=1), "global_step=1: must be the steps"),
        (put("global_step", value=-(10**9)), "global_step=-1000000000"),
        (put("state_dict", value=[1]), "state_dict="), (put("loops", value=5), "loops=5"),
        (put(*BATCHES, "processed", value=10**12), "1000000000000 batches in 2 steps"),
        (put(*BATCHES, "processed", value="x"), "processed='x'"),
        (drop(*BATCHES, "ready"), "ready is missing"), (put(*BATCHES, "step", value=5), "step is"),
        (put(*STEPS, "completed", value=0), "must be the steps that its loops have completed, 0"),
        (put("optimizer_states", value=[]), r"optimizer_states=\[\]"),
        (put("optimizer_states", 0, "state", value={}), "state is empty"),
        (put(*MOMENTS, "exp_avg", value=torch.zeros(3)), r"exp_avg is.*\(3,\)"),
        (put(*MOMENTS, "step", value=torch.tensor(float("nan"))), "finite"),
        (drop(*MOMENTS, "exp_avg_sq"), "exp_avg and exp_avg_sq"),
        (put(*GROUP, "lr", value=float("nan")), "lr=nan: must be a number"),
        (put(*GROUP, "betas", value=5), "betas=5"),
        (drop(*GROUP, "initial_lr"), "initial_lr is mis"),
        (put(*GROUP, "params", value=[0]), "params: must number"),
        (put("lr_schedulers", 0, "last_epoch", value="x"), "last_epoch='x'"),
        (put("lr_schedulers", 0, "step", value=5), "step is unknown"),
        (put("lr_schedulers", 0, "base_lrs", value=[]), "base_lrs="),
        (put("LatentDataModule", "walk", value=[[2, 10**12]]), "walk="),
        (put("LatentDataModule", "consumed", value="x"), "consumed='x'"),
        (drop("LatentDataModule", "walk"), "walk=None"),
        (drop("LatentDataModule", "order"), "order"),
        (put("callbacks", "EMA", "average", value={"x": torch.zeros(1)}), "EMA.average: x is"),
        (drop("callbacks", "EMA", "average"), "average"),
        (put("callbacks", value=5), "callbacks=5"),
        (put("metrics", value={"rows": "x"}), "metrics.rows='x'"), (put("bins", value=5), "bins=5"),
        (put("adapter_metadata", "rank", value="[" * 5000), "rank=.*nested too deeply"),
        (drop("adapter_metadata"), "adapter_metadata"), (put("schedule", value=5), "schedule=5"),
        (lambda held: next(iter(held["state_dict"].values())).fill_(float("nan")), "not finite"),
    ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_what_was_edited_is_refused_by_name(sound, cached, tmp_path, edit, said):
    held = copy.deepcopy(torch.load(sound, weights_only=True))
    edit(held)
    torch.save(held, tmp_path / "edited.ckpt")
    with pytest.raises(ValueError, match=rf"edited\.ckpt: .*{said}"):
        go_on(tmp_path, cached, tmp_path / "edited.ckpt")


def test_what_is_sound_goes_on(sound, cached, tmp_path):
    assert go_on(tmp_path, cached, sound) == 4
