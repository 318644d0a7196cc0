"""Samples RGBA clips from noise: flow solvers, guidance, mean shift, and decoding in pieces."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor, nn
from tqdm import tqdm

from acetate import flow
from acetate.alpha import one_channel
from acetate.draws import generator_for
from acetate.models.dit import velocity
from acetate.models.rgba_vae import RGBADecoders
from acetate.models.wan import Geometry
from acetate.regions import check_clip_shape

SOLVERS = ("unipc", "euler")


class Scheduler(Protocol):
    """The part of diffusers' schedulers that sampling uses."""

    timesteps: Tensor

    def set_begin_index(self, begin_index: int) -> None: ...

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Solver:
    """Settings of the solver from noise to latents. guidance 1 runs the DiT once a step, without
    the negative prompt. guidance_2: of a low-noise expert; null: as guidance."""

    name: str = "unipc"
    steps: int = 50
    guidance: float = 5.0
    shift: float = 5.0
    guidance_2: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"solver {self.name!r}; known: {', '.join(SOLVERS)}.")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; at least 1. Use 50, or 4 with a few-step LoRA.")

    def scheduler(self, device: torch.device | str) -> Scheduler:
        """Returns a scheduler with timesteps: u = linspace(1, 0, steps + 1)[:-1], sigma = shift u /
        (1 + (shift - 1) u).

        UniPC's, as diffusers sets them, are whole timesteps, close to these.
        """
        if self.name == "euler":
            euler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
            euler.set_timesteps(
                sigmas=np.linspace(1, 0, self.steps + 1)[:-1].tolist(), device=device
            )
            return cast(Scheduler, euler)
        unipc = UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.shift,
            num_train_timesteps=1000,
        )
        unipc.set_timesteps(self.steps, device=device)
        return cast(Scheduler, unipc)


@dataclass(frozen=True)
class LowNoise:
    """The second of Wan2.2's two experts, for timesteps below 1000 boundary."""

    transformer: WanTransformer3DModel
    boundary: float

    def first(self, timesteps: Tensor) -> int:
        """Returns the first step, of timesteps that fall, that is this expert's."""
        return int((timesteps >= 1000 * self.boundary).sum())


@dataclass(frozen=True)
class EllipsePath:
    """A guide that moves evenly from its first to its last frame.

    centre: (x, y) as shares of width and height. axes: full major and minor length as shares of the
    shorter side. angle: degrees from x towards y. The end_ values default to the first ones.
    """

    centre: tuple[float, float] = (0.5, 0.5)
    axes: tuple[float, float] = (0.7, 0.7)
    angle: float = 0.0
    end_centre: tuple[float, float] | None = None
    end_axes: tuple[float, float] | None = None
    end_angle: float | None = None

    def __post_init__(self) -> None:
        for name, axes in (("axes", self.axes), ("end_axes", self.end_axes)):
            if axes is not None and min(axes) <= 0:
                raise ValueError(
                    f"guide.{name}={list(axes)}; lengths are positive shares of the shorter side."
                )

    def ellipses(self, frames: int, height: int, width: int) -> Tensor:
        """Returns (1, F, 5) in cells of a latent grid, as `regions.fit_ellipses` gives them;
        `regions.gaussian` draws them."""
        short = min(height, width)
        start = [*self.centre, *self.axes, self.angle]
        end = [*(self.end_centre or self.centre), *(self.end_axes or self.axes)]
        end.append(self.angle if self.end_angle is None else self.end_angle)
        along = torch.linspace(0, 1, frames, dtype=torch.float64)[:, None]
        path = (
            torch.tensor(start, dtype=torch.float64) * (1 - along)
            + torch.tensor(end, dtype=torch.float64) * along
        )
        scale = torch.tensor([width, height, short, short, 1], dtype=torch.float64)
        # A share of 0.5 is the middle of the picture: between the cells (w - 1) / 2, counted from
        # their centres
        offset = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=torch.float64)
        return (path * scale - offset)[None]


def check_size(
    frames: int, height: int, width: int, geometry: Geometry, patch: Sequence[int]
) -> None:
    """Raises ValueError for a clip that the VAE or the DiT cannot make."""
    check_clip_shape(frames, height, width, geometry.time_stride, geometry.space_stride * patch[1])


def initial_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    guide: Tensor | None,
    mean_shift: float,
    device: torch.device | str,
) -> Tensor:
    """Draws (B, C, F, h, w), the same for a seed in any batch and on any device, shifted outside of
    the guide.

    guide: G in [0, 1], (1 or B, 1, F, h, w), as of `regions.gaussian`.

    A model that was trained with a shift and is sampled without a guide gets no subject: that
    warns.
    """
    draws = [torch.randn(tuple(shape), generator=generator_for("sample", seed)) for seed in seeds]
    noise = torch.stack(draws).to(device)
    if guide is None:
        if mean_shift:
            warnings.warn(
                f"This DiT was trained with a mean shift of {mean_shift}, and no guide says where "
                "the subject is: clips may be empty or full. Give guide.centre=[0.5,0.5] "
                "guide.axes=[0.7,0.7] or guide.clip=FILE.",
                stacklevel=2,
            )
        return noise
    if not mean_shift:
        raise ValueError(
            "A guide does nothing without a mean shift. Give mean_shift=0.05, or no guide."
        )
    return flow.mean_shift(noise, guide.to(device), mean_shift)


@torch.no_grad()
def sample_latents(
    transformer: WanTransformer3DModel,
    noise: Tensor,
    context: Tensor,
    negative: Tensor,
    solver: Solver,
    progress: bool = True,
    low: LowNoise | None = None,
    offload: bool = False,
    condition: Tensor | None = None,
    hold: bool = False,
    image_embeds: Tensor | None = None,
) -> Tensor:
    """Returns normalised latents like noise (B, C, F, h, w). context (B, L, D); negative (1, L, D)
    is used by guidance. low: takes over from `transformer` where its steps begin; offload: and its
    place on the device. condition, image_embeds: as of `velocity`; guidance leads away from the
    negative prompt under the same ones. hold: the condition's first latent frame, which a causal
    VAE gives the whole clip, too, goes from noise to itself on a straight line, and the others see
    it on its way."""
    scheduler = solver.scheduler(noise.device)
    scheduler.set_begin_index(0)  # else it looks for its first timestep, and the GPU's answer
    x, guidance = noise, solver.guidance
    switch = None if low is None else low.first(scheduler.timesteps)
    negative = negative.expand_as(context)
    first = None if condition is None or not hold else condition[:, -x.shape[1] :, :1]
    steps = tqdm(scheduler.timesteps, desc="sample", unit="step", disable=not progress, leave=False)
    for step, t in enumerate(steps):
        if low is not None and step == switch:
            if offload:
                transformer.cpu()
                cast(nn.Module, low.transformer).to(noise.device)
            transformer = low.transformer
            guidance = guidance if solver.guidance_2 is None else solver.guidance_2
        timestep = t.to(noise.device, torch.float32).expand(len(x))
        v = velocity(transformer, x, timestep, context, condition, image_embeds)
        if guidance != 1:
            without = velocity(transformer, x, timestep, negative, condition, image_embeds)
            v = without + guidance * (v - without)
        if first is not None:
            v = torch.cat([(noise[:, :, :1] - first).to(v), v[:, :, 1:]], 2)
        x = scheduler.step(v.float(), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def decode(
    vae: RGBADecoders, latents: Tensor, clips_at_once: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields rgb (3, T, H, W) and alpha (1, T, H, W) of every clip, on the CPU; `vae.chunk` bounds
    the memory."""
    for part in torch.split(latents, clips_at_once):
        rgb, alpha = vae.decode(vae.denormalise(part.float()))
        yield from zip(rgb.float().cpu(), one_channel(alpha.float()).cpu(), strict=True)


def sample_clips(
    transformer: WanTransformer3DModel,
    vae: RGBADecoders,
    context: Tensor,
    negative: Tensor,
    *,
    seeds: Sequence[int],
    size: tuple[int, int, int],
    guide: Tensor | None,
    mean_shift: float,
    solver: Solver,
    device: torch.device | str,
    offload: bool = False,
    progress: bool = True,
    low: LowNoise | None = None,
    condition: Tensor | None = None,
    hold: bool = False,
    image_embeds: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields rgb (3, T, H, W) and alpha (1, T, H, W) of every seed, on the CPU.

    context (B, L, D), negative (1, L, D): of the prompts. size: frames, height, width in pixels.
    guide: G in [0, 1], (1 or B, 1, F, h, w). offload: only the model at work is on the device, the
    others wait on the CPU. low: the low-noise expert, where `transformer` is the other one.
    condition (B, K, F, h, w), image_embeds (B, n, D): of the given frames, of an image-to-video
    model; hold: as of `sample_latents`.
    """
    noise = initial_noise(seeds, vae.latent_shape(*size), guide, mean_shift, device)
    if offload:
        vae.cpu()
        cast(nn.Module, transformer).to(device)
    latents = sample_latents(
        transformer,
        noise,
        context.to(device),
        negative.to(device),
        solver,
        progress,
        low,
        offload,
        None if condition is None else condition.to(device),
        hold,
        None if image_embeds is None else image_embeds.to(device),
    )
    if offload:
        transformer.cpu()
        if low is not None:
            low.transformer.cpu()
    yield from decode(vae.to(device), latents)
    if offload:
        vae.cpu()
