"""Writes shards: tars that are found whole or not at all, and folders of clips with their
manifest."""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tarfile import USTAR_FORMAT, TarFile, TarInfo
from textwrap import indent
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from acetate.data.keys import check_key, first_reasons
from acetate.data.manifests import CLIP
from acetate.data.shards import MANIFEST, SCHEMA, SHARDS, ClipRef, ShardError
from acetate.data.splits import Split
from acetate.documents import parse
from acetate.draws import stable_hash
from acetate.replacing import write_json, writing, written
from acetate.video_io import encode_ffv1, write_ffv1

Kind = Literal["rgba.mkv", "rgba.png"]


class ShardTar:
    """Writes a tar of samples that takes its name when it is finished; as a context manager it goes
    if anything is raised.

    temporary: where it is written until then, beside `path`. Raises OSError as
    acetate.replacing.writing does.
    """

    def __init__(self, path: Path, temporary: Path):
        self.path, self.temporary = path, temporary
        with writing(path):
            self.tar = TarFile(temporary, "w", format=USTAR_FORMAT)

    def __enter__(self) -> "ShardTar":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.discard()

    def write(self, sample: Mapping[str, str | bytes | Path]) -> None:
        """Writes a sample: `__key__`, and the content of each of its files by their suffix, or the
        path of a file that holds it."""
        files = {suffix: content for suffix, content in sample.items() if suffix != "__key__"}
        with writing(self.path):
            for suffix, content in sorted(files.items()):
                content = content.encode() if isinstance(content, str) else content
                info = TarInfo(f"{sample['__key__']}.{suffix}")
                info.size, info.mode = _size(content), 0o444
                info.uname = info.gname = "bigdata"  # as webdataset writes them
                with _opened(content) as file:
                    self.tar.addfile(info, file)

    def finish(self) -> dict[str, Any]:
        """Puts the tar in its place and returns what a manifest says of it: file, bytes and
        sha256."""
        with writing(self.path):
            self.tar.close()
        with open(self.temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(self.temporary, self.path)
        return {"file": self.path.name, "bytes": self.path.stat().st_size, "sha256": sha256}

    def discard(self) -> None:
        with suppress(OSError):  # the disk may be full
            self.tar.close()
        self.temporary.unlink(missing_ok=True)


def part_of(tar: Path) -> Path:
    """Returns the file beside a finished tar that says what the manifest will; a run that goes on
    looks for it."""
    return tar.with_suffix(".part.json")


def write_part(
    tar: Path, made_by: Mapping[str, Any], shard: Mapping[str, Any], **more: Any
) -> None:
    """Notes that a tar is finished. shard: its entry in the manifest, with its samples."""
    write_json(part_of(tar), {"schema": SCHEMA, "made_by": made_by, "shard": shard, **more})


def read_part(tar: Path, made_by: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads the note of a tar that a run of the same maker finished and that is still whole; None
    if it is not, or the note is damaged."""
    try:
        part = parse(part_of(tar).read_bytes())
        same = part["schema"] == SCHEMA and part["made_by"] == made_by
        whole = same and tar.stat().st_size == part["shard"]["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return part if whole else None


@dataclass(frozen=True)
class EncodedClip:
    """A clip as a shard stores it; fps is 0 for a still. media: its bytes, or the file that holds
    them."""

    media: bytes | Path
    kind: Kind
    frames: int
    width: int
    height: int
    fps: float

    @property
    def size(self) -> int:
        return _size(self.media)


def encode_clip(frames: NDArray[np.uint8], fps: float) -> EncodedClip:
    """Encodes uint8 (T, H, W, 4), straight colour; one frame becomes a PNG still, which has no
    rate."""
    return encode_frames(frames, len(frames), fps)


def encode_frames(
    frames: Iterable[NDArray[np.uint8]], count: int, fps: float, file: Path | None = None
) -> EncodedClip:
    """Encodes `count` frames (H, W, 4) that come one by one, as `encode_clip` does. file: what a
    film is written into, a picture at a time; None: it is kept in memory."""
    height = width = 0

    def measured() -> Iterator[NDArray[np.uint8]]:
        nonlocal height, width
        for frame in frames:
            height, width = frame.shape[:2]
            yield frame

    if count > 1 and file is not None:
        media, kind = file, "rgba.mkv"
        with writing(file), open(file, "wb") as target:
            write_ffv1(target, measured(), fps)
    elif count > 1:
        media, kind = encode_ffv1(measured(), fps), "rgba.mkv"
    else:
        buffer = io.BytesIO()
        Image.fromarray(next(measured())).save(buffer, "PNG")
        media, kind, fps = buffer.getvalue(), "rgba.png", 0.0
    return EncodedClip(media, kind, count, width, height, fps)


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _opened(content: bytes | Path) -> BinaryIO:
    return open(content, "rb") if isinstance(content, Path) else io.BytesIO(content)


def _crc32(content: bytes | Path) -> int:
    value = 0
    with _opened(content) as file:
        while part := file.read(2**20):
            value = zlib.crc32(part, value)
    return value


class ShardWriter:
    """Writes tars of at most `max_clips` clips and about `max_bytes` bytes, and the manifest at
    `close`.

    made_by: {"command", "settings"}, what decides the content. A run that was interrupted and comes
    back with the same made_by keeps its finished tars (`key in writer`); with another, they are
    removed. As a context manager it closes only if nothing was raised. Raises OSError as
    acetate.replacing.writing does.
    """

    def __init__(self, out: Path, *, max_clips: int, max_bytes: int, made_by: Mapping[str, Any]):
        if (out / MANIFEST).exists():
            raise ShardError(
                f"{out} already holds finished shards; name another folder or remove it first."
            )
        self.out, self.max_clips, self.max_bytes = out, max_clips, max_bytes
        self.made_by = json.loads(json.dumps(made_by))
        self.pending: list[dict[str, Any]] = []
        self.pending_bytes = 0
        self.tar: ShardTar | None = None
        self.tars = self.clips = self.frames = 0
        self.splits = {"train": 0, "val": 0}
        self.hashes = np.empty(0, np.int64)  # of the finished tars' keys, sorted: 8 bytes a clip
        # key -> reason, for the manifest; whoever fills the shards keeps it
        self.skipped: dict[str, str] = {}
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        self._find_finished()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
            return
        if self.tar is not None:
            self.tar.discard()
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
        """Adds a clip; done: step -> what was done to the clip and why, which goes into the clip's
        own JSON. Raises FieldError for an entry that a reader would refuse."""
        size = {"frames": clip.frames, "width": clip.width, "height": clip.height}
        meta = {"prompt": prompt, "fps": clip.fps, **size, "source": source, "licence": licence,
            "split": split,
                "lossy": lossy, "premultiplied_source": premultiplied_source}  # fmt: skip
        if done:
            meta["done"] = dict(done)
        CLIP.check(meta, key)
        text = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
        entry = {"key": key, "split": split, **size, "kind": clip.kind, "crc32": _crc32(clip.media)}
        self.write(entry, clip.media, text)

    def copy(self, ref: ClipRef, media: bytes, meta: bytes) -> None:
        """Adds a clip of another folder, its members as they are given."""
        names = ("key", "split", "frames", "width", "height", "kind", "crc32")
        self.write({name: getattr(ref, name) for name in names}, media, meta)

    def write(self, entry: dict[str, Any], media: bytes | Path, meta: bytes) -> None:
        """Writes a clip with its entry in the manifest."""
        key = entry["key"]
        check_key(key)
        if key in self:
            raise ValueError(
                f"key {key!r} was already written; keys are unique in a folder of shards"
            )
        if self.pending and self.pending_bytes + _size(media) > self.max_bytes:
            self._finish_tar()
        if self.tar is None:
            tar = self._tar(self.tars)
            self.tar = ShardTar(tar, tar.with_suffix(".tar.tmp"))
        self.tar.write({"__key__": key, entry["kind"]: media, "json": meta})
        self.pending.append(entry)
        self.pending_bytes += _size(media) + len(meta)
        if len(self.pending) == self.max_clips:
            self._finish_tar()

    def close(self) -> None:
        """Finishes the last tar and writes the manifest. Raises ShardError if there is nothing to
        put into it."""
        if self.pending:
            self._finish_tar()
        if not self.tars:
            with suppress(OSError):  # what else was made there stays
                self.out.rmdir()
            reasons = first_reasons(self.skipped) or "none was given"
            raise ShardError(f"no clip is left to write into {self.out} ({reasons})")
        head = {
            "schema": SCHEMA,
            "made_by": self.made_by,
            "clips": self.clips,
            "frames": self.frames,
            "splits": self.splits,
            "skipped": self.skipped,
        }
        with written(self.out / MANIFEST) as file:
            file.write(
                json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}") + SHARDS + "["
            )
            for number in range(self.tars):  # one at a time: a million clips are a gigabyte of them
                shard = json.loads(part_of(self._tar(number)).read_text())["shard"]
                text = json.dumps(shard, ensure_ascii=False, indent=1)
                file.write(("," if number else "") + indent("\n" + text, "  "))
            file.write("\n ]\n}\n" if self.tars else "]\n}\n")
        remove_parts(self.out)

    def _tar(self, number: int) -> Path:
        return self.out / f"clips-{number:06d}.tar"

    def _finish_tar(self) -> None:
        assert self.tar is not None
        clips = self.pending
        write_part(self.tar.path, self.made_by, {**self.tar.finish(), "clips": clips})
        self.tar, self.pending, self.pending_bytes = None, [], 0
        self._count(clips)

    def _count(self, clips: Sequence[Mapping[str, Any]]) -> None:
        """Takes the clips of one more finished tar into the sums of the manifest."""
        self.tars += 1
        self.clips += len(clips)
        self.frames += sum(clip["frames"] for clip in clips)
        for clip in clips:
            self.splits[clip["split"]] += 1
        new = [stable_hash(clip["key"]) for clip in clips]
        self.hashes = np.sort(np.concatenate((self.hashes, np.array(new, np.int64))), kind="stable")

    def _find_finished(self) -> None:
        """Counts the tars that an interrupted run of the same command finished, and removes
        everything else of it."""
        while part := read_part(self._tar(self.tars), self.made_by):
            self._count(part["shard"]["clips"])
        for path in self.out.glob("clips-*"):
            number = path.name.removeprefix("clips-").split(".")[0]
            if not number.isdecimal() or int(number) >= self.tars:
                path.unlink()


def remove_parts(out: Path) -> None:
    """Removes the parts of tars that the manifest lists; a run that is killed in its last moments
    leaves some."""
    for part in out.glob("clips-*.part.json"):
        part.unlink(missing_ok=True)
