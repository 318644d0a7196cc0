"""Makes the samples of latent shards from pieces of clips, one tar at a time; and embeds their
prompts, each once."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from acetate.alpha import PALETTE_NAMES, harden, over, palette
from acetate.data.shards import BadClip, read_clip, read_meta
from acetate.data.writer import ShardTar, read_part, write_part
from acetate.formats.rgba_vae import load_rgba_vae, read_rgba_vae
from acetate.models.condition import condition_latents
from acetate.models.image_encoder import ImageEncoder
from acetate.models.plain_vae import PlainVAE
from acetate.models.rgba_vae import DECODERS_ONLY, RGBAVAE
from acetate.models.text import TextEncoder
from acetate.regions import coverage, fit_ellipses
from acetate.replacing import writing
from data_prep.kept_latents import Kept, text_of
from data_prep.latent_plan import Piece, Settings, cut, placement

log = logging.getLogger(__name__)
Report = Callable[[int, dict[str, str]], None]  # samples done; key -> reason of bad clips
Made = tuple[dict[str, Any], dict[str, Any]]  # as `made` returns it


@dataclass(frozen=True)
class Sources:
    """Models, as load_rgba_vae and TextEncoder take them."""

    vae: str
    rgba_vae: str | None  # None: the plain VAE, of scheme=joint
    text_encoder: str
    prompt_length: int  # tokens that the DiT reads
    frozen_dtype: str  # the VAE computes in
    chunk: int | None = None  # latent frames at a time
    long_prompts: str = "error"  # or truncate: prompts of more than prompt_length tokens
    scheme: str = "rgba"  # or joint: latents of colour and of alpha, by the plain VAE
    image_encoder: str | None = None  # of a base that reads CLIP embeddings of given frames

    def __post_init__(self) -> None:
        if self.scheme == "joint" and self.rgba_vae is not None:
            raise ValueError(
                f"rgba_vae={self.rgba_vae}: scheme=joint encodes with the plain VAE of wan=. Leave "
                "rgba_vae out, or scheme=rgba."
            )
        if self.scheme == "rgba" and self.rgba_vae is None:
            raise ValueError(
                "rgba_vae has no value: scheme=rgba encodes with a trained RGBA-VAE. Give "
                "rgba_vae=RUN, or scheme=joint for the plain VAE."
            )

    @property
    def eps(self) -> float:
        """The alpha up to which a clip is empty: what the adapters were trained with."""
        return 0.0 if self.rgba_vae is None else read_rgba_vae(self.rgba_vae)[2]["eps"]

    def load_vae(self) -> RGBAVAE | PlainVAE:
        vae = load_rgba_vae(
            vae=self.vae, adapters=self.rgba_vae, chunk=self.chunk, frozen_dtype=self.frozen_dtype
        )
        if not isinstance(vae, RGBAVAE | PlainVAE):
            raise ValueError(f"rgba_vae={self.rgba_vae}: {DECODERS_ONLY}")
        return vae


@dataclass(frozen=True)
class Run:
    """The facts that every process of a run knows."""

    out: Path
    made_by: dict[str, Any]
    sources: Sources
    settings: Settings
    kept: Kept | None  # latents to take over

    def tar(self, number: int) -> Path:
        return self.out / f"latents-{number:06d}.tar"

    def done(self, number: int) -> dict[str, Any] | None:
        """Returns what is noted of a finished tar, as acetate.data.writer.read_part."""
        return read_part(self.tar(number), self.made_by)

    def prompt(self, text: str) -> Path:
        """Returns where the embedding of a text lies until the manifest is written."""
        parts = json.dumps([self.made_by["settings"]["text_encoder_sha256"], text])
        return self.out / "prompts" / f"{hashlib.sha256(parts.encode()).hexdigest()}.safetensors"


class Encoder:
    """Makes the samples of latent shards; its models stay loaded between tars."""

    def __init__(self, run: Run, vae: RGBAVAE | PlainVAE, device: str):
        self.run, self.settings, self.device = run, run.settings, device
        self.vae, self.eps = vae.to(device), run.made_by["settings"]["eps"]
        self.kept = run.kept
        embeds = "image_encoder" in run.made_by["settings"]
        self.image_encoder = (
            ImageEncoder(str(run.sources.image_encoder), device) if embeds else None
        )

    def tar(self, number: int, pieces: Sequence[Piece], report: Report) -> dict[str, str]:
        """Writes tar `number` with its part and returns key -> reason of its bad clips."""
        target = self.run.tar(number)
        entries: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        if self.kept and (shard := self.kept.tar(pieces, target)):
            report(len(pieces), {})
        else:
            # A name of this process alone: that of one that was thought dead may go on.
            with ShardTar(target, target.with_name(f"{target.name}.{uuid4().hex[:8]}")) as tar:
                for _, group in groupby(pieces, key=lambda piece: piece.ref.key):
                    mine = list(group)
                    for made in self.clip(mine):
                        if isinstance(made, BadClip):
                            skipped.setdefault(made.key, made.reason)
                            report(0, {made.key: made.reason})
                        else:
                            tar.write(made[0])
                            entries.append(made[1])
                    report(len(mine), {})
                shard = {**tar.finish(), "samples": entries}
        write_part(target, self.run.made_by, shard, skipped=skipped)
        return skipped

    def clip(self, pieces: Sequence[Piece]) -> Iterator[Made | BadClip]:
        """Yields the samples of one clip, or a BadClip in the place of one; a single BadClip if the
        clip cannot be read."""
        ref = pieces[0].ref
        kept = {
            piece: found for piece in pieces if self.kept and (found := self.kept.sample(piece))
        }
        try:
            meta = read_meta(ref)
            frames = (
                torch.from_numpy(read_clip(ref).frames)
                if len(kept) < len(pieces)
                else torch.empty(0)
            )
        except BadClip as bad:
            yield bad
            return
        for _, group in groupby(pieces, key=lambda piece: piece.window):
            shown = None
            for piece in group:
                said = {**meta, "clip_crc32": ref.crc32, "background": self.settings.behind(piece)}
                if piece in kept:
                    tensors, prompt = kept[piece]
                    if not (self.kept and self.kept.same_text and prompt == meta["prompt"]):
                        tensors |= self.text(meta["prompt"])
                    yield made(piece, tensors, said)
                    continue
                if shown is None or self.settings.smallest < 1:
                    shown = self.view(frames, piece)
                rgb, alpha, ellipses = shown
                stride = self.vae.geometry
                covered = coverage(alpha, stride.time_stride, stride.space_stride)[0, 0]
                covered = (255 * covered).round().to(torch.uint8).cpu()
                encoded = self.latents(rgb, alpha, PALETTE_NAMES.index(said["background"]))
                again = encoded["latents"].shape[1] // len(covered)
                if all(value.isfinite().all() for value in encoded.values()):
                    tensors = {
                        **encoded,
                        # one for each latent frame, also of alpha's own
                        "ellipse": ellipses[0].repeat(again, 1).float().cpu(),
                        "coverage": covered.repeat(again, 1, 1),
                        **self.text(meta["prompt"]),
                    }
                    yield made(piece, tensors, said)
                else:
                    where = f"window {piece.window}, variant {piece.variant}"
                    yield BadClip(
                        ref.key, f"{where}: latents are not finite in {self.settings.dtype}"
                    )

    def text(self, prompt: str) -> dict[str, Tensor]:
        """Returns the tensors that a sample holds of its prompt."""
        embeds = load_file(self.run.prompt(prompt))["embeds"]
        return {"prompt_embeds": embeds, "prompt_mask": torch.ones(len(embeds), dtype=torch.bool)}

    def view(self, frames: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rgb (1, 3, T, H, W), alpha (1, 1, T, H, W) and ellipses (1, F, 5) of a window as
        the variant places it."""
        where = placement(self.settings.seed, self.settings.smallest, piece)
        rgb, alpha = (x.to(self.device) for x in cut(frames, piece, where))
        geometry = self.vae.geometry
        return (
            rgb,
            alpha,
            fit_ellipses(
                alpha, geometry.time_stride, geometry.space_stride, **self.settings.ellipse
            ),
        )

    @torch.inference_mode()
    def latents(self, rgb: Tensor, alpha: Tensor, color: int) -> dict[str, Tensor]:
        """Returns latents (C, F, h, w), and as condition those of the given frames alone where the
        settings name such, normalised, with image_embeds (n, D) where the base reads such; on the
        CPU, in the stored dtype."""
        hard = over(rgb, harden(alpha, self.eps), palette(rgb.device)[color])
        made = {"latents": self.vae.normalise(self.vae.encode(hard, alpha))}
        if self.settings.condition != "none":
            made["condition"] = condition_latents(self.vae, hard, alpha, self.settings.condition)
        if self.image_encoder is not None:
            made["image_embeds"] = self.image_encoder(rgb[:, :, 0], alpha[:, :, 0])
        dtype = self.settings.torch_dtype
        return {name: value[0].to(dtype).cpu().contiguous() for name, value in made.items()}


def made(piece: Piece, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> Made:
    """Returns a sample as the tar holds it, and its entry in the manifest."""
    data = save(tensors)
    common = {"clip": piece.ref.key, "variant": piece.variant, "split": piece.ref.split}
    sizes = {"shape": list(tensors["latents"].shape[1:]), "tokens": len(tensors["prompt_embeds"])}
    member = {"__key__": piece.key, "safetensors": data, "json": text_of(piece, meta)}
    return member, {"key": piece.key, **common, **sizes, "crc32": crc32(data)}


def embed_prompts(run: Run, encoder: TextEncoder, pieces: Iterable[Piece]) -> None:
    """Embeds every distinct prompt once, the empty one too, but those that kept samples hold.
    Raises ValueError as check_lengths."""
    with writing(run.out / "prompts"):
        (run.out / "prompts").mkdir(parents=True, exist_ok=True)
    prompts = {"": [""]}
    for _, group in groupby(pieces, key=lambda piece: piece.ref.key):
        mine = list(group)
        with suppress(BadClip):  # counted where the clip is read
            text = read_meta(mine[0].ref)["prompt"]
            if not (run.kept and all(run.kept.has_text(piece, text) for piece in mine)):
                prompts.setdefault(text, []).append(mine[0].ref.key)
    missing = {text: keys[0] for text, keys in prompts.items() if not run.prompt(text).exists()}
    truncate = run.sources.long_prompts == "truncate"
    check_lengths(encoder, {text: prompts[text] for text in missing}, truncate)
    for text, key in tqdm(missing.items(), unit="prompt", disable=not missing):
        stored = encoder(text, truncate).to(run.settings.torch_dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"{key}: its prompt's embedding is not finite in {run.settings.dtype}; use "
                "dtype=bfloat16"
            )
        path = run.prompt(text)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with writing(path):
            temporary.write_bytes(save({"embeds": stored}))
            temporary.replace(path)


def check_lengths(
    encoder: TextEncoder, prompts: Mapping[str, Sequence[str]], truncate: bool
) -> None:
    """Checks that prompts fit: ValueError, or with `truncate` a warning, names all that are too
    long. prompts: text -> keys of its clips."""
    counts = {text: encoder.tokens(text) for text in prompts}
    long = [(key, n) for text, n in counts.items() if n > encoder.length for key in prompts[text]]
    if not long:
        return
    named = ", ".join(f"{key} ({count})" for key, count in sorted(long))
    said = (
        f"{len(long)} clips have prompts of more tokens than the {encoder.length} that the DiT "
        f"reads: {named}"
    )
    if truncate:
        log.warning("%s. Their first %d are read", said, encoder.length)
        return
    raise ValueError(
        f"{said}. Shorten them (acetate prep caption prompts=FILE overwrite=all), or give "
        "long_prompts=truncate to read the beginning alone."
    )
