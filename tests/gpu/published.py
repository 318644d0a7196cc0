"""Tasks of the published size on a device, with numbers at random in the place of weights."""

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from acetate.blank import blank_vae
from acetate.commands import as_on_gpu
from acetate.commands.estimate import blank_task
from acetate.models.wan import Geometry
from acetate.tasks.example import Load, MeasuredTask
from tests.compose import composed

EXPERIMENTS = {
    "vae_rgba_wan21": ["data.shards=x"],
    "dit_dora_wan21_1b": ["data.latents=x", "rgba_vae=x", "callbacks.samples=null"],
}


def config_of(folder, experiment: str, *overrides: str) -> DictConfig:
    """The config as a machine with a GPU reads it."""
    with as_on_gpu():
        config = composed(folder, f"experiment={experiment}", *EXPERIMENTS[experiment], *overrides)
        config.wan.dtype = str(config.wan.dtype)
        config.trainer.precision = str(config.trainer.precision)
    return config


def filled(task: MeasuredTask, device: str) -> None:
    """Moves what has numbers to the device, and draws those that are missing."""
    made: dict[int, Tensor] = {}  # tied weights stay tied
    generator = torch.Generator(device).manual_seed(0)

    def new(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.detach().to(device)
        value = torch.empty_like(tensor, device=device, requires_grad=False)
        if tensor.ndim < 2 or tensor[0].numel() == 1:  # gains, biases, deviations
            return value.uniform_(0.5, 1, generator=generator)
        return value.normal_(0, tensor[0].numel() ** -0.5, generator=generator)

    for part in task.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    value = new(tensor)
                    if isinstance(tensor, nn.Parameter):
                        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = value
                tensors[name] = made[id(tensor)]


def task_of(config: DictConfig, device: str, blocks: int | None = None) -> MeasuredTask:
    """The task of the config. blocks: of a DiT; all of its blocks are alike."""
    task = blank_task(config)
    judge = getattr(task, "judge", None)
    for transformer in (getattr(task, "transformer", None), judge and judge.transformer):
        if transformer is not None and blocks is not None:
            transformer.blocks = transformer.blocks[:blocks]
    filled(task, device)
    return task


def batch_of(task: MeasuredTask, config: DictConfig, device: str) -> dict:
    """A batch at random, as large as the config says."""
    wan, clip = config.wan, config.data if "frames" in config.data else config.wan
    load = Load(
        config.data.batch_size, clip.frames, clip.height, clip.width,
        prompt_length=wan.prompt_length,
    )  # fmt: skip
    with torch.device(device):
        batch = task.example_batch(load, Geometry.of(blank_vae(wan.vae)))
    generator = torch.Generator(device).manual_seed(1)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.uniform_(0, 1, generator=generator)
    return batch


def loss_of(task: MeasuredTask, batch: dict, device: str) -> Tensor:
    """The task's loss in bf16, as trainer.precision=bf16-mixed computes it."""
    with torch.autocast(device, torch.bfloat16):
        return task.example_loss(batch)
