"""The noise levels that the released training code sees."""

import torch
from torch import Tensor

from acetate import flow


class ReleasedLevels(flow.NoiseLevels):
    """Gives one level to the whole batch, its timestep in bfloat16, which leaves 294 of 1000."""

    def seen(self, ids: Tensor) -> Tensor:
        return self.rounded(super().seen(ids)[:1]).expand_as(ids)

    def timestep(self, ids: Tensor) -> Tensor:
        return self.timesteps[ids].to(torch.bfloat16).float()

    def rounded(self, ids: Tensor) -> Tensor:
        """Returns ids (B,) as the rounded timesteps find them again."""
        return (self.timesteps[None] - self.timestep(ids)[:, None]).abs().argmin(1)


def schedule(shift: float = 5.0) -> ReleasedLevels:
    return flow.schedule(shift=shift, kind=ReleasedLevels)
