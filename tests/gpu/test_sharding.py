"""FSDP2 over NCCL on one rank: the same training as without shards, and it goes on."""

import pytest
import torch

from acetate.formats.checkpoints import read_trained
from acetate.formats.layout import is_sharded
from tests.gpu.training import EXACT, losses

pytestmark = pytest.mark.gpu
# fp32, since a rounding to bf16 is larger than what is held here; AdamW steps by the learning rate
# also where a gradient is nothing but rounding, in a few weights
PLAIN = ("trainer.precision=32-true", EXACT)


def check_sharded(train, folder) -> None:
    whole = train(folder / "whole", *PLAIN)
    sharded = ("trainer=fsdp", *PLAIN)
    first = train(folder / "sharded", "trainer.max_steps=3", *sharded)
    assert is_sharded(first / "checkpoints/last.ckpt")
    second = train(folder / "sharded", "resume=last", *sharded)
    assert losses(second) == pytest.approx(losses(whole), rel=1e-5)
    expected, found = (
        read_trained(str(run / "checkpoints/last.ckpt"), ema=False).state for run in (whole, second)
    )
    assert found.keys() == expected.keys()
    off = torch.cat([(found[name] - value).abs().flatten() for name, value in expected.items()])
    share = float((off > 1e-5).double().mean())
    assert share < 1e-3, f"{share:.2%} of the weights are off by more than 1e-5, by {off.max():.1e}"


def test_a_sharded_run_is_the_plain_run(train, tmp_path, without_tf32):
    check_sharded(train, tmp_path)
