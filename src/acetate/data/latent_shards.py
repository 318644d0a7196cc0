"""Reads latent shards: webdataset tars of `<key>.safetensors` and `<key>.json`, and the embedding
of an empty prompt.

The manifest beside them is as that of clip shards, with `kind` and what the latents were made with.
"""

from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor, uint8

from acetate.data.shards import (
    HOW_TO_MAKE,
    ShardError,
    TarRef,
    blame,
    find_samples,
    read_media,
    read_meta,
)
from acetate.data.store import Folder, read_file

EMPTY_PROMPT = "empty_prompt.safetensors"
MOST_EMPTY = 2**26  # bytes of it
# latents (C, F, h, w), perhaps condition like them and image_embeds (n, D), ellipse (F, 5),
# coverage (F, h, w) in uint8 (not in older caches), prompt_embeds (n, D), prompt_mask (n,), prompt,
# ref
Sample = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentRef(TarRef):
    """One window of a clip over one background. shape: latent (F, h, w); channels: of the latent;
    tokens: of its prompt. condition: the frames that are encoded alone, too; None: none. image:
    tokens and width of the first one's CLIP embedding; None: there is none."""

    clip: str
    variant: int
    channels: int
    shape: tuple[int, int, int]
    tokens: int
    condition: str | None = None
    image: tuple[int, int] | None = None

    @property
    def window(self) -> str:
        return self.key.rpartition("-v")[0]


def index_latents(folder: Folder, manifest: dict[str, Any]) -> list[LatentRef]:
    """Returns every sample that the manifest promises; one that its local tar lacks has a
    `problem`."""
    refs = []
    channels = manifest["geometry"]["channels"]
    given, image = manifest.get("condition"), manifest.get("image_encoder")
    embeds = image and (image["tokens"], image["width"])
    for shard in manifest["shards"]:
        places = find_samples(
            folder, shard, [(entry["key"], "safetensors") for entry in shard["samples"]]
        )
        for entry, place in zip(shard["samples"], places, strict=True):
            facts = {**entry, **place, "channels": channels, "shape": tuple(entry["shape"])}
            refs.append(LatentRef(**facts, condition=given, image=embeds, kind="safetensors"))
    return refs


def read_latents(ref: LatentRef, width: int | None = None) -> Sample:
    """Reads a sample as it is stored. Raises BadClip with the reason if anything is wrong with it.

    width: of prompt embeddings, where it is known.
    """
    data, meta = read_media(ref), read_meta(ref)
    with blame(ref):
        sample: Sample = safetensors.torch.load(data)
        embeds = sample["prompt_embeds"]
        promised = {
            "latents": (ref.channels, *ref.shape),
            "ellipse": (ref.shape[0], 5),
            "prompt_embeds": (ref.tokens, embeds.shape[-1] if width is None else width),
        }
        if ref.condition is not None:
            promised["condition"] = promised["latents"]
        if ref.image is not None:
            promised["image_embeds"] = ref.image
        for name, shape in promised.items():
            value = sample[name]
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} {tuple(value.shape)}; promised {shape}")
            if not value.is_floating_point() or value.itemsize < 2:
                raise ValueError(f"{name} of {value.dtype}; needed: a float of 16 bits or more")
            if not value.float().isfinite().all():
                raise ValueError(f"{name}: values that are not finite")
        covered = sample.get("coverage")
        if covered is not None and (tuple(covered.shape), covered.dtype) != (ref.shape, uint8):
            raise ValueError(
                f"coverage {covered.dtype} {tuple(covered.shape)}; promised {uint8} {ref.shape}"
            )
    return sample | {"prompt": meta["prompt"], "ref": ref}


def read_empty_prompt(folder: Folder) -> Tensor:
    """Reads the embedding (n, D) of an empty prompt. Raises ShardError where it cannot be read."""
    try:
        embeds = safetensors.torch.load(read_file(folder, EMPTY_PROMPT, MOST_EMPTY))["embeds"]
        if embeds.ndim != 2 or not embeds.is_floating_point():
            raise ValueError(
                f"embeds is {embeds.dtype} {tuple(embeds.shape)}, must be float (n, D)"
            )
        if not embeds.float().isfinite().all():
            raise ValueError("embeds: values that are not finite")
        return embeds
    except Exception as error:  # safetensors has several
        raise ShardError(
            f"{folder}/{EMPTY_PROMPT} cannot be read ({type(error).__name__}: {error}). "
            f"{HOW_TO_MAKE['latents']}"
        ) from error
