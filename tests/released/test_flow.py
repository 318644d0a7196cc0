import torch
from torch.testing import assert_close

from acetate import flow
from acetate.released.flow import schedule


def test_a_batch_has_one_level_that_bfloat16_finds():
    ours, released = flow.schedule(), schedule()
    drawn = torch.tensor([137, 500])
    assert ours.seen(drawn).tolist() == [137, 500]
    first, second = released.seen(drawn)
    assert first == second
    rounded = ours.timesteps[137].bfloat16().float()
    assert abs(ours.timesteps[first] - rounded) == (ours.timesteps - rounded).abs().min()
    assert_close(released.timestep(first[None]), rounded[None], rtol=0, atol=0)
