"""Wan's DiT as a frozen velocity field, and with DoRA."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from tqdm import tqdm

from acetate.draws import generator_for
from acetate.flow import NoiseLevels
from acetate.models import dora
from acetate.models.compiled import compile_forward
from acetate.models.experts import PARTS
from acetate.models.held import KINDS, HeldLinear, hold, whole
from acetate.models.loading import load_transformer
from acetate.models.offload import inputs_offloaded
from acetate.models.sharding import shard, shard_like
from acetate.models.text import embed_prompt

# q, k, v, o of both attentions and both feed-forward layers of every block: 400 layers in the 14B
DORA_TARGETS = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
TEXT_TOKENS = 512  # that diffusers takes the context of an image-to-video DiT to end with
# fused attention, on a GPU and on a CPU
ATTENTION = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in (
        "cudnn_attention",
        "efficient_attention",
        "flash_attention",
        "flash_attention_for_cpu",
    )
]


@dataclass(frozen=True)
class FrozenDiT:
    """The place of a base, as `load_transformer` takes it, and how it is kept: its precision, what
    the weights of its blocks are rounded to (one of held.KINDS), and whether they wait in the
    host's memory.

    expert: `high` or `low`, the one of Wan2.2's two experts that is loaded, from `transformer` or
    `transformer_2`; null for a base that is one DiT. boundary: the share of the training steps
    from which on the high-noise expert sees them. Raises ValueError for an unknown rounding, and
    where base and expert do not fit together.
    """

    transformer: str
    dtype: str
    transformer_2: str | None = None
    boundary: float | None = None
    expert: str | None = None
    weights: str = "full"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.weights not in KINDS:
            raise ValueError(f"base.weights={self.weights}; known: {', '.join(KINDS)}.")
        if self.expert not in (None, *PARTS):
            raise ValueError(f"task.base.expert {self.expert!r}; known: {', '.join(PARTS)}.")
        two = self.transformer_2 is not None and self.boundary is not None
        if self.expert and not two:
            raise ValueError(
                f"task.base.expert={self.expert}, but {self.transformer} is one DiT (no "
                "wan.transformer_2 or wan.boundary). Give task.base.expert=null, or "
                "wan=wan22_a14b."
            )
        if two and not self.expert:
            raise ValueError(
                f"{self.transformer} has two experts, of which a run trains one. Give "
                "task.base.expert=high or low, or -m task.base.expert=high,low for a run each."
            )

    @property
    def source(self) -> str:
        """The place of the weights that are loaded."""
        return self.transformer_2 if self.expert == "low" else self.transformer  # pyright: ignore[reportReturnType]

    def facts(self) -> dict[str, Any]:
        """Returns what a file of adapters says of their expert; nothing for one DiT."""
        return {"expert": self.expert, "boundary": self.boundary} if self.expert else {}

    def span(self, levels: NoiseLevels) -> tuple[int, int]:
        """Returns the first id of the levels that this expert sees, and the one after its last."""
        if self.expert is None:
            return 0, len(levels)
        high = levels.at_least(cast(float, self.boundary))
        return (0, high) if self.expert == "high" else (high, len(levels))

    @property
    def held(self) -> str:
        """The settings that keep weights in another way than whole on the device; empty without."""
        kept = [f"base.weights={self.weights}"] * (self.weights != "full")
        return " and ".join([*kept, *["base.offload=true"] * self.offload])

    def check_step(self, checkpointing: bool | str, compiled: bool) -> None:
        """Raises ValueError for a training step that would keep what is offloaded on the device."""
        if self.offload and (compiled or not checkpointing):
            way = "task.compile=false" if compiled else "task.checkpointing=true"
            raise ValueError(
                "task.base.offload=true: blocks come and go with their recomputation, one at a "
                f"time; needed: {way}."
            )

    def check_shards(self, shards: DeviceMesh | None) -> None:
        """Raises ValueError where weights that are held in another way would be sharded."""
        if self.held and shards is not None:
            raise ValueError(
                f"task.{self.held}: trainer=fsdp cannot shard such weights. Use trainer=default on "
                "one GPU, or task.base.weights=full and task.base.offload=false."
            )

    def load(
        self, prepare: Callable[[WanTransformer3DModel], object] | None = None
    ) -> WanTransformer3DModel:
        """Loads the base. prepare: called on it before it has values, to put adapters on it or
        shard it."""
        transformer = self.read(prepare)
        hold(transformer.blocks, self.weights, self.offload)
        return transformer

    def read(
        self, prepare: Callable[[WanTransformer3DModel], object] | None
    ) -> WanTransformer3DModel:
        part = PARTS[self.expert or "high"]
        return load_transformer(self.source, getattr(torch, self.dtype), prepare, part)


class VelocityField(nn.Module):
    """Runs a frozen DiT under one prompt: (x_t, timestep) -> velocity.

    context (1, L, text_dim) is the prompt's embedding. Gradients flow to x_t only.
    """

    def __init__(self, transformer: WanTransformer3DModel, context: Tensor) -> None:
        super().__init__()
        self.transformer = transformer.eval().requires_grad_(False)
        self.register_buffer("context", context, persistent=False)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Takes latents (B, 16, F, h, w), normalised and noisy, and timestep (B,) in [0, 1000],
        fp32; the result is like latents."""
        return velocity(
            self.transformer, latents, timestep, self.context.expand(len(latents), -1, -1)
        )


def check_latent_grid(
    transformer: WanTransformer3DModel, height: int, width: int, space_stride: int
) -> None:
    """Raises ValueError where pixels do not make whole patches: Wan2.1 needs sides that are
    multiples of 16."""
    _, *patch = transformer.config.patch_size
    for name, side, step in zip(("height", "width"), (height, width), patch, strict=True):
        if side % (step * space_stride):
            multiple = step * space_stride
            raise ValueError(
                f"{name} {side}; the DiT needs multiples of {multiple} pixels (VAE stride "
                f"{space_stride} x patch {step}). Use "
                f"{name}={max(multiple, side // multiple * multiple)}."
            )


def load_velocity_field(
    *,
    transformer: str,
    text_encoder: str,
    prompt: str,
    prompt_length: int,
    dtype: str,
    cache: str,
    mesh: DeviceMesh | None = None,
) -> VelocityField:
    """Loads the DiT of source `transformer` under one prompt, whose embedding is computed once and
    cached.

    mesh: the ranks that it is sharded over.
    """
    context = embed_prompt(prompt, text_encoder, prompt_length, cache)
    prepare = None if mesh is None else partial(shard_transformer, mesh=mesh)
    return VelocityField(FrozenDiT(transformer, dtype).load(prepare), context)


def shard_transformer(transformer: WanTransformer3DModel, mesh: DeviceMesh) -> None:
    """Shards a DiT: each block is gathered by itself, and the weights in no block together."""
    shard([*transformer.blocks, transformer], mesh)


def keep_attention_alone(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Says of an operation whether what it makes is kept, for selective checkpointing: fused
    attention of a clip to itself; that to its prompt is little work."""
    kept = operation in ATTENTION and args[0].shape == args[1].shape
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(keep_attention: bool, offload: bool = False) -> Callable[..., Any]:
    """Returns f, *inputs -> f(*inputs) that keeps its inputs alone, and computes the rest again in
    the backward pass.

    keep_attention: what fused self-attention gives is kept as well. It is most of the work of a
    long clip's block and a small part of what that makes. offload: the first input is kept in the
    CPU's memory, as `inputs_offloaded` does.
    """
    selection = partial(create_selective_checkpoint_contexts, keep_attention_alone)
    context = {"context_fn": selection} if keep_attention else {}
    run = partial(checkpoint, use_reentrant=False, **context)
    return inputs_offloaded(run) if offload else run


def checkpoint_blocks(
    transformer: WanTransformer3DModel, keep_attention: bool = True, offload: bool = False
) -> None:
    """Lets every block be computed again in the backward pass, as `recomputed` does."""
    transformer.enable_gradient_checkpointing(recomputed(keep_attention, offload))


def compile_blocks(
    transformer: WanTransformer3DModel,
    checkpointing: bool = False,
    keep_attention: bool = True,
    backend: str = "inductor",
) -> None:
    """Compiles every block, once for each shape of its inputs: the blocks of a DiT share what is
    compiled. checkpointing, keep_attention: as in `checkpoint_blocks`, within what is compiled.
    backend: of torch.compile."""
    for block in transformer.blocks:
        if checkpointing:
            block.forward = partial(recomputed(keep_attention), block.forward)
        compile_forward(block, backend)


def velocity(
    transformer: WanTransformer3DModel,
    x_t: Tensor,
    timestep: Tensor,
    context: Tensor,
    condition: Tensor | None = None,
    image_embeds: Tensor | None = None,
) -> Tensor:
    """Runs the DiT on x_t (B, C, F, h, w) normalised and noisy, timestep (B,) in [0, 1000], context
    (B, L, text_dim); the result is like x_t.

    condition (B, K, F, h, w): mask and latents of the given frames, of an image-to-video model;
    None: zeros, for text alone. image_embeds (B, n, image_dim): of the first one, for a model that
    reads such, others pass over it; None: zeros, too. Raises ValueError as `seen`.
    """
    dtype, config = transformer.proj_out.weight.dtype, transformer.config
    wide = config.in_channels - config.out_channels
    if wide:
        if condition is None:
            condition = x_t.new_zeros(x_t.shape[0], wide, *x_t.shape[2:])
        whole = torch.cat([x_t, condition], 1)
    else:
        whole = x_t
    image = None if config.image_dim is None else seen(transformer, context, image_embeds).to(dtype)
    return transformer(whole.to(dtype), timestep, context.to(dtype), image, return_dict=False)[
        0
    ].to(x_t.dtype)


def seen(
    transformer: WanTransformer3DModel, context: Tensor, image_embeds: Tensor | None
) -> Tensor:
    """Returns the CLIP embeddings that a DiT reads, zeros where there are none: a token, since
    attention to equal ones is the same for any number. Raises ValueError for a model of two
    pictures, and for prompts of another length than diffusers takes this model's to be."""
    config = transformer.config
    if config.pos_embed_seq_len is not None:
        raise ValueError(
            "This DiT reads CLIP embeddings of a first and a last picture together, as "
            "Wan2.1-FLF2V-14B does, which is not supported. Give Wan2.1-I2V-14B, or a base without."
        )
    if context.shape[1] != TEXT_TOKENS:
        raise ValueError(
            f"Prompts of {context.shape[1]} tokens; a DiT that reads a CLIP embedding takes "
            f"{TEXT_TOKENS}. Give wan.prompt_length={TEXT_TOKENS}, also where the latents are "
            "cached."
        )
    if image_embeds is None:
        return context.new_zeros(len(context), 1, config.image_dim)
    return image_embeds


def add_dora(
    transformer: WanTransformer3DModel,
    rank: int,
    alpha: float,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Freezes the DiT and puts DoRA (Liu et al. 2024) on DORA_TARGETS, through PEFT; it starts
    exactly as the base.

    W' = m * (W + s B A) / |W + s B A| per output row, s = alpha / rank. dtype: of the adapters; in
    bfloat16 a magnitude of 1.5 does not move at a learning rate of 1e-4. seed: of A.
    """
    attach_dora(transformer, rank, alpha, dtype)
    start_dora(transformer, seed)


def attach_dora(
    transformer: WanTransformer3DModel, rank: int, alpha: float, dtype: torch.dtype
) -> None:
    """Puts DoRA as `add_dora` does, but without values, on a transformer that has none yet."""
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=DORA_TARGETS, use_dora=True)
    )  # type: ignore
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    for layer in dora_layers(transformer).values():
        dora.fuse(layer)


@torch.no_grad()
def start_dora(transformer: WanTransformer3DModel, seed: int) -> None:
    """Starts A as nn.Linear's weights do, drawn by (seed, layer), whatever the ranks; B = 0; m =
    |W| per row, in fp32, where there is one."""
    for name, layer in dora_layers(transformer).items():
        parts: list[Any] = [
            part["default"]
            for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
            if "default" in part  # plain LoRA has no magnitude
        ]
        base = whole(layer.get_base_layer())
        if base.is_meta:  # shapes without numbers
            continue
        down, up = (part.weight for part in parts[:2])
        # on every device the same; Lightning's default here is the GPU
        values = torch.empty(down.shape, device="cpu")
        nn.init.kaiming_uniform_(
            values, a=math.sqrt(5), generator=generator_for("dora", seed, name)
        )
        # PEFT took the norm in the base's precision
        norm = torch.linalg.vector_norm(base.float(), dim=1)
        starts = (shard_like(values, down), shard_like(torch.zeros(up.shape), up), norm)
        for part, start in zip(parts, starts, strict=False):
            part.weight = nn.Parameter(start.to(base.device, part.weight.dtype))


def dora_layers(transformer: WanTransformer3DModel) -> dict[str, LoraLayer]:
    """Returns every layer that carries DoRA, by its name."""
    return {
        name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)
    }


@torch.no_grad()
def merged_weight(layer: LoraLayer, strength: float = 1.0, device: str | None = None) -> Tensor:
    """Returns W' of one DoRA layer, fp32. strength scales B A but not the magnitude, as the
    released loader's ratio does.

    device: to compute on; the layer's own tensors stay where they are, mapped ones too.
    """
    magnitude, down, up = (
        cast(Tensor, part["default"].weight).to(device, torch.float32)
        for part in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B)
    )
    base = whole(layer.get_base_layer()).to(device, torch.float32)
    made = dora.adapted(base, down, up, strength * layer.scaling["default"])
    return made * dora.gain(magnitude, made)[:, None]


@torch.no_grad()
def merge_dora(transformer: WanTransformer3DModel, strength: float = 1.0) -> None:
    """Puts W' in the place of W and takes the adapters off, a layer at a time. strength: as in
    `merged_weight`."""
    for name, layer in tqdm(
        dora_layers(transformer).items(), desc="merge DoRA", unit="layer", delay=2, leave=False
    ):
        base = layer.get_base_layer()
        if isinstance(base, HeldLinear):
            raise TypeError(f"{name}: merge into whole weights, which a base has by default.")
        base.weight.copy_(merged_weight(layer, strength))
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, base)
    transformer.peft_config = {}
    transformer._hf_peft_config_loaded = False
