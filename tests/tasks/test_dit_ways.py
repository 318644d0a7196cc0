"""A step of the DiT in other ways, which must not change what it computes."""

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback
from torch.testing import assert_close

from acetate.commands.estimate import footprint
from acetate.models.adapters import trainable_state
from tests.tasks.test_dit import config_for, fit

HELD = ["task.base.weights=fp8", "task.base.offload=true", "task.checkpointing=true"]


class Gradients(Callback):
    """Of every optimizer step, before they are clipped."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({name: p.grad.clone() for name, p in trainable_state(pl_module).items()})


def gradients(folder, cached, *overrides):
    """At weights that stay as they start: B = 0, so that only its gradient and the magnitude's are
    not zero."""
    record = Gradients()
    fit(config_for(folder, cached, "task.lr=0", *overrides), extra=[record])
    return record.steps


def test_accumulated_gradients_are_the_mean_of_their_batches(tmp_path, cached):
    first, second = gradients(tmp_path / "a", cached, "trainer.max_steps=2")
    (both,) = gradients(
        tmp_path / "b", cached, "trainer.max_steps=1", "trainer.accumulate_grad_batches=2"
    )
    assert sum(value.abs().sum() for value in both.values()) > 0
    for name, value in both.items():
        assert_close(value, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-7, msg=name)


def test_recomputed_blocks_give_the_same_gradients(tmp_path, cached):
    (plain,) = gradients(tmp_path / "a", cached, "trainer.max_steps=1")
    (recomputed,) = gradients(
        tmp_path / "b", cached, "trainer.max_steps=1", "task.checkpointing=true"
    )
    for name, value in plain.items():
        assert_close(recomputed[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.long
def test_offloaded_inputs_give_the_same_gradients(tmp_path, cached):
    """To the bit; and by the estimate a block's input less is held for each block."""
    (plain,), (offloaded,) = (
        gradients(tmp_path / name, cached, "trainer.max_steps=1", f"task.checkpointing={name}")
        for name in ("true", "offload")
    )
    for name, value in plain.items():
        assert torch.equal(offloaded[name], value), name
    clip = ["wan.frames=9", "wan.height=96", "wan.width=96", "task.keep_attention=false"]
    found = {}
    for way in ("true", "offload"):
        config = config_for(tmp_path, cached, *clip, f"task.checkpointing={way}")
        _, found[way] = footprint(config)
    kept, blocks = 2 * 3 * 12 * 12 * 128 * 4, 2  # of one block: clips, tokens, width, bytes
    assert found["true"].activations - found["offload"].activations == pytest.approx(
        blocks * kept, rel=0.05
    )
    assert found["offload"].working <= found["true"].working + 2 * kept
    both = ["task.checkpointing=offload", "task.compile=true"]
    with pytest.raises(InstantiationException, match="offload is not for compiled blocks"):
        instantiate(config_for(tmp_path, cached, *both).task)


def test_a_run_on_held_weights_goes_on_to_the_bit(tmp_path, cached):
    """Rounded and offloaded, stopped after two steps of four and resumed; its checkpoint goes on on
    whole weights as well."""
    whole = ["trainer.max_steps=4", "task.decay_steps=9", *HELD]
    _, task, record = fit(config_for(tmp_path / "a", cached, *whole))
    half = config_for(tmp_path / "b", cached, "trainer.max_steps=2", *whole[1:])
    _, _, first = fit(half)
    last = tmp_path / "b/checkpoints/last.ckpt"
    with pytest.warns(match="max_steps 2 of the checkpoint is now 4"):
        _, again, second = fit(config_for(tmp_path / "c", cached, *whole), resume=last)
    assert first.losses + second.losses == record.losses
    for name, value in trainable_state(task).items():
        assert torch.equal(value, trainable_state(again)[name]), name
    with pytest.warns(match="max_steps 2 of the checkpoint is now 3"):
        plain = config_for(tmp_path / "d", cached, "trainer.max_steps=3", "task.decay_steps=9")
        _, _, third = fit(plain, resume=last)
    assert third.losses[0] == pytest.approx(record.losses[2], rel=0.02)
    assert third.losses[0] != record.losses[2]
