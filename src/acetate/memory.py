"""Measures what a training step holds in a GPU's memory, before anything is downloaded or started.

The models are built from their configs and the step itself runs, forward, backward and optimizer,
on tensors that have shapes and no numbers (FakeTensorMode), while every storage that it creates and
frees is counted. Kernels are those of a CPU with fused attention, as on a GPU: no T x T matrix;
autocast chooses precisions as CUDA's does. For N GPUs, in bytes per GPU:

    total(N) = replicated + (frozen - replicated + trainable + gradients + optimizer + EMA) / N +
    gathered(N)
               + activations + working

frozen, trainable: weights, each in the precision that it is kept in. gradients: as the trainable
weights. optimizer: AdamW's two moments, a byte each in bitsandbytes' AdamW8bit. EMA: fp32.
activations: what the forward pass keeps for the backward pass, and the batch. working: what is
needed beyond that at the worst moment, the recomputed block of checkpointing included. Blocks that
wait in the host's memory (base.offload) are on the device two at a time (gathered). N > 1 is
trainer=fsdp: the batch is per GPU, so that activations do not shrink. gathered(N) is what is whole
at a time: of the DiT the block at work, the next one and what is in no block; of the VAE the merge
block or a decoder. gathered(1) = 0. replicated: frozen weights that every GPU holds whole (the
VAE's encoder and head, perceptual networks).

Ranks that share a clip (task.context_parallel): the step runs as one of them, of a process group
that sends nothing, so that activations, working peak and operations are those of its part.

Not in it: the CUDA context, cuDNN's workspaces and the allocator's gaps (RESERVE of a card is left
for them), NCCL's buffers, and validation, which needs less unless its clips are larger.
"""

import math
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from acetate.cuda_autocast import cuda_autocast
from acetate.models.held import held_layers
from acetate.models.offload import kept_in
from acetate.models.wan import Geometry
from acetate.tasks.example import Load, MeasuredTask
from acetate.tasks.optim import with_warmup

RESERVE = 0.1  # share of a card that tensors do not get
EIGHT_BIT_FROM = 4096  # values of a tensor; bitsandbytes keeps smaller moments in fp32
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Footprint:
    """Counts of parameters and operations; all else is in bytes of one GPU that holds everything,
    in the terms above."""

    parameters: int
    trainable_parameters: int
    frozen: int
    trainable: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    working: int
    replicated: int  # of the frozen weights, under FSDP2
    gathered: int  # of the others, under FSDP2
    groups: int  # of weights that FSDP2 gathers, each by itself
    # of a step: multiplications and additions of matrices, convolutions and attention, recomputed
    # ones too
    flops: int
    host: int = 0  # frozen weights in the host's memory, which are in no other row
    shards: bool = True  # whether FSDP2 can shard it
    clip_ranks: int = 1  # that share a clip
    exchanged: int = 0  # bytes that a step gives to all-to-alls of those
    exchanges: int = 0  # and the number of such

    def per_gpu(self, gpus: int) -> dict[str, int]:
        """Returns bytes by row; the last row, total, is the sum of the others."""
        replicated = self.replicated if gpus > 1 else 0
        sharded = {
            "frozen weights": self.frozen - replicated,
            "trainable weights": self.trainable,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "EMA": self.ema,
        }
        rows = {name: math.ceil(size / gpus) for name, size in sharded.items()}
        rows["frozen weights"] += replicated
        rows["gathered weights"] = self.gathered if gpus > 1 or not self.shards else 0
        rows |= {"activations": self.activations, "working peak": self.working}
        return {**rows, "total": sum(rows.values())}

    def held(self, gpus: int, sharded: bool) -> int:
        """Returns the bytes of one of so many GPUs. DDP, which shards nothing, has the gradients
        again in its buckets."""
        if sharded or gpus == 1:
            return self.per_gpu(gpus)["total"]
        return self.per_gpu(1)["total"] + self.gradients


def room(card: float) -> float:
    """Returns the bytes of a card of so many GiB that tensors can have."""
    return (1 - RESERVE) * card * 2**30


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that the operations within it make, now (`live`) and at most
    (`peak`).

    `known` tensors, and views of them, do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()
        for tensor in known:
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":  # as offloaded
                continue
            if tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


class Flops(TorchDispatchMode):
    """Counts the operations within it by torch's own formulas, in `kinds`: attention, conv and
    matmul. torch's FlopCounterMode would also take fused attention apart, whose memory is then
    another. `exchanged` are the bytes of each all-to-all."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.exchanged: list[int] = []

    @property
    def total(self) -> int:
        return self.kinds.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.kinds["attention"] += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self.kinds["attention"] += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif func is torch.ops._c10d_functional.all_to_all_single.default:
            self.exchanged.append(args[0].nbytes)
        elif formula := flop_registry.get(func._overloadpacket):
            name = str(func._overloadpacket)
            kinds = (kind for kind in ("attention", "conv") if kind in name)
            self.kinds[next(kinds, "matmul")] += formula(*args, **kwargs or {}, out_val=out)
        return out


@contextmanager
def one_of(ranks: int) -> Iterator[None]:
    """Makes this process one of so many ranks, where they are several; what they send each other
    has no numbers."""
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def build(task: MeasuredTask) -> None:
    """Runs configure_model() without weights; the task was instantiated with BLANK's targets in the
    place of loaders."""
    with torch.device("meta"):
        task.configure_model()


def without_numbers(module: nn.Module, device: str = "cpu") -> None:
    """Replaces every parameter and buffer by a new one of the same shape and precision, of the
    current FakeTensorMode."""
    made: dict[int, Tensor] = {}  # tied weights stay tied
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty_like(tensor, device=device, requires_grad=False)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]


def measure(
    task: MeasuredTask, load: Load, *, precision: str, ema: bool, geometry: Geometry | None = None
) -> Footprint:
    """Returns the footprint of one training step of a task after `build` (or configure_model),
    whose tensors it replaces.

    precision: of the trainer. ema: whether an average of what trains is kept. geometry: of the VAE,
    where the task reads latents. Raises ValueError for an unknown precision, or for unfit clips.
    """
    if precision not in AUTOCAST:
        raise ValueError(f"trainer.precision {precision!r}; known: {', '.join(AUTOCAST)}.")
    counts = [(p.numel(), p.requires_grad) for p in task.parameters()]
    packed = _packed(task)
    quiet, away = warnings.catch_warnings(), kept_in("meta")
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), quiet, away:
        # There is no trainer to log to, and the kernels are a CPU's
        warnings.filterwarnings("ignore", ".*self.log.*|.*Cannot dispatch to fused.*")
        without_numbers(task)
        trainable = [p for p in task.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        step, moments = _optimizer(trainable, getattr(task, "optimizer", "AdamW"))
        known = [*task.parameters(), *task.buffers(), *(p.grad for p in trainable), *moments]
        with LiveStorages(known) as storages, Flops() as flops:
            batch = task.example_batch(load, geometry)
            with (
                torch.autocast("cpu", AUTOCAST[precision]) if AUTOCAST[precision] else nullcontext()
            ):
                loss = task.example_loss(batch)
            kept = storages.live
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0, foreach=True)
            step()
        groups = task.sharded()
        held = held_layers(task).values()
        host = _bytes(layer.weight for layer in held if layer.offloaded)
        frozen = _bytes([*(p for p in task.parameters() if not p.requires_grad), *task.buffers()])
        return Footprint(
            parameters=sum(size for size, _ in counts) + packed,
            trainable_parameters=sum(size for size, trains in counts if trains),
            frozen=frozen - host,
            trainable=_bytes(trainable),
            gradients=_bytes(trainable),
            optimizer=_bytes(moments),
            ema=4 * sum(p.numel() for p in trainable) if ema else 0,
            activations=kept,
            working=storages.peak - kept,
            replicated=frozen - sum(_frozen(group) for group, _ in groups),
            gathered=max(_gathered(group, blocks, bool(held)) for group, blocks in groups)
            if held or task.shardable
            else 0,
            groups=sum(len(blocks) + 1 for _, blocks in groups),
            flops=flops.total,
            host=host,
            shards=not held and task.shardable,
            clip_ranks=getattr(task, "context_parallel", 1),
            exchanged=sum(flops.exchanged),
            exchanges=len(flops.exchanged),
        )


def _optimizer(
    trainable: list[nn.Parameter], name: str
) -> tuple[Callable[[], object], list[Tensor]]:
    """Returns the step of an optimizer, AdamW's but for bitsandbytes' of eight bits, and the
    tensors that it keeps.

    The latter works in place and keeps, of tensors of EIGHT_BIT_FROM values and more, two moments
    of a byte and the scale of each 256 values.
    """
    if re.fullmatch(r"bitsandbytes\.(Paged)?AdamW?8bit", name):
        sizes = [p.numel() for p in trainable]
        small = sum(size for size in sizes if size < EIGHT_BIT_FROM)
        large = [size for size in sizes if size >= EIGHT_BIT_FROM]
        values = 8 * small + sum(2 * size + 8 * math.ceil(size / 256) for size in large)
        return (lambda: None), [torch.empty(values, dtype=torch.uint8)]
    optimizer = with_warmup(trainable, lr=0.0, warmup_steps=0)["optimizer"]
    for group in optimizer.param_groups:
        group["foreach"] = True  # as on a GPU
    optimizer.step()  # makes the moments
    kept = tree_leaves(list(optimizer.state.values()))
    return lambda: optimizer.step(), [x for x in kept if isinstance(x, Tensor)]


def _packed(task: nn.Module) -> int:
    """Returns how many weights NF4 has beside another one in its place."""
    held = held_layers(task).values()
    return sum(layer.weight.numel() for layer in held if layer.kind == "nf4")


def _frozen(module: nn.Module) -> int:
    return _bytes(p for p in module.parameters() if not p.requires_grad)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gathered(group: nn.Module, blocks: Sequence[nn.Module], held: bool = False) -> int:
    """Returns the bytes of its weights that are whole at a time: two blocks, and those in none; of
    weights that are held, what two blocks bring from the host's memory."""
    if held:
        layers = (held_layers(block).values() for block in blocks)
        return sum(sorted(_bytes(x.weight for x in part if x.offloaded) for part in layers)[-2:])
    sizes = sorted(_bytes(block.parameters()) for block in blocks)
    return _bytes(group.parameters()) - sum(sizes) + sum(sizes[-2:])
