"""Optimizers by name: what they are given, what is refused, and that runs with them go on."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from acetate.commands.train import check_average
from acetate.formats.resumable import check_optimizers
from acetate.models.adapters import trainable_state
from acetate.tasks.optim import optimizer_class, with_warmup
from tests.compose import composed
from tests.tasks.test_dit import config_for, fit


def made(name):
    parameter = nn.Parameter(torch.ones(3))
    return with_warmup(
        [parameter], lr=0.5, warmup_steps=1, betas=(0.8, 0.95), weight_decay=0.1, optimizer=name
    )["optimizer"]


def test_each_gets_what_it_knows():
    assert type(made("AdamW")) is torch.optim.AdamW
    group = made("torch.optim.NAdam").param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.8, 0.95), 0.1)
    group = made("SGD").param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.1) and "betas" not in group


@pytest.mark.parametrize("had", [None, True])
def test_a_gpu_has_one_kernel_whatever_the_checkpoint_had(had):
    """Counts of steps lie where that kernel needs them."""
    for device, kernel in (("cpu", None), ("cuda", True)):
        with FakeTensorMode():
            parameter = nn.Parameter(torch.ones(3, device=device))
            of = {"lr": 0.5, "warmup_steps": 1, "fused": True}
            optimizer = with_warmup([parameter], **of)["optimizer"]
            assert optimizer.param_groups[0]["fused"] is kernel
            moments = {name: torch.zeros(3) for name in ("exp_avg", "exp_avg_sq")}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(
                {
                    "state": {0: {"step": torch.tensor(1.0), **moments}},
                    "param_groups": [{**group, "fused": had} for group in groups],
                }
            )
            assert optimizer.param_groups[0]["fused"] is kernel
            assert optimizer.state[parameter]["step"].device.type == device


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Adamm", r"torch.optim has no such optimizer; the nearest is Adam\."),
        ("LBFGS", "torch.optim has no such optimizer"),  # it needs a closure
        ("Optimizer", "torch.optim has no such optimizer"),
        ("os.system", "of the package os; known: torch.optim, bitsandbytes, schedulefree"),
        ("bitsandbytes.AdamW8bit", "bitsandbytes is not installed"),
    ],
)
def test_other_names_are_refused(name, said):
    with pytest.raises(ValueError, match=f"task.optimizer={name}: .*{said}"):
        optimizer_class(name)


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "RAdam", "RMSprop"])
def test_a_run_goes_on_bit_for_bit(tmp_path, cached, name):
    more = [f"task.optimizer={name}", "trainer.val_check_interval=1", "task.decay_steps=4"]
    whole = fit(config_for(tmp_path / "whole", cached, *more, "trainer.max_steps=3"))
    fit(config_for(tmp_path / "parts", cached, *more, "trainer.max_steps=2"))
    last = tmp_path / "parts/checkpoints/last.ckpt"
    again = fit(
        config_for(tmp_path / "parts", cached, *more, "trainer.max_steps=3"), resume=str(last)
    )
    assert again[2].losses == whole[2].losses[2:]
    state = torch.load(last, weights_only=True)
    (optimizer,) = whole[0].optimizers
    check_optimizers(state | {"lr_schedulers": []}, [optimizer], [])
    held = next(iter(state["optimizer_states"][0]["state"].values()))
    held[next(iter(held))] = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match=r"optimizer_states\[0\].state.*must be finite"):
        check_optimizers(state | {"lr_schedulers": []}, [optimizer], [])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lr"), [("AdamW", 0.01), ("SGD", 1.0)])
def test_schedule_free_runs_go_on_and_keep_their_average(tmp_path, cached, kind, lr):
    """Bit for bit; validations and adapter files have what the optimizer calls its average."""
    pytest.importorskip("schedulefree")
    more = [
        "callbacks=ema", f"task.optimizer=schedulefree.{kind}ScheduleFree", f"task.lr={lr}",
        "trainer.val_check_interval=1", "task.decay_steps=null", "task.warmup_steps=0",
    ]  # fmt: skip
    trainer, task, whole = fit(config_for(tmp_path / "whole", cached, *more, "trainer.max_steps=4"))
    fit(config_for(tmp_path / "parts", cached, *more, "trainer.max_steps=2"))
    last = tmp_path / "parts/checkpoints/last.ckpt"
    again = fit(
        config_for(tmp_path / "parts", cached, *more, "trainer.max_steps=4"), resume=str(last)
    )
    assert again[2].losses == whole.losses[2:]
    for name, value in trainable_state(task).items():
        assert torch.equal(value, trainable_state(again[1])[name]), name
    trained = {name: value.clone() for name, value in trainable_state(task).items()}
    adapters = load_file(tmp_path / "whole/checkpoints/last.safetensors")
    trainer.optimizers[0].eval()
    moved = 0.0
    for name, value in trainable_state(task).items():
        assert_close(adapters[name], value, rtol=0, atol=1e-7, msg=name)
        moved = max(moved, float((value - trained[name]).detach().abs().max()))
    assert moved > 1e-4


def test_a_schedule_free_run_needs_its_average(tmp_path):
    config = composed(
        tmp_path, "experiment=dit_dora", "task.optimizer=schedulefree.SGDScheduleFree"
    )
    with pytest.raises(ValueError, match="Add callbacks=ema"):
        check_average(config)
