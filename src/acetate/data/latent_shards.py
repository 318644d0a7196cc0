"""Reads latent shards: webdataset tars of `<key>.safetensors` and `<key>.json`, and the embedding
of an empty prompt.

The manifest beside them is as that of clip shards, with `kind` and what the latents were made with.
"""

from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from acetate.data.shards import (
    HOW_TO_MAKE,
    ShardError,
    TarRef,
    blame,
    blame_manifest,
    find_samples,
    read_media,
    read_meta,
)
from acetate.data.store import Folder, read_file

EMPTY_PROMPT = "empty_prompt.safetensors"
# latents (C, F, h, w), ellipse (F, 5), prompt_embeds (n, D), prompt_mask (n,), prompt, ref
Sample = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentRef(TarRef):
    """One window of a clip over one background. shape: latent (F, h, w); tokens: of its prompt."""

    clip: str
    variant: int
    shape: tuple[int, int, int]
    tokens: int

    @property
    def window(self) -> str:
        return self.key.rpartition("-v")[0]


def index_latents(folder: Folder, manifest: dict[str, Any]) -> list[LatentRef]:
    """Every sample that the manifest promises; one that its local tar lacks has a `problem`."""
    refs = []
    with blame_manifest(folder, "latents"):
        for shard in manifest["shards"]:
            places = find_samples(
                folder, shard, [(entry["key"], "safetensors") for entry in shard["samples"]]
            )
            for entry, place in zip(shard["samples"], places, strict=True):
                facts = {**entry, **place, "shape": tuple(entry["shape"])}
                refs.append(LatentRef(**facts, kind="safetensors"))
    return refs


def read_latents(ref: LatentRef) -> Sample:
    """A sample as it is stored; BadClip with the reason if anything is wrong with it."""
    data, meta = read_media(ref), read_meta(ref)
    with blame(ref):
        try:
            sample: Sample = safetensors.torch.load(data)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        found, frames = tuple(sample["latents"].shape[1:]), ref.shape[0]
        if found != ref.shape or sample["ellipse"].shape != (frames, 5):
            raise ValueError(
                f"latents {found}, ellipse {tuple(sample['ellipse'].shape)}; promised {ref.shape}"
            )
        if not all(
            sample[name].isfinite().all() for name in ("latents", "ellipse", "prompt_embeds")
        ):
            raise ValueError("values that are not finite")
    return sample | {"prompt": meta["prompt"], "ref": ref}


def read_empty_prompt(folder: Folder) -> Tensor:
    """The embedding (n, D) of an empty prompt; ShardError where it cannot be read."""
    try:
        return safetensors.torch.load(read_file(folder, EMPTY_PROMPT))["embeds"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ShardError(
            f"{folder}/{EMPTY_PROMPT} cannot be read ({error}). {HOW_TO_MAKE['latents']}"
        ) from error
