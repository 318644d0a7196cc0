"""Shards weights with FSDP2: which are gathered together, and a tensor's part on this rank."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Weights are gathered in the precision that they are kept in (bf16 base, fp32 adapters) and
# autocast computes in bf16, as without shards; gradients are summed in fp32, whatever the adapters
# are.
PRECISION = MixedPrecisionPolicy(reduce_dtype=torch.float32)


def shard(groups: list[nn.Module], mesh: DeviceMesh) -> None:
    """Leaves each rank its rows of every weight of the groups, inner ones first; meta tensors stay
    so.

    A group is gathered when it is called and let go after that, in the backward pass too, so that
    what a module holds between steps are always its shards.
    """
    for group in groups:
        for parameter in group.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.contiguous()  # FSDP knows no other layout
        fully_shard(group, mesh=mesh, reshard_after_forward=True, mp_policy=PRECISION)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's part of a whole tensor, on the device of `like`'s mesh, where `like` is
    sharded; else the value.

    Every rank has the value, or maps it from a file, of which no more than this part is read.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    mesh, placements = like.device_mesh, like.placements
    shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    part = value[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]
    part = part.to(mesh.device_type, memory_format=torch.contiguous_format, copy=True)
    return cast(
        Tensor,
        DTensor.from_local(
            part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
        ),
    )
