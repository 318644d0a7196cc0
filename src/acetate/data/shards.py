"""Clip shards: webdataset tars of `<key>.rgba.mkv` (FFV1) or `<key>.rgba.png` (a still) and `<key>.json`.

`manifest.json` beside them is written last, so a folder without one is unfinished and never read.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import TarWriter

from acetate.data.splits import Split
from acetate.data.store import Folder, RemoteTar, Span, find_members, read_at, read_file
from acetate.draws import stable_hash
from acetate.replacing import writing, written
from acetate.video_io import MediaError, decode_ffv1, encode_ffv1

SCHEMA = 1  # of clip and of latent shards
MANIFEST = "manifest.json"
SHARDS = ',\n "shards": '  # the last thing in the manifest of a folder of clips
LONGEST_KEY = 80  # bytes of UTF-8: a tar's plain header holds 100 of a member's name
SHA256 = re.compile(r"[0-9a-f]{64}")
HOW_TO_MAKE = {
    "clips": "`acetate prep synthesize` and `acetate prep shard` make clip shards.",
    "latents": "`acetate prep cache_latents` makes latent shards.",
}

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


@dataclass(frozen=True, kw_only=True, slots=True)
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


Ref = TypeVar("Ref", bound=TarRef)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRef(TarRef):
    frames: int
    width: int
    height: int


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
    manager it closes only if nothing was raised. Raises OSError as acetate.replacing.writing does.
    """

    def __init__(self, out: Path, *, max_clips: int, max_bytes: int, made_by: Mapping[str, Any]):
        if (out / MANIFEST).exists():
            raise ShardError(f"{out} already holds finished shards; name another folder or remove it first.")
        self.out, self.max_clips, self.max_bytes = out, max_clips, max_bytes
        self.made_by = json.loads(json.dumps(made_by))
        self.pending: list[dict[str, Any]] = []
        self.pending_bytes = 0
        self.tar: TarWriter | None = None
        self.tars = self.clips = self.frames = 0
        self.splits = {"train": 0, "val": 0}
        self.hashes = np.empty(0, np.int64)  # of the finished tars' keys, sorted: 8 bytes a clip
        self.skipped: dict[str, str] = {}  # key -> reason, for the manifest; whoever fills the shards keeps it
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        self._find_finished()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self.tar is not None:
            for half in (self.tar, self.stream):
                with suppress(OSError):  # the disk may be full
                    half.close()
            self._path("tar.tmp", self.tars).unlink(missing_ok=True)
        if kind is not None:
            with suppress(OSError):  # only a folder that is empty goes
                self.out.rmdir()

    def __contains__(self, key: str) -> bool:
        number = stable_hash(key)
        place = int(np.searchsorted(self.hashes, number))
        found = place < len(self.hashes) and self.hashes[place] == number
        return bool(found) or any(clip["key"] == key for clip in self.pending)

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
        done: Mapping[str, str] | None = None,
    ) -> None:
        """done: step -> what was done to the clip and why; it goes into the clip's own JSON."""
        size = {"frames": clip.frames, "width": clip.width, "height": clip.height}
        meta = {"prompt": prompt, "fps": clip.fps, **size, "source": source, "licence": licence, "split": split,
                "lossy": lossy, "premultiplied_source": premultiplied_source}  # fmt: skip
        if done:
            meta["done"] = dict(done)
        text = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
        entry = {"key": key, "split": split, **size, "kind": clip.kind, "crc32": zlib.crc32(clip.media)}
        self.write(entry, clip.media, text)

    def copy(self, ref: "ClipRef", media: bytes, meta: bytes) -> None:
        """A clip of another folder, its members as they are given."""
        names = ("key", "split", "frames", "width", "height", "kind", "crc32")
        self.write({name: getattr(ref, name) for name in names}, media, meta)

    def write(self, entry: dict[str, Any], media: bytes, meta: bytes) -> None:
        """entry: what the manifest says of the clip."""
        key = entry["key"]
        if not key or plain_key(key) != key or len(key.encode()) > LONGEST_KEY:
            raise ValueError(
                f"key {key!r}; keys are 1 to {LONGEST_KEY} bytes of letters and digits of any script in Unicode's NFC, "
                "_ and -"
            )
        if key in self:
            raise ValueError(f"key {key!r} was already written; keys are unique in a folder of shards")
        if self.pending and self.pending_bytes + len(media) > self.max_bytes:
            self._finish_tar()
        with writing(self._path("tar", self.tars)):
            if self.tar is None:
                self.stream = open(self._path("tar.tmp", self.tars), "wb")  # noqa: SIM115  open across calls
                self.tar = TarWriter(self.stream, encoder=False, mtime=0)
            self.tar.write({"__key__": key, entry["kind"]: media, "json": meta})
        self.pending.append(entry)
        self.pending_bytes += len(media) + len(meta)
        if len(self.pending) == self.max_clips:
            self._finish_tar()

    def close(self) -> None:
        """Finishes the last tar and writes the manifest; ShardError if there is nothing to put into it."""
        if self.pending:
            self._finish_tar()
        if not self.tars:
            first = "; ".join(f"{key}: {reason}" for key, reason in list(self.skipped.items())[:3])
            with suppress(OSError):  # what else was made there stays
                self.out.rmdir()
            raise ShardError(f"no clip is left to write into {self.out} ({first or 'none was given'})")
        head = {
            "schema": SCHEMA,
            "made_by": self.made_by,
            "clips": self.clips,
            "frames": self.frames,
            "splits": self.splits,
            "skipped": self.skipped,
        }
        with written(self.out / MANIFEST) as file:
            file.write(json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}") + SHARDS + "[")
            for number in range(self.tars):  # one at a time: a million clips are a gigabyte of them
                shard = json.loads(self._path("part.json", number).read_text())["shard"]
                text = json.dumps(shard, ensure_ascii=False, indent=1)
                file.write(("," if number else "") + indent("\n" + text, "  "))
            file.write("\n ]\n}\n" if self.tars else "]\n}\n")
        remove_parts(self.out)

    def _path(self, suffix: str, number: int) -> Path:
        return self.out / f"clips-{number:06d}.{suffix}"

    def _finish_tar(self) -> None:
        assert self.tar is not None
        with writing(self._path("tar", self.tars)):
            self.tar.close()
            self.stream.close()
        shard = {**finish_tar(self._path("tar.tmp", self.tars)), "clips": self.pending}
        part = {"schema": SCHEMA, "made_by": self.made_by, "shard": shard}
        write_json(self._path("part.json", self.tars), part)
        self.tar, self.pending, self.pending_bytes = None, [], 0
        self._count(shard["clips"])

    def _count(self, clips: Sequence[Mapping[str, Any]]) -> None:
        """A tar more."""
        self.tars += 1
        self.clips += len(clips)
        self.frames += sum(clip["frames"] for clip in clips)
        for clip in clips:
            self.splits[clip["split"]] += 1
        new = [stable_hash(clip["key"]) for clip in clips]
        self.hashes = np.sort(np.concatenate((self.hashes, np.array(new, np.int64))), kind="stable")

    def _find_finished(self) -> None:
        """Counts the tars that an interrupted run of the same command finished, and removes everything else of it."""
        while (path := self._path("part.json", self.tars)).exists():
            part = json.loads(path.read_text())
            same = part["schema"] == SCHEMA and part["made_by"] == self.made_by
            if not same or not self._path("tar", self.tars).exists():
                break
            self._count(part["shard"]["clips"])
        for path in self.out.glob("clips-*"):
            number = path.name.removeprefix("clips-").split(".")[0]
            if not number.isdecimal() or int(number) >= self.tars:
                path.unlink()


def plain_key(name: str) -> str:
    """The name in Unicode's NFC; _ for all that is no letter, mark or digit of any script: webdataset cuts at a dot."""
    name = unicodedata.normalize("NFC", name)
    kept = (char if char in "_-" or unicodedata.category(char)[0] in "LMN" else "." for char in name)
    return re.sub(r"\.+", "_", "".join(kept))


def short_key(key: str, most: int) -> str:
    """Its beginning, of at most so many bytes."""
    return key.encode()[:most].decode(errors="ignore")


def remove_parts(out: Path) -> None:
    """Of a folder whose manifest is in place; a run that is killed in its last moments leaves some."""
    for part in out.glob("clips-*.part.json"):
        part.unlink(missing_ok=True)


def finish_tar(temporary: Path) -> dict[str, Any]:
    """`NAME.tar.tmp` becomes `NAME.tar`; what a manifest says of it."""
    with open(temporary, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    tar = temporary.with_suffix("")
    os.replace(temporary, tar)
    return {"file": tar.name, "bytes": tar.stat().st_size, "sha256": sha256}


def write_json(path: Path, value: object) -> None:
    """Whole or not at all; makes the folder."""
    with written(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_manifest(folder: Folder, kind: Literal["clips", "latents"] = "clips") -> dict[str, Any]:
    """The manifest of a folder of shards; ShardError if it is missing, of another schema or of another kind."""
    path, advice = f"{folder}/{MANIFEST}", HOW_TO_MAKE[kind]
    try:
        manifest = json.loads(read_file(folder, MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        local = isinstance(folder, Path)
        lost = "does not exist" if local else "does not exist, or holds no finished shards"
        state = "holds no finished shards" if local and folder.is_dir() else lost
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


def read_head(folder: Path) -> dict[str, Any]:
    """All of a manifest that ShardWriter wrote but its list of clips, which may be a million lines."""
    with open(folder / MANIFEST) as file:
        lines = takewhile(lambda line: line != SHARDS[2:] + "[\n" and line != SHARDS[2:] + "[]\n", file)
        return json.loads("".join(lines).rstrip().removesuffix(",") + "}")


def index_shards(folders: Sequence[Folder]) -> list[ClipRef]:
    """Every clip that the manifests promise, sorted by key; a clip that its local tar lacks carries a `problem`.

    Raises ShardError for a folder without a readable manifest, one without clips, or a key that comes twice.
    """
    refs = by_key(ref for folder in folders for ref in _index(folder))
    return [refs[key] for key in sorted(refs)]


def _index(folder: Folder) -> Iterator[ClipRef]:
    manifest = read_manifest(folder)
    with blame_manifest(folder, "clips"):
        if not manifest["clips"]:
            raise ShardError(f"{folder} holds 0 clips. {HOW_TO_MAKE['clips']}")
        for shard in manifest["shards"]:
            places = find_samples(folder, shard, [(clip["key"], clip["kind"]) for clip in shard["clips"]])
            yield from (ClipRef(**clip, **place) for clip, place in zip(shard["clips"], places, strict=True))


@contextmanager
def blame_manifest(folder: Folder, kind: Literal["clips", "latents"]) -> Iterator[None]:
    """ShardError for what is not as this version writes it."""
    try:
        yield
    except ShardError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ShardError(f"{folder}/{MANIFEST} is damaged ({reason}). {HOW_TO_MAKE[kind]}") from error


def by_key(refs: Iterable[Ref]) -> dict[str, Ref]:
    """ShardError for a key that comes twice."""
    found: dict[str, Ref] = {}
    for ref in refs:
        if ref.key in found:
            other = found[ref.key].tar.parent
            raise ShardError(f"key {ref.key!r} is in {other} and in {ref.tar.parent}; leave one of the two out.")
        found[ref.key] = ref
    return found


def find_samples(folder: Folder, shard: Mapping[str, Any], samples: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """tar, media, meta and problem of a TarRef, for every (key, kind); remote tars are not looked into."""
    if not SHA256.fullmatch(shard["sha256"]):
        raise ValueError(f"sha256 {shard['sha256']!r}")
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
    text = read_meta_text(ref)
    with blame(ref):
        meta = json.loads(text)
        return {**meta, "prompt": str(meta["prompt"])}


def read_meta_text(ref: TarRef) -> bytes:
    """The bytes of a sample's JSON; BadClip without one."""
    if ref.problem:
        raise BadClip(ref.key, ref.problem)
    with blame(ref):
        return _read(ref, "json", ref.meta)


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
