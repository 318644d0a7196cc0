"""Reads clip shards: webdataset tars of `<key>.rgba.mkv` (FFV1) or `<key>.rgba.png` (a still) and
`<key>.json`.

`manifest.json` beside them is written last, so a folder without one is unfinished and never read.
"""

import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acetate.data.manifests import BEFORE_SHARDS, CLIP, MADE_BY, check_manifest
from acetate.data.members import Span, find_members, read_at
from acetate.data.splits import Split
from acetate.data.store import MOST_BYTES, Folder, RemoteTar, read_file
from acetate.documents import FieldError, open_plain, parse, shown
from acetate.media.clip import Limits, decoding
from acetate.video_io import MediaError, decode_ffv1

SCHEMA = 1  # of clip and of latent shards
MANIFEST = "manifest.json"
SHARDS = ',\n "shards": '  # the last thing in the manifest of a folder of clips
STILL = "rgba.png"  # the kind of a clip of one frame; every other one is FFV1
LIMITS = Limits(max_bytes=2**32)  # of what a manifest may promise of a clip
MEMBER = 2**32  # bytes of a sample's media
META = 2**20  # bytes of its JSON
HOW_TO_MAKE = {
    "clips": "`acetate prep synthesize` and `acetate prep shard` make clip shards.",
    "latents": "`acetate prep cache_latents` makes latent shards.",
}


class ShardError(ValueError):
    """A folder cannot be used as clip shards."""


class BadClip(ValueError):
    """One clip cannot be used; the rest of its shard can."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self):
        return type(self), (self.key, self.reason)


@dataclass(frozen=True)
class Clip:
    """A decoded clip. frames: uint8 (T, H, W, 4), straight colour; fps: 0 for a still."""

    frames: NDArray[np.uint8]
    prompt: str
    fps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TarRef:
    """The place of a sample's bytes; `problem` is set if they are known to be missing."""

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

    @property
    def room(self) -> int:
        """Bytes that its media may have in the tar."""
        return MEMBER


Ref = TypeVar("Ref", bound=TarRef)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRef(TarRef):
    frames: int
    width: int
    height: int

    @property
    def room(self) -> int:
        """Twice the bytes of the decoded clip, and those beside pictures: noise does not
        compress."""
        return 8 * self.frames * self.height * self.width + 2**10 * self.frames + 2**20


def read_manifest(folder: Folder, kind: Literal["clips", "latents"] = "clips") -> dict[str, Any]:
    """Reads the manifest of a folder of shards. Raises ShardError if it is missing, of another
    schema or kind, too large, or has a field that breaks its rule."""
    path, advice = f"{folder}/{MANIFEST}", HOW_TO_MAKE[kind]
    try:
        manifest = parse(read_file(folder, MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        local = isinstance(folder, Path)
        lost = "does not exist" if local else "does not exist, or holds no finished shards"
        state = "holds no finished shards" if local and folder.is_dir() else lost
        raise ShardError(f"{folder} {state} (no {MANIFEST}). {advice}") from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error}. {advice}") from error
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({error}). {advice}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ShardError(
            f"{path}: schema {shown(schema)}; this version reads schema {SCHEMA}. {advice}"
        )
    found = manifest.get("kind", "clips")
    if found != kind:
        what = found if found in [*HOW_TO_MAKE] else f"kind {shown(found)}"
        raise ShardError(f"{folder} holds {what}; needed: {kind}. {advice}")
    try:
        check_manifest(manifest, kind)
    except FieldError as error:
        raise ShardError(f"{path}: {error}. {advice}") from error
    return manifest


def read_head(folder: Path) -> dict[str, Any]:
    """Reads a manifest of ShardWriter without its list of clips, which may be a million lines.
    Raises ShardError as `read_manifest`."""
    path = folder / MANIFEST
    try:
        with io.TextIOWrapper(open_plain(path, MOST_BYTES), "utf-8") as file:
            lines = takewhile(
                lambda line: line != SHARDS[2:] + "[\n" and line != SHARDS[2:] + "[]\n", file
            )
            head = parse("".join(lines).rstrip().removesuffix(",") + "}")
        BEFORE_SHARDS.check(head)
        MADE_BY.check(head["made_by"], "made_by")
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} is no manifest of shards ({error}).") from error
    return head


def index_shards(folders: Sequence[Folder]) -> list[ClipRef]:
    """Returns every clip that the manifests promise, sorted by key; a clip that its local tar lacks
    carries a `problem`.

    Raises ShardError for a folder without a readable manifest, one without clips, or a key that
    comes twice.
    """
    refs = by_key(ref for folder in folders for ref in _index(folder))
    return [refs[key] for key in sorted(refs)]


def _index(folder: Folder) -> Iterator[ClipRef]:
    manifest = read_manifest(folder)
    if not any(shard["clips"] for shard in manifest["shards"]):
        raise ShardError(f"{folder}/{MANIFEST} holds 0 clips. {HOW_TO_MAKE['clips']}")
    for shard in manifest["shards"]:
        places = find_samples(
            folder, shard, [(clip["key"], clip["kind"]) for clip in shard["clips"]]
        )
        yield from (
            ClipRef(**clip, **place) for clip, place in zip(shard["clips"], places, strict=True)
        )


def by_key(refs: Iterable[Ref]) -> dict[str, Ref]:
    """Returns the references by key. Raises ShardError for a key that comes twice."""
    found: dict[str, Ref] = {}
    for ref in refs:
        if ref.key in found:
            other = found[ref.key].tar.parent
            raise ShardError(
                f"key {ref.key!r} is in {other} and in {ref.tar.parent}; leave one of the two out."
            )
        found[ref.key] = ref
    return found


def find_samples(
    folder: Folder, shard: Mapping[str, Any], samples: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Returns tar, media, meta and problem of a TarRef for every (key, kind); does not look into
    remote tars."""
    if not isinstance(folder, Path):
        tar = RemoteTar(folder, shard["file"], shard["bytes"], shard["sha256"])
        if tar.size > folder.remote.max_bytes:
            raise ShardError(
                f"{tar} has {tar.size / 2**30:.3g} GiB, more than the cache may hold; raise "
                "cache_gb."
            )
        return [{"tar": tar}] * len(samples)
    tar = folder / shard["file"]
    members: dict[str, Span] = {}
    broken = ""
    try:
        with open_plain(tar) as file:
            members.update(find_members(file, tar.stat().st_size))
    except Exception as error:  # tarfile lets more than TarError pass
        broken = f" ({error})"
    places = []
    for key, kind in samples:
        media, meta = members.get(f"{key}.{kind}"), members.get(f"{key}.json")
        missing = (
            None if media and meta else f"not in {tar}{broken}; the tar is damaged or was cut off"
        )
        places.append(
            {"tar": tar, "media": media or (0, 0), "meta": meta or (0, 0), "problem": missing}
        )
    return places


@contextmanager
def blame(ref: TarRef) -> Iterator[None]:
    """Turns whatever goes wrong while a sample is read into its BadClip."""
    try:
        yield
    except BadClip:
        raise
    except Exception as error:  # decoders have exceptions of their own
        raise BadClip(ref.key, f"{ref.name}: {type(error).__name__}: {error}") from error


def read_meta(ref: TarRef) -> dict[str, Any]:
    """Reads a sample's JSON. Raises BadClip without one."""
    text = read_meta_text(ref)
    with blame(ref):
        try:
            meta = parse(text)
            CLIP.check(meta)
        except ValueError as error:
            raise ValueError(f"{ref.key}.json: {error}") from error
        return meta


def read_meta_text(ref: TarRef) -> bytes:
    """Reads the bytes of a sample's JSON. Raises BadClip without one."""
    if ref.problem:
        raise BadClip(ref.key, ref.problem)
    with blame(ref):
        return _read(ref, "json", ref.meta, META)


def read_media(ref: TarRef) -> bytes:
    """Reads a sample's media. Raises BadClip unless the bytes are those that the manifest knows."""
    if ref.problem:
        raise BadClip(ref.key, ref.problem)
    with blame(ref):
        data = _read(ref, ref.kind, ref.media, ref.room)
    # FFV1 hides a damaged slice behind the frame before it, so the bytes are checked, not the
    # picture.
    if zlib.crc32(data) != ref.crc32:
        raise BadClip(
            ref.key, f"{ref.name} does not match the manifest's CRC; the shard is damaged"
        )
    return data


def read_clip(ref: ClipRef, span: tuple[int, int] | None = None) -> Clip:
    """Reads and checks one clip, and decodes no more of it than the manifest promises. Raises
    BadClip with the reason if anything is wrong with it.

    span: first frame and the one after the last that the result has; None: all.
    """
    shape = (ref.frames, ref.height, ref.width)
    first, last = span or (0, ref.frames)
    with blame(ref):
        LIMITS.check(ref.name, *shape)
        LIMITS.check_memory(ref.name, last - first, 4 * ref.height * ref.width)
    data = read_media(ref)
    with blame(ref):
        if ref.kind == STILL:
            frames, fps = decode_png(data, ref.name, shape), 0.0
        else:
            frames, fps = decode_ffv1(data, ref.name, shape, (first, last))
    return Clip(frames, read_meta(ref)["prompt"], fps)


def decode_png(data: bytes, name: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Decodes a PNG into (1, H, W, 4). shape: the promised frames, height and width, which the
    header must have. Raises MediaError for another shape, or without an alpha channel."""
    with decoding(name), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        found = (getattr(image, "n_frames", 1), image.height, image.width)
        if found != shape:
            said, promised = ("x".join(map(str, size)) for size in (found, shape))
            raise MediaError(f"{name}: {said} (frames x height x width), promised are {promised}")
        if image.mode != "RGBA":
            raise MediaError(f"{name}: mode {image.mode}; a still needs an alpha channel (RGBA)")
        return np.array(image)[None]


def _read(ref: TarRef, suffix: str, span: Span, most: int) -> bytes:
    if isinstance(ref.tar, RemoteTar):
        return ref.tar.read(f"{ref.key}.{suffix}", most)
    with open(ref.tar, "rb") as file:
        return read_at(file, span, most)
