"""Estimates training on N GPUs: time of a step, traffic between the GPUs, the data that they need.

    step = compute + exchange + max(0, communication - overlap * compute)
    compute = FLOPs of the step (memory.measure, recomputed ones included) / (efficiency * peak)

Weak scaling: every GPU has its own batch, so that N GPUs are right with N times the clips in the
time of `step`, and compute / step is the efficiency of scaling. Strong scaling: a batch of B clips
in all, of which N GPUs take B / (N * batch_size) passes each; with more than B / batch_size GPUs,
some have nothing to do. Communication follows rings (Thakur et al. 2005): of S bytes, every GPU
sends and receives

    all-reduce                    2 (N - 1) / N * S   in 2 (N - 1) messages
    all-gather, reduce-scatter      (N - 1) / N * S   in   (N - 1) messages

at the bandwidth of the slowest link of the ring: a GPU's own within a node, else no more than that
of a node, through which its rings leave together. DDP all-reduces the gradients of what trains.
FSDP2 all-gathers every weight that it shards, in the precision that it is kept in, for the forward
and again for the backward pass, and reduce-scatters the fp32 gradients of those groups of weights
in which something trains.

Ranks that share a clip (models.ulysses) send each other n - 1 parts of n of what a step gives to
all-to-alls, at the bandwidth of a ring of theirs. Blocks wait for them: they are not hidden.

Not in it: GPUs that wait for a slower one, other traffic on the network, validation, checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import save

from acetate.memory import Footprint, room
from acetate.tasks.example import MeasuredTask

Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Gpu:
    """A card and how it is connected. Bandwidths are in one direction, 10**9 bytes per second."""

    name: str
    peak_tflops: float  # dense, in the precision of computation
    memory_gib: int
    gpus_per_node: int
    link_gb_s: float  # of a GPU to its neighbours in the node
    node_gb_s: float  # of all network cards of a node together


@dataclass(frozen=True)
class Assumptions:
    """Numbers that are not known before a run and are stated instead."""

    efficiency: float  # share of the peak that computation reaches
    bandwidth_share: float  # share of a link's bandwidth that collectives reach
    overlap: float  # share of the compute under which communication is hidden
    latency_us: float  # of a message between two GPUs


@dataclass(frozen=True)
class Payload:
    """The bytes that a step gives to collectives, whole tensors, and the number of collectives."""

    reduced: int  # all-reduce
    gathered: int  # all-gather
    scattered: int  # reduce-scatter
    collectives: int


@dataclass(frozen=True)
class Cost:
    """The cost of one step on `gpus` GPUs: seconds; bytes that each GPU sends; clips and bytes of
    data per second."""

    gpus: int
    compute: float
    communication: float  # of gradients and weights
    step: float
    sent: float
    clips_per_second: float
    data_per_node: float
    fits: bool
    exchange: float = 0.0  # between ranks that share a clip

    @property
    def scaling(self) -> float:
        """Share of the step that computes."""
        return self.compute / self.step


def trained_groups(task: MeasuredTask) -> int:
    """Counts those groups of weights that FSDP2 gathers in which something trains. It takes a task
    after memory.build."""
    count = 0
    for whole, blocks in task.sharded():
        parts = [list(block.parameters()) for block in blocks]
        within = {parameter for part in parts for parameter in part}
        parts.append([parameter for parameter in whole.parameters() if parameter not in within])
        count += sum(any(parameter.requires_grad for parameter in part) for part in parts)
    return count


def payload(found: Footprint, strategy: Strategy, trained: int) -> Payload:
    """Returns the bytes of a step's collectives. trained: as trained_groups counts; other groups
    have no gradients to scatter."""
    if strategy == "ddp":
        buckets = math.ceil(found.gradients / (25 * 2**20))  # DDP's default
        return Payload(reduced=found.gradients, gathered=0, scattered=0, collectives=buckets)
    weights = found.frozen - found.replicated + found.trainable
    return Payload(
        reduced=0,
        gathered=2 * weights,
        scattered=4 * found.trainable_parameters,
        collectives=2 * found.groups + trained,
    )


def ring(gpus: int, sent: Payload) -> tuple[float, float]:
    """Returns bytes and messages that each GPU sends."""
    share = (gpus - 1) / gpus
    rounds = 2 if sent.reduced else 1
    return share * (2 * sent.reduced + sent.gathered + sent.scattered), rounds * (
        gpus - 1
    ) * sent.collectives


def bandwidth(gpus: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Returns the bytes per second of a ring."""
    slowest = gpu.link_gb_s if gpus <= gpu.gpus_per_node else min(gpu.link_gb_s, gpu.node_gb_s)
    return slowest * 1e9 * assumed.bandwidth_share


def cost(
    gpus: int,
    found: Footprint,
    strategy: Strategy,
    sent: Payload,
    *,
    gpu: Gpu,
    assumed: Assumptions,
    batch_size: int,
    clip_bytes: float,
    accumulate: int = 1,
) -> Cost:
    """Returns the cost of a step. batch_size: clips of a forward pass of a GPU, or of those that
    share them; accumulate: passes of a step. clip_bytes: read for each clip."""
    shared = found.clip_ranks
    compute = accumulate * found.flops / (gpu.peak_tflops * 1e12 * assumed.efficiency)
    size, messages = ring(gpus, sent)
    if strategy == "fsdp":  # gathers for every pass; DDP reduces after the last
        size, messages = accumulate * size, accumulate * messages
    communication = size / bandwidth(gpus, gpu, assumed) + messages * assumed.latency_us * 1e-6
    parts = accumulate * found.exchanged * (shared - 1) / shared
    exchange = parts / bandwidth(shared, gpu, assumed)
    exchange += accumulate * found.exchanges * (shared - 1) * assumed.latency_us * 1e-6
    step = compute + exchange + max(0.0, communication - assumed.overlap * compute)
    clips = gpus / shared * batch_size * accumulate / step
    return Cost(
        gpus=gpus,
        compute=compute,
        communication=communication,
        step=step,
        sent=size + parts,
        clips_per_second=clips,
        data_per_node=shared * clips / gpus * min(gpus, gpu.gpus_per_node) * clip_bytes,
        exchange=exchange,
        fits=found.held(gpus, strategy == "fsdp") <= room(gpu.memory_gib),
    )


def latent_sample_bytes(
    shape: tuple[int, int, int, int],
    tokens: int,
    text_dim: int,
    text: int = 500,
    condition: bool = False,
    image: tuple[int, int] | None = None,
) -> int:
    """Returns the bytes of a sample in a latent tar: both members, each with its header and filled
    up to whole blocks of 512 bytes.

    shape: latents (C, F, h, w), 16 bit as the prompt's embeddings (tokens, text_dim) are. text:
    bytes of its JSON. condition: latents of the given frames, too; image: tokens and width of a
    CLIP embedding.
    """
    tensors = {
        "latents": torch.zeros(shape, dtype=torch.float16),
        "ellipse": torch.zeros(shape[1], 5),
        "coverage": torch.zeros(*shape[1:], dtype=torch.uint8),
        "prompt_embeds": torch.zeros(tokens, text_dim, dtype=torch.float16),
        "prompt_mask": torch.ones(tokens, dtype=torch.bool),
    }
    if condition:
        tensors["condition"] = tensors["latents"].clone()
    if image is not None:
        tensors["image_embeds"] = torch.zeros(image, dtype=torch.float16)
    return sum(512 * (1 + math.ceil(size / 512)) for size in (len(save(tensors)), text))
