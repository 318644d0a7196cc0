"""The folder that a program makes: found as it was made before, refused, or made anew in the place
of the old one."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from glob import escape
from pathlib import Path
from typing import Any

from acetate.data.shards import MANIFEST, ShardError, read_head
from acetate.data.store import Folder, read_file
from acetate.data.writer import remove_parts
from acetate.replacing import check_out, remove, rename_over, standing
from data_prep.journal import only_writer, read_journal

CAPTIONS_FILE = "captions.jsonl"
DECISIONS = "decisions.jsonl"  # beside the manifest: what was made of every clip, and why
MEASURED = "measured.jsonl"  # while shards are made: decisions about clips whose lines carry none
# All that programs of data_prep write into a folder; another file in it is somebody else's.
OURS = re.compile(
    r"(clips|latents)-\d{6}\..+|manifest\.json(\.tmp)?|empty_prompt\.safetensors(\.tmp)?|prompts"
    r"|(decisions|measured|scores|rejected|captions)\.jsonl(\.tmp)?"
)
SAID = {  # facts of a folder's maker -> the setting that they come from
    "shards_sha256": "clips of shards", "manifest_sha256": "content of manifest",
    "prompts_sha256": "content of prompts", "vae_sha256": "weights of rgba_vae",
    "eps": "eps of rgba_vae",
    "base_sha256": "weights of wan.vae", "text_encoder_sha256": "weights of wan.text_encoder",
    "prompt_length": "wan.prompt_length", "frozen_dtype": "wan.dtype", "code": "code that scores",
    "synthetic_sha256": "code that draws", "scenes_sha256": "code of the scenes",
    "blender": "version of Blender", "sizes": "size or sizes", "max_bytes": "max_mb in bytes",
}  # fmt: skip
PARTS = re.compile(r"^(choices|look)\.")  # what groups settings inside, not on the command line
LONGEST = 60  # characters of a value


def check_folder(out: Path, shards: Sequence[Folder] = ()) -> None:
    """Raises, before any work, OSError where `out` cannot be made and ShardError where it is read
    from."""
    check_out(out, folder=True)
    old = standing(out)
    # a run was killed between the two renames of `settle`
    if old != out and os.environ.get("RANK", "0") == "0":
        os.replace(old, out)
    for folder in shards:
        if isinstance(folder, Path) and folder.resolve() == out.resolve():
            raise ShardError(
                f"out={out} is also what shards names; name another folder, the clips there stay."
            )


@contextmanager
def making(
    out: Path, made_by: Mapping[str, Any], replace: bool, rank: int = 0
) -> Iterator[Path | None]:
    """Yields the folder to fill, which takes the place of `out` when the block ends; None where
    that is full already.

    made_by: {"command", "settings"}, what decides the content: an interrupted run of the same is
    gone on with. With `replace` a folder that was made otherwise makes way. rank: of the processes
    that fill it together, of which the first one finishes it. Raises RuntimeError if another
    process writes it; ShardError as `place`.
    """
    folder = place(out, made_by, replace)
    finished = (folder / MANIFEST).exists()
    with nullcontext() if finished else only_writer(out, rank):
        yield None if finished else folder
        if rank == 0:
            tidy(folder)
            settle(folder, out)


def tidy(folder: Path) -> None:
    """Removes what a finished folder has no use for; a run that was killed at its end left it."""
    remove_parts(folder)
    (folder / MEASURED).unlink(missing_ok=True)
    shutil.rmtree(folder / "prompts", ignore_errors=True)
    for half in folder.glob("latents-*.tar.*"):
        half.unlink(missing_ok=True)


def manifests_sha256(shards: Sequence[Folder]) -> list[str]:
    return [hashlib.sha256(read_file(folder, MANIFEST)).hexdigest() for folder in shards]


def place(out: Path, made_by: Mapping[str, Any], replace: bool) -> Path:
    """Returns where to make the folder: `out`, unless that holds what was made otherwise.

    With `replace` it is then a folder beside it, the same one after an interruption, which `settle`
    puts in its place. Raises ShardError without, and if another program made the old one or
    something else lies in it.
    """
    wanted = json.loads(json.dumps(made_by))
    other = next((found for found in makers(out) if found != wanted), None)
    if other is None:
        return out
    if other.get("command") != wanted["command"]:
        raise ShardError(
            f"{out} holds what {other.get('command', 'another program')} made. Name another "
            "folder: out=..."
        )
    if not replace:
        raise ShardError(
            f"{out} was made with other settings: {'; '.join(differences(other, wanted))}. Name "
            "another folder (out=...), give the settings that it was made with, or give "
            "replace=true: that makes it anew beside the old one, which stays whole until the new "
            "one takes its place."
        )
    strangers = sorted(path.name for path in out.iterdir() if not OURS.fullmatch(path.name))
    if strangers:
        raise ShardError(
            f"{out} cannot be replaced: {', '.join(strangers[:3])} in it was not made by "
            f"{wanted['command']}. Move that away, or name another folder: out=..."
        )
    mark = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:8]
    return out.with_name(f".new-{out.name}-{mark}")


def settle(folder: Path, out: Path) -> None:
    """Puts what `place` gave, and is finished, in its place; what other runs left beside it
    goes."""
    if folder != out:
        rename_over(folder, out)
    for left in out.absolute().parent.glob(f".new-{escape(out.name)}-????????"):
        remove(left)


def makers(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the "made_by" of the manifest, of latent tars of an unfinished folder and of its
    captions."""
    if (folder / MANIFEST).is_file():
        try:
            yield read_head(folder)["made_by"]
        except ShardError as error:
            raise ShardError(f"{error} Name another folder: out=...") from error
    for part in sorted(folder.glob("latents-*.part.json")):
        yield json.loads(part.read_text(encoding="utf-8"))["made_by"]
    for line in read_journal(folder / CAPTIONS_FILE)[:1]:
        yield line["made_by"]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns "variants: 4 there, 6 now" for each setting that differs."""
    there, now = (dict(flat(maker.get("settings", {}))) for maker in (old, new))
    return [
        f"{said(name)}: {short(name, there)} there, {short(name, now)} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings inside of settings by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def said(name: str) -> str:
    return SAID.get(name, PARTS.sub("", name))


def short(name: str, settings: Mapping[str, Any]) -> str:
    if name not in settings:
        return "none"
    text = json.dumps(settings[name], ensure_ascii=False)
    if "sha256" in name or name == "code":
        text = ", ".join(hashed[:8] for hashed in re.findall(r"[0-9a-f]{8,}", text))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
