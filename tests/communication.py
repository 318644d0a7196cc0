"""One of the processes that tests/test_cost.py starts: what DDP and FSDP2 really hand to their collectives in a step.

python -m tests.communication RANK WORLD MEETING_FILE OUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acetate import memory
from tests.test_cost import tiny_batch, tiny_task

WATCHED = ("_allgather_base_", "_reduce_scatter_base_")


class Loss(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, batch):
        return memory.training_loss(self.task, batch)


def wrapped(task, strategy):
    """batch -> loss; ddp and fsdp as the trainers do."""
    if strategy == "ddp":
        return DistributedDataParallel(Loss(task))
    if strategy == "fsdp":
        for part in (*task.transformer.blocks, task.transformer):
            fully_shard(part, reshard_after_forward=True)
    return Loss(task)


class Collectives(TorchDispatchMode):
    """Bytes of whole tensors, by collective."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(WATCHED, 0)
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if name in WATCHED:
            self.bytes[name] += max(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            self.calls += 1
        return func(*args, **kwargs or {})


def main(rank: int, world: int, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().nbytes)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    task, geometry = tiny_task()
    batch = tiny_batch(task, geometry)
    whole = wrapped(task, "ddp")
    whole.register_comm_hook(None, hook)
    whole(batch).backward()

    task, _ = tiny_task()
    loss = wrapped(task, "fsdp")
    with Collectives() as sharded:
        loss(batch).backward()
    if rank == 0:
        found = {
            "reduced": sum(reduced),
            "gathered": sharded.bytes["_allgather_base_"],
            "scattered": sharded.bytes["_reduce_scatter_base_"],
            "collectives": sharded.calls,
        }
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
