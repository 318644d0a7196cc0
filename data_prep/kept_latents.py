"""Latents of an older folder that would come out the same, and are taken over."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from acetate.data.latent_shards import index_latents, read_latents
from acetate.data.shards import MANIFEST, BadClip, read_manifest, read_meta, read_meta_text
from acetate.replacing import writing
from data_prep.folders import makers
from data_prep.latent_plan import Piece, Settings

# What decides a latent, beside its clip's frames and its place in them; and what decides an
# embedding, beside the text
OF_A_LATENT = (
    "seed", "smallest", "dtype", "ellipse", "eps", "frozen_dtype", "vae_sha256", "base_sha256",
    "condition", "image_encoder",
)  # fmt: skip
OF_A_TEXT = ("dtype", "text_encoder_sha256", "prompt_length", "long_prompts")
log = logging.getLogger(__name__)


class Kept:
    """Samples of an older folder whose settings give the same latents, for pieces whose clips and
    windows are the same.

    same_text: its prompts were embedded in the same way, too.
    """

    def __init__(self, folder: Path, settings: Settings, same_text: bool):
        self.folder, self.settings, self.same_text = folder, settings, same_text
        manifest = read_manifest(folder, "latents")
        self.made_with: dict[str, Any] = manifest["made_by"]["settings"]
        self.refs = {ref.key: ref for ref in index_latents(folder, manifest)}
        self.shards = {
            shard["samples"][0]["key"]: shard for shard in manifest["shards"] if shard["samples"]
        }

    def __reduce__(self):
        return type(self), (self.folder, self.settings, self.same_text)

    def only_prompts_differ(self, made_by: Mapping[str, Any], pieces: Sequence[Piece]) -> bool:
        """Returns whether it has all pieces and no others, so that only descriptions can be new."""
        old, new = self.made_with, made_by["settings"]
        if any(
            old.get(name) != new.get(name) for name in (old.keys() | new.keys()) - {"shards_sha256"}
        ):
            return False
        return self.refs.keys() == {piece.key for piece in pieces} and all(map(self.meta, pieces))

    def meta(self, piece: Piece) -> dict[str, Any] | None:
        """Returns the JSON of a piece's sample; None unless it is of the same frames."""
        ref = self.refs.get(piece.key)
        wanted = {**place_of(piece), "clip_crc32": piece.ref.crc32}
        with suppress(BadClip):
            if ref and wanted.items() <= (meta := read_meta(ref)).items():
                return meta
        return None

    def tell(self, pieces: Sequence[Piece]) -> None:
        """Logs how many of the pieces it has."""
        count = sum(self.meta(piece) is not None for piece in pieces)
        log.info("%d of %d latents are taken over from %s", count, len(pieces), self.folder)

    def has_text(self, piece: Piece, prompt: str) -> bool:
        """Returns whether it has the piece with an embedding of this prompt that can be taken
        over."""
        return self.same_text and (self.meta(piece) or {}).get("prompt") == prompt

    def sample(self, piece: Piece) -> tuple[dict[str, Tensor], str] | None:
        """Returns the tensors of a piece, and the prompt that is among them."""
        if (meta := self.meta(piece)) is None:
            return None
        with suppress(BadClip):  # damaged since
            tensors = read_latents(self.refs[piece.key])
            if "coverage" not in tensors:  # of an older cache
                return None
            return {
                name: value for name, value in tensors.items() if isinstance(value, Tensor)
            }, meta["prompt"]
        return None

    def tar(self, pieces: Sequence[Piece], target: Path) -> dict[str, Any] | None:
        """Puts a tar that would be the same to the bit at `target`; what the manifest says of it,
        None without one."""
        shard = self.shards.get(pieces[0].key)
        if not (
            shard
            and self.same_text
            and [made["key"] for made in shard["samples"]] == [p.key for p in pieces]
        ):
            return None
        source = self.folder / shard["file"]
        if self.sample(pieces[0]) is None:
            return None
        try:
            for piece in pieces:
                said = {"clip_crc32": piece.ref.crc32, "background": self.settings.behind(piece)}
                if read_meta_text(self.refs[piece.key]) != text_of(
                    piece, {**read_meta(piece.ref), **said}
                ):
                    return None
            if source.stat().st_size != shard["bytes"]:
                return None
        except (BadClip, OSError):
            return None
        target.unlink(missing_ok=True)
        with writing(target):
            try:
                os.link(source, target)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, target)
        return {**shard, "file": target.name}


def find_kept(out: Path, settings: Settings, made_by: Mapping[str, Any]) -> Kept | None:
    """Returns the samples of a folder that is finished and whose settings give the latents of
    these; None without one."""
    if not (out / MANIFEST).exists():
        return None
    found = next(makers(out))
    if found == made_by or found.get("command") != made_by["command"]:
        return None
    old, new = found.get("settings", {}), made_by["settings"]
    if any(old.get(name) != new.get(name) for name in OF_A_LATENT):
        return None
    return Kept(out, settings, same_text=all(old.get(name) == new.get(name) for name in OF_A_TEXT))


def place_of(piece: Piece) -> dict[str, Any]:
    """Returns the part of a sample's JSON that says which window of which clip it is."""
    own = {
        name: getattr(piece, name)
        for name in ("window", "start", "frames", "height", "width", "variant")
    }
    return {"clip": piece.ref.key, **own}


def text_of(piece: Piece, meta: Mapping[str, Any]) -> bytes:
    """Returns the JSON of a sample. meta: that of its clip, with what is added to it."""
    whole = {**meta, **place_of(piece), "split": piece.ref.split}
    return json.dumps(whole, ensure_ascii=False, sort_keys=True).encode()
