"""Clip shards: webdataset tars of `<key>.rgba.mkv` (FFV1) or `<key>.rgba.png` (a still) and `<key>.json`.

`manifest.json` beside them is written last, so a folder without one is unfinished and never read.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import TarWriter

from acetate.data.store import Folder, RemoteTar, Span, find_members, read_at, read_file
from acetate.draws import stable_hash
from acetate.video_io import MediaError, decode_ffv1, encode_ffv1

SCHEMA = 1  # of clip and of latent shards
MANIFEST = "manifest.json"
# webdataset cuts a member's name at its first dot, and ustar holds 100 characters of it.
KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")
HOW_TO_MAKE = {
    "clips": "`python -m data_prep.synthesize` and `python -m data_prep.shard` make clip shards.",
    "latents": "`python -m data_prep.cache_latents` makes latent shards.",
}

Split = Literal["train", "val"]
Kind = Literal["rgba.mkv", "rgba.png"]


class ShardError(ValueError):
    """A folder that cannot be used as clip shards."""


class BadClip(ValueError):
    """One clip that cannot be used; the rest of its shard can."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self):
        return type(self), (self.key, self.reason)


@dataclass(frozen=True)
class Clip:
    """frames: uint8 (T, H, W, 4), straight colour; fps: 0 for a still."""

    frames: NDArray[np.uint8]
    prompt: str
    fps: float


@dataclass(frozen=True, kw_only=True)
class TarRef:
    """Where a sample's bytes lie; `problem` is set if they are known to be missing."""

    key: str
    split: Split
    crc32: int
    tar: Path | RemoteTar
    kind: str  # suffix of the media's name
    media: Span = (0, 0)  # place in a local tar; a remote one is searched when it has come
    meta: Span = (0, 0)
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.tar.name}:{self.key}.{self.kind}"


@dataclass(frozen=True, kw_only=True)
class ClipRef(TarRef):
    frames: int
    width: int
    height: int


def assign_splits(groups: Mapping[str, str], val_fraction: float) -> dict[str, Split]:
    """Key -> split from key -> group. A group (variants of one source) is never torn apart.

    A group's side depends on its name alone, so that a clip keeps its side when others are added. With two
    groups and val_fraction > 0 at least one is in val; at least one is always in train.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}; must be in [0, 1)")
    order = sorted(set(groups.values()), key=lambda group: (stable_hash("split", group), group))
    val = {group for group in order if stable_hash("split", group) < val_fraction * 2**63}
    if val_fraction > 0 and len(order) > 1:
        val.add(order[0])
    if order and len(val) == len(order):
        val.remove(order[-1])
    return {key: "val" if group in val else "train" for key, group in groups.items()}


@dataclass(frozen=True)
class EncodedClip:
    """A clip as a shard stores it; fps is 0 for a still."""

    media: bytes
    kind: Kind
    frames: int
    width: int
    height: int
    fps: float


def encode_clip(frames: NDArray[np.uint8], fps: float) -> EncodedClip:
    """uint8 (T, H, W, 4), straight colour; one frame becomes a PNG still, which has no rate."""
    count, height, width, _ = frames.shape
    if count > 1:
        return EncodedClip(encode_ffv1(frames, fps), "rgba.mkv", count, width, height, fps)
    buffer = io.BytesIO()
    Image.fromarray(frames[0]).save(buffer, "PNG")
    return EncodedClip(buffer.getvalue(), "rgba.png", count, width, height, 0.0)


class ShardWriter:
    """Writes tars of at most `max_clips` clips and about `max_bytes` bytes, and the manifest at `close`.

    made_by: {"command", "settings"}, what decides the content. A run that was interrupted and comes back with
    the same made_by keeps its finished tars (`key in writer`); with another, they are removed. As a context
    manager it closes only if nothing was raised.
    """

    def __init__(self, out: Path, *, max_clips: int, max_bytes: int, made_by: Mapping[str, Any]):
        if (out / MANIFEST).exists():
            raise ShardError(f"{out} already holds finished shards; name another folder or remove it first.")
        self.out, self.max_clips, self.max_bytes = out, max_clips, max_bytes
        self.made_by = json.loads(json.dumps(made_by))
        self.pending: list[dict[str, Any]] = []
        self.pending_bytes = 0
        self.tar: TarWriter | None = None
        out.mkdir(parents=True, exist_ok=True)
        self.shards = self._finished()
        self.skipped: dict[str, str] = {}  # key -> reason, for the manifest; whoever fills the shards keeps it
        self.keys = {clip["key"] for shard in self.shards for clip in shard["clips"]}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self.tar is not None:
            self.tar.close()
            self.stream.close()

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def add(
        self,
        key: str,
        clip: EncodedClip,
        *,
        split: Split,
        prompt: str,
        source: str,
        licence: str,
        lossy: bool,
        premultiplied_source: bool,
    ) -> None:
        if not KEY.fullmatch(key):
            raise ValueError(f"key {key!r}; keys are 1 to 80 of A-Z a-z 0-9 _ -")
        if key in self.keys:
            raise ValueError(f"key {key!r} was already written; keys are unique in a folder of shards")
        size = {"frames": clip.frames, "width": clip.width, "height": clip.height}
        meta = {"prompt": prompt, "fps": clip.fps, **size, "source": source, "licence": licence, "split": split,
                "lossy": lossy, "premultiplied_source": premultiplied_source}  # fmt: skip
        if self.pending and self.pending_bytes + len(clip.media) > self.max_bytes:
            self._finish_tar()
        if self.tar is None:
            self.stream = open(self._path("tar.tmp"), "wb")  # noqa: SIM115  open across calls
            self.tar = TarWriter(self.stream, encoder=False, mtime=0)
        text = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
        self.tar.write({"__key__": key, clip.kind: clip.media, "json": text})
        entry = {"key": key, "split": split, **size, "kind": clip.kind, "crc32": zlib.crc32(clip.media)}
        self.pending.append(entry)
        self.pending_bytes += len(clip.media) + len(text)
        self.keys.add(key)
        if len(self.pending) == self.max_clips:
            self._finish_tar()

    def close(self) -> dict[str, Any]:
        """Finishes the last tar, writes the manifest and returns it."""
        if self.pending:
            self._finish_tar()
        clips = [clip for shard in self.shards for clip in shard["clips"]]
        splits = {split: sum(clip["split"] == split for clip in clips) for split in ("train", "val")}
        manifest = {
            "schema": SCHEMA,
            "made_by": self.made_by,
            "clips": len(clips),
            "frames": sum(clip["frames"] for clip in clips),
            "splits": splits,
            "skipped": self.skipped,
            "shards": self.shards,
        }
        write_json(self.out / MANIFEST, manifest)
        for part in self.out.glob("clips-*.part.json"):
            part.unlink()
        return manifest

    def _path(self, suffix: str) -> Path:
        return self.out / f"clips-{len(self.shards):06d}.{suffix}"

    def _finish_tar(self) -> None:
        assert self.tar is not None
        self.tar.close()
        self.stream.close()
        shard = {**finish_tar(self._path("tar.tmp")), "clips": self.pending}
        write_json(self._path("part.json"), {"schema": SCHEMA, "made_by": self.made_by, "shard": shard})
        self.shards.append(shard)
        self.tar, self.pending, self.pending_bytes = None, [], 0

    def _finished(self) -> list[dict[str, Any]]:
        """Shards that an interrupted run of the same command finished; everything else of it is removed."""
        shards: list[dict[str, Any]] = []
        for path in sorted(self.out.glob("clips-*.part.json")):
            part = json.loads(path.read_text())
            tar = self.out / part["shard"]["file"]
            same = part["schema"] == SCHEMA and part["made_by"] == self.made_by
            if not same or tar.name != f"clips-{len(shards):06d}.tar" or not tar.exists():
                break
            shards.append(part["shard"])
        kept = {shard["file"].removesuffix(".tar") for shard in shards}
        for path in self.out.glob("clips-*"):
            if path.name.split(".")[0] not in kept:
                path.unlink()
        return shards


def finish_tar(temporary: Path) -> dict[str, Any]:
    """`NAME.tar.tmp` becomes `NAME.tar`; what a manifest says of it."""
    with open(temporary, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    tar = temporary.with_suffix("")
    os.replace(temporary, tar)
    return {"file": tar.name, "bytes": tar.stat().st_size, "sha256": sha256}


def write_json(path: Path, value: object) -> None:
    """Whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    os.replace(temporary, path)


def read_manifest(folder: Folder, kind: Literal["clips", "latents"] = "clips") -> dict[str, Any]:
    """The manifest of a folder of shards; ShardError if it is missing, of another schema or of another kind."""
    path, advice = f"{folder}/{MANIFEST}", HOW_TO_MAKE[kind]
    try:
        manifest = json.loads(read_file(folder, MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        lost = isinstance(folder, Path) and not folder.is_dir()
        state = "does not exist" if lost else "holds no finished shards"
        raise ShardError(f"{folder} {state} (no {MANIFEST}). {advice}") from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({error}). {advice}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ShardError(f"{path}: schema {schema!r}; this version reads schema {SCHEMA}. {advice}")
    found = manifest.get("kind", "clips")
    if found != kind:
        raise ShardError(f"{folder} holds {found}; needed: {kind}. {advice}")
    return manifest


def index_shards(folders: Sequence[Folder]) -> list[ClipRef]:
    """Every clip that the manifests promise, sorted by key; a clip that its local tar lacks carries a `problem`.

    Raises ShardError for a folder without a readable manifest, one without clips, or a key that comes twice.
    """
    refs: dict[str, ClipRef] = {}
    for folder in folders:
        manifest = read_manifest(folder)
        if not manifest["clips"]:
            raise ShardError(f"{folder} holds 0 clips. {HOW_TO_MAKE['clips']}")
        for shard in manifest["shards"]:
            places = find_samples(folder, shard, [(clip["key"], clip["kind"]) for clip in shard["clips"]])
            for ref in (ClipRef(**clip, **place) for clip, place in zip(shard["clips"], places, strict=True)):
                if ref.key in refs:
                    other = refs[ref.key].tar.parent
                    raise ShardError(f"key {ref.key!r} is in {other} and in {folder}; leave one of the two out.")
                refs[ref.key] = ref
    return [refs[key] for key in sorted(refs)]


def find_samples(folder: Folder, shard: Mapping[str, Any], samples: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """tar, media, meta and problem of a TarRef, for every (key, kind); remote tars are not looked into."""
    if not isinstance(folder, Path):
        tar = RemoteTar(folder, shard["file"], shard["bytes"], shard["sha256"])
        if tar.size > folder.remote.max_bytes:
            raise ShardError(f"{tar} has {tar.size / 2**30:.3g} GiB, more than the cache may hold; raise cache_gb.")
        return [{"tar": tar}] * len(samples)
    tar = folder / shard["file"]
    members: dict[str, Span] = {}
    broken = ""
    try:
        with open(tar, "rb") as file:
            members.update(find_members(file, tar.stat().st_size))
    except (OSError, tarfile.TarError) as error:
        broken = f" ({error})"
    places = []
    for key, kind in samples:
        media, meta = members.get(f"{key}.{kind}"), members.get(f"{key}.json")
        missing = None if media and meta else f"not in {tar}{broken}; the tar is damaged or was cut off"
        places.append({"tar": tar, "media": media or (0, 0), "meta": meta or (0, 0), "problem": missing})
    return places


@contextmanager
def blame(ref: TarRef) -> Iterator[None]:
    """Whatever goes wrong while a sample is read becomes its BadClip."""
    try:
        yield
    except BadClip:
        raise
    except (OSError, tarfile.TarError, MediaError, ValueError, KeyError, TypeError) as error:
        raise BadClip(ref.key, f"{ref.name}: {type(error).__name__}: {error}") from error


def read_meta(ref: TarRef) -> dict[str, Any]:
    """A sample's JSON; BadClip without one."""
    if ref.problem:
        raise BadClip(ref.key, ref.problem)
    with blame(ref):
        meta = json.loads(_read(ref, "json", ref.meta))
        return {**meta, "prompt": str(meta["prompt"])}


def read_media(ref: TarRef) -> bytes:
    """BadClip unless the bytes are those that the manifest knows."""
    if ref.problem:
        raise BadClip(ref.key, ref.problem)
    with blame(ref):
        data = _read(ref, ref.kind, ref.media)
    # FFV1 hides a damaged slice behind the frame before it, so the bytes are checked, not the picture.
    if zlib.crc32(data) != ref.crc32:
        raise BadClip(ref.key, f"{ref.name} does not match the manifest's CRC; the shard is damaged")
    return data


def read_clip(ref: ClipRef) -> Clip:
    """Reads and checks one clip; BadClip with the reason if anything is wrong with it."""
    data = read_media(ref)
    with blame(ref):
        if ref.kind == "rgba.png":
            frames, fps = decode_png(data, ref.name), 0.0
        else:
            frames, fps = decode_ffv1(data, ref.name)
    if frames.shape[:3] != (ref.frames, ref.height, ref.width):
        found, promised = "x".join(map(str, frames.shape[:3])), f"{ref.frames}x{ref.height}x{ref.width}"
        raise BadClip(ref.key, f"{ref.name} is {found} (frames x height x width), the manifest says {promised}")
    return Clip(frames, read_meta(ref)["prompt"], fps)


def decode_png(data: bytes, name: str) -> NDArray[np.uint8]:
    """PNG -> (1, H, W, 4); MediaError without an alpha channel."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode != "RGBA":
            raise MediaError(f"{name}: mode {image.mode}; a still needs an alpha channel (RGBA)")
        return np.array(image)[None]
    except (OSError, SyntaxError) as error:
        raise MediaError(f"{name}: cannot be decoded ({error})") from error


def _read(ref: TarRef, suffix: str, span: Span) -> bytes:
    if isinstance(ref.tar, RemoteTar):
        return ref.tar.read(f"{ref.key}.{suffix}")
    with open(ref.tar, "rb") as file:
        return read_at(file, span)
