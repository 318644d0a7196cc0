import torch
from torch import nn

from acetate.released.dit import third
from acetate.tasks.optim import with_warmup


def test_the_rate_is_a_third_and_then_whole():
    made = with_warmup([nn.Parameter(torch.zeros(1))], lr=0.3, warmup_steps=2, warmup=third)
    rates = []
    for _ in range(4):
        rates.append(round(made["optimizer"].param_groups[0]["lr"], 6))
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == [0.1, 0.1, 0.3, 0.3]
