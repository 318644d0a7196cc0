"""The DiT stage as released."""

import torch

from acetate.released.flow import schedule
from acetate.tasks.dit import DoRATask


def third(step: int, steps: int) -> float:
    """Returns the share of the learning rate: a third of it for the first steps, then all of it."""
    return 1.0 if step >= steps else 1 / 3


class ReleasedDoRATask(DoRATask):
    """Keeps adapters in bfloat16, in which a magnitude of 1.5 does not move at a learning rate of
    1e-4."""

    schedule_levels = staticmethod(schedule)
    adapter_dtype = torch.bfloat16
    warmup = staticmethod(third)
