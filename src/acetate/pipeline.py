"""Trained models as one object each: prompts to transparent clips, clips to latents and back."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from acetate.alpha import harden, over
from acetate.assembly import (
    check_experts,
    check_guided,
    check_hash,
    check_models,
    check_pictured,
    load_dit,
)
from acetate.clips import Clip, background_of
from acetate.commands import device_of, inherited
from acetate.commands.checks import check_settings
from acetate.commands.recorded import quoted
from acetate.formats.rgba_vae import load_rgba_vae
from acetate.guides import (
    Guide,
    Pictures,
    check_pictures,
    condition_of,
    draw,
    for_each,
    outline,
    read_still,
)
from acetate.models import experts
from acetate.models.condition import check_condition
from acetate.models.image_encoder import encoder_of
from acetate.models.rgba_vae import DECODERS_ONLY, RGBADecoders
from acetate.models.rgba_vae import RGBAVAE as Encoding
from acetate.models.text import TextEncoder
from acetate.sampling import LowNoise, Solver, check_size, decode, sample_clips


class RGBAPipeline:
    """Makes transparent clips of prompts: text encoder, DiT with its DoRA, RGBA-VAE.

        pipeline = RGBAPipeline.load("outputs/demo_dit")
        for clip in pipeline("a ring of fire", guide=EllipsePath(centre=(0.3, 0.5))):
            clip.save("ring.mov")

    Every part is loaded when it is first needed, and the text encoder is gone before the DiT comes.
    `facts` is what the DoRA says of itself.
    """

    def __init__(self, config: DictConfig) -> None:
        """Takes the composed config of `acetate sample`; `load` makes it."""
        self.config, self.device = config, device_of(config)

    @classmethod
    def load(cls, dora: str | None = "outputs/demo_dit", **settings: Any) -> "RGBAPipeline":
        """Returns a pipeline with the DoRA of a run, a checkpoint or a file; None: the base alone.

        settings: of `acetate sample`, such as rgba_vae, wan, device, decode_chunk, offload,
        few_step={"lora": FILE}. What is not given is what the run of the DoRA recorded. Raises
        SettingError for a value that breaks its rule, FileNotFoundError and ValueError where a file
        is missing or is of another kind or base.
        """
        return cls(_config({"dora": dora, **settings}))

    @cached_property
    def vae(self) -> RGBADecoders:
        """The RGBA-VAE, or its decoders alone where the files hold no more; without rgba_vae the
        plain VAE, of a joint model."""
        source = self.config.rgba_vae
        return load_rgba_vae(
            vae=self.config.wan.vae,
            adapters=source if source is None or isinstance(source, str) else list(source),
            chunk=self.config.decode_chunk,
            frozen_dtype=self.config.wan.dtype,
        )

    @cached_property
    def _dit(self) -> tuple[WanTransformer3DModel, dict[str, Any]]:
        return load_dit(self.config, "cpu" if self.config.offload else self.device)

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The DiT, with DoRA and few-step LoRA merged into its weights; of two experts that of high
        noise."""
        return self._dit[0]

    @cached_property
    def low_noise(self) -> LowNoise | None:
        """The low-noise expert, as `transformer`, of a base that has two."""
        wan = self.config.wan
        if wan.transformer_2 is None:
            return None
        transformer, facts = load_dit(
            self.config, "cpu" if self.config.offload else self.device, "low"
        )
        experts.check_pair(self.facts, facts)
        return LowNoise(transformer, wan.boundary)

    @property
    def facts(self) -> dict[str, Any]:
        """The metadata of the DoRA's file; empty without one."""
        return self._dit[1]

    @property
    def mean_shift(self) -> float:
        """The mean shift of the noise: as set, else as the DoRA was trained with."""
        shift = self.config.mean_shift
        return self.facts.get("mean_shift", 0.0) if shift is None else shift

    def __call__(self, prompts: str | Sequence[str], **settings: Any) -> list[Clip]:
        """Returns the clips of the prompts, one each; settings as of `stream`."""
        return list(self.stream(prompts, **settings))

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guide: Guide | Sequence[Guide] | None = None,
        seed: int | None = None,
        solver: Solver | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        batch_size: int | None = None,
        image: Pictures | None = None,
        last_image: Pictures | None = None,
    ) -> Iterator[Clip]:
        """Yields clips as they are made; place n has seed + n, and a seed gives the same clip.

        frames: 4k+1. height, width: multiples of the VAE's stride times the DiT's patch. guide: of
        all or each prompt; else fitted to the alpha of `image`, the first frame (last_image: the
        last). solver: or steps and guidance alone. Raises ValueError for what cannot be made.
        """
        config = self.config
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        size = (frames or config.frames, height or config.height, width or config.width)
        solver = solver or solver_of(config, steps, guidance)
        first, at_once = config.seed if seed is None else seed, batch_size or config.batch_size
        self._check_asked(image, last_image, len(prompts))
        negative = config.negative_prompt if negative_prompt is None else negative_prompt
        words, text_sha256 = self.embed([*prompts, negative])
        self._check(size, text_sha256, guided=guide is not None or bool(self.mean_shift))
        condition, of_picture = self.condition(image, last_image, len(prompts), size)
        embeds = self.look_at(image, len(prompts), size)
        guide = of_picture if guide is None and self.mean_shift else guide
        guides, outlines = self._draw(guide, len(prompts), size)
        parts = [slice(start, start + at_once) for start in range(0, len(prompts), at_once)]
        for part in tqdm(parts, desc="clips", unit="batch", disable=len(parts) < 2):
            seeds = [first + n for n in range(len(prompts))[part]]
            made = sample_clips(
                self.transformer,
                self.vae,
                torch.stack([words[prompt] for prompt in prompts[part]]),
                words[negative][None],
                seeds=seeds,
                size=size,
                guide=None if guides is None else guides[part],
                mean_shift=self.mean_shift,
                solver=solver,
                device=self.device,
                offload=config.offload,
                low=self.low_noise,
                condition=None if condition is None else condition[part],
                hold=config.hold,
                image_embeds=None if embeds is None else embeds[part],
            )
            for (rgb, alpha), prompt, number, line in zip(
                made, prompts[part], seeds, outlines[part], strict=True
            ):
                yield Clip(rgb, alpha, config.fps, prompt, number, line)

    def _check_asked(self, image: Pictures | None, last_image: Pictures | None, count: int) -> None:
        """Raises what keeps `count` prompts from being made, before a text encoder is loaded."""
        check_experts(self.config)
        check_pictures(image, last_image, count)
        if image is not None:
            check_pictured(self.config)

    def _check(self, size: tuple[int, int, int], text_sha256: str, guided: bool) -> None:
        """Raises ValueError for a size, models or a guide that do not fit the DiT."""
        check_size(*size, self.vae.geometry, self.transformer.config["patch_size"])
        check_models(self.facts, self.vae, text_sha256)
        check_guided(self.facts, guided)

    def embed(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], str]:
        """Returns prompt -> its context (L, D), and the encoder's hash. The encoder is gone after
        it."""
        text = TextEncoder(self.config.wan.text_encoder, self.config.wan.prompt_length, self.device)
        each = list(dict.fromkeys(prompts))
        return dict(zip(each, text.context(each, truncate=True), strict=True)), text.sha256()

    def condition(
        self,
        image: Pictures | None,
        last_image: Pictures | None,
        count: int,
        size: tuple[int, int, int],
    ) -> tuple[Tensor | None, list[Guide] | None]:
        """Returns the conditions (count, K, F, h, w) of pictures, and guides that are fitted to
        their alpha; None without a picture. Raises ValueError as `stream`."""
        if image is None:
            return None, None
        check_condition(self.transformer, self.vae.geometry)
        trained = self.facts.get("condition", {}).get("given", "first_last")
        if last_image is not None and trained == "first":
            raise ValueError(
                "This DoRA was trained with first frames alone. Leave last_image= away, or train "
                "one on latents of condition=first_last."
            )
        vae = self.vae.to(self.device)
        if not isinstance(vae, Encoding):
            raise ValueError(f"rgba_vae={self.config.rgba_vae}: {DECODERS_ONLY}")
        first, last = (for_each(picture, count) for picture in (image, last_image))
        pairs = [*zip(first, last, strict=True)]
        made = {pair: condition_of(vae, *pair, size, self.device) for pair in dict.fromkeys(pairs)}
        return torch.cat([made[pair][0] for pair in pairs]), [made[pair][1] for pair in pairs]

    def look_at(
        self, image: Pictures | None, count: int, size: tuple[int, int, int]
    ) -> Tensor | None:
        """Returns the CLIP embeddings (count, n, D) of the pictures; None without one, and for a
        DiT that reads none. The image encoder is gone after it. Raises ValueError as `stream`."""
        if image is None or self.transformer.config["image_dim"] is None:
            return None
        encoder = encoder_of(self.transformer, self.config.wan.image_encoder, self.device)
        assert encoder is not None
        check_hash(self.facts, "image_encoder_sha256", encoder.sha256())
        files = for_each(image, count)
        stills = {file: read_still(file, *size[1:]) for file in dict.fromkeys(files) if file}
        made = {file: encoder(rgb[None, :, 0], a[None, :, 0]) for file, (rgb, a) in stills.items()}
        return torch.cat([made[file] for file in files if file])

    def _draw(
        self, guide: Guide | Sequence[Guide] | None, count: int, size: tuple[int, int, int]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Returns G (B, 1, F, h, w) and the outlines of `count` clips."""
        if guide is None:
            return None, [None] * count
        guides = list(guide) if isinstance(guide, Sequence) else [guide]
        if len(guides) not in (1, count):
            raise ValueError(
                f"{len(guides)} guides for {count} prompts; give one, or one for each."
            )
        fit = self.facts.get("ellipse", {})
        drawn = [draw(one, size, self.vae.geometry, fit) for one in guides]
        grid = self.vae.geometry.latent_shape(*size)[1:]
        lines = [outline(ellipses, grid, size[0]) for _, ellipses in drawn]
        times = count // len(drawn)
        return torch.cat([mask for mask, _ in drawn] * times), [*lines * times]


class RGBAVAE:
    """A trained RGBA-VAE, which turns clips into latents and latents into clips.

    vae = RGBAVAE.load("outputs/demo")
    latents = vae.encode(Clip.read("smoke.webm"))
    """

    def __init__(self, model: RGBADecoders, device: str) -> None:
        """Takes a model as `load_rgba_vae` gives it."""
        self.model, self.device = model.to(device), device

    @classmethod
    def load(cls, rgba_vae: str | Sequence[str] = "outputs/demo", **settings: Any) -> "RGBAVAE":
        """Returns the RGBA-VAE of a run, a checkpoint or a file; settings: wan, decode_chunk,
        device.

        Raises FileNotFoundError and ValueError where a file is missing or is of another kind or
        base.
        """
        source = rgba_vae if isinstance(rgba_vae, str) else list(rgba_vae)
        pipeline = RGBAPipeline(_config({"dora": None, "rgba_vae": source, **settings}))
        return cls(pipeline.vae, pipeline.device)

    @torch.no_grad()
    def encode(self, clip: Clip, background: str = "key") -> Tensor:
        """Returns normalised latents (1, C, F, h, w), as the DiT sees them.

        background: what the encoder finds behind the hard-rendered subject. Raises ValueError for a
        clip that is not 4k+1 frames of sides that the stride divides, and for files that only
        decode.
        """
        rgb = clip.rgb[None].to(self.device).clamp(-1, 1)
        alpha = clip.alpha[None].to(self.device).clamp(0, 1)
        hard = over(rgb, harden(alpha), background_of(background)[None].to(rgb))
        return self.model.normalise(self.model.encode(hard, alpha))

    def decode(self, latents: Tensor, fps: float = 16.0) -> list[Clip]:
        """Returns the clips of normalised latents (B, C, F, h, w)."""
        return [Clip(rgb, alpha, fps) for rgb, alpha in decode(self.model, latents.to(self.device))]


def _config(settings: Mapping[str, Any]) -> DictConfig:
    """Composes the config of `acetate sample` with these settings, as its command line would make
    it."""
    from acetate.commands.program import composed  # which imports Hydra's plugins

    given = [f"{name}={quoted(value)}" for name, value in settings.items()]
    config = composed("command/sample", [*inherited.sample(given), *given])
    check_settings("sample", config)
    return config


def solver_of(
    config: DictConfig, steps: int | None = None, guidance: float | None = None
) -> Solver:
    """Builds the solver of a config of `acetate sample`: as its base is sampled, but a few-step
    LoRA means 4 steps without guidance, unless they are given. guidance alone is both experts'."""
    few, wan = config.few_step.lora is not None, config.wan
    steps = config.steps if steps is None else steps
    guidance = config.guidance if guidance is None else guidance
    second = config.guidance_2
    if second is None and guidance is None and not few:
        second = wan.guidance_2
    return Solver(
        name=config.solver,
        shift=config.shift,
        steps=(4 if few else wan.steps) if steps is None else steps,
        guidance=(1.0 if few else wan.guidance) if guidance is None else guidance,
        guidance_2=second,
    )
