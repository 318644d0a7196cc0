import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from acetate.callbacks.ema import EMA


class Counter(LightningModule):
    """Its weight is the number of steps taken."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.validated: list[float] = []

    def training_step(self, batch, batch_idx):
        return {"loss": -self.weight.sum()}

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)


def fit(module, ema, root, steps, **settings):
    loader = DataLoader(torch.zeros(steps * settings.get("accumulate_grad_batches", 1)))
    trainer = Trainer(
        max_epochs=1, callbacks=[ema], logger=False, default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False, **settings,
    )  # fmt: skip
    trainer.fit(module, loader, DataLoader(torch.zeros(1)))
    return trainer


def expected(decay, steps):
    average = 0.0
    for step in range(1, steps + 1):
        d = min(decay, (1 + step) / (10 + step))
        average = d * average + (1 - d) * step
    return average


@pytest.mark.parametrize("accumulate", [1, 3])
def test_average_counts_steps_and_validation_sees_it(tmp_path, accumulate):
    module, ema = Counter(), EMA(decay=0.5)
    fit(module, ema, tmp_path, 6, accumulate_grad_batches=accumulate)
    assert module.weight.item() == 6
    assert module.validated[-1] == pytest.approx(expected(0.5, 6))
    assert set(ema.average) == {"weight"}


def test_state_goes_on(tmp_path):
    ema, module = EMA(decay=0.9), Counter()
    ema.load_state_dict({"average": {"weight": torch.tensor([4.0])}})
    fit(module, ema, tmp_path, 1)
    assert_close(ema.state_dict()["average"]["weight"], torch.tensor([4 * 2 / 11 + 1 * 9 / 11]))


def test_decay_is_checked():
    with pytest.raises(ValueError, match="ema decay 1"):
        EMA(decay=1)
