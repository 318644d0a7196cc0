"""Gives clips prompts, from tables and text files or a vision-language model; the clips stay as
they are."""

import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from string import Formatter
from typing import Literal

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from acetate.cli import run
from acetate.data.manifests import PROMPT
from acetate.data.shards import (
    MANIFEST,
    BadClip,
    ClipRef,
    index_shards,
    read_clip,
    read_head,
    read_meta,
    read_meta_text,
)
from acetate.data.store import listed
from acetate.data.writer import ShardWriter
from acetate.documents import parse, shown
from acetate.draws import stable_hash
from data_prep.bad_clips import BadClips, print_bad
from data_prep.captioner import Captioner, Look, locate_captioner
from data_prep.copies import copy_clips, gather
from data_prep.executor import check, progress
from data_prep.folders import CAPTIONS_FILE, check_folder, making, manifests_sha256
from data_prep.journal import Line, read_journal, write_lines
from data_prep.tables import read_rows, read_text

PREVIEW_CLIPS = 8
PIECE = re.compile(r"-p\d{3,}$")  # what data_prep.shard adds to the key of a clip that it cuts
Row = dict[str, str]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The settings that decide the prompts. captioner: null leaves clips without a given prompt as
    they are."""

    overwrite: Literal["missing", "all"]
    missing: str  # regular expression: prompts that count as none
    template: str
    captioner: str | None
    instruction: str
    look: Look
    max_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        if "{caption}" not in self.template:
            raise ValueError(
                f"template={self.template!r} has no {{caption}}; that is where the caption goes"
            )
        try:
            re.compile(self.missing)
        except re.error as error:
            raise ValueError(
                f"missing={self.missing!r} is no regular expression ({error}); in one, ( ) [ ] . * "
                "+ ? and \\ stand for themselves after a \\"
            ) from error
        try:
            list(Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(
                f"template={self.template!r}: {error}; write {{{{ and }}}} for braces"
            ) from error

    def is_missing(self, prompt: str) -> bool:
        return self.overwrite == "all" or re.fullmatch(self.missing, prompt, re.DOTALL) is not None


def read_prompts(source: Path) -> dict[str, Row]:
    """Reads key -> {"caption", and whatever else the row has} from a .csv or .jsonl file or a
    folder of KEY.txt.

    Columns: key; caption (or prompt, text); more of them for the template. Raises ValueError that
    names the row that lacks one.
    """
    if source.is_dir():
        texts = {
            unicodedata.normalize("NFC", path.stem): read_text(path).strip()
            for path in sorted(source.glob("*.txt"))
            if not path.name.startswith("._")  # macOS's notes on another file
        }
        for key, text in texts.items():
            if not text:
                raise ValueError(
                    f"{source / key}.txt is empty; write the caption of {key} into it or remove it"
                )
        return {key: {"caption": text} for key, text in texts.items()}
    if source.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"prompts={source}; give a .csv, a .jsonl or a folder of KEY.txt")
    try:
        found = read_rows(source)
    except ValueError as error:
        raise ValueError(f"prompts={error}") from error
    rows: dict[str, Row] = {}
    for number, row in enumerate(found, start=1):
        texts = {
            name: str(value).strip()
            for name, value in row.items()
            if name and value not in (None, "")
        }
        texts = {name.strip().lower(): text for name, text in texts.items()} | texts
        texts["caption"] = next(
            (texts[name] for name in ("caption", "prompt", "text") if name in texts), ""
        )
        if "key" not in texts or not texts["caption"]:
            raise ValueError(
                f"{source}: row {number} lacks a key or a caption; columns: key, caption"
            )
        if not PROMPT.holds(texts["caption"]):
            raise ValueError(
                f"{source}: row {number}: caption={shown(texts['caption'])}: must be {PROMPT.says}"
            )
        rows[unicodedata.normalize("NFC", texts["key"])] = texts
    return rows


def prompts_for(refs: Sequence[ClipRef], source: Path) -> dict[str, Row]:
    """Reads prompts, with a warning about rows that no clip takes. Raises ValueError if no clip
    takes any."""
    if not source.exists():
        raise FileNotFoundError(
            f"prompts={source} does not exist; give a .csv, a .jsonl or a folder of KEY.txt"
        )
    rows = read_prompts(source)
    keys = {key for ref in refs for key in (ref.key, PIECE.sub("", ref.key))}
    idle = [key for key in rows if key not in keys]
    if idle:
        said = (
            f"prompts={source}: {len(idle)} of {len(rows)} rows have the key of no clip: "
            f"{', '.join(idle[:3])}"
        )
        if len(idle) == len(rows):
            raise ValueError(
                f"{said}. Keys here are as {refs[0].key}; correct those of the prompts."
            )
        log.warning(said)
    return rows


def sentence(template: str, row: Row) -> str:
    """Puts the template around a caption; one that says already that its background is transparent
    stays as it is."""
    caption = row["caption"]
    if re.match(r"transparent background", caption, re.IGNORECASE):
        return caption
    inside = re.sub(r"^(An?|The)\b", lambda word: word[0].lower(), caption)
    try:
        return template.format(**{**row, "caption": inside})
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"template={template!r} asks for {error}; this row has {', '.join(sorted(row))}: "
            f"{caption}"
        ) from error


def decide(ref: ClipRef, settings: Settings, given: Mapping[str, Row]) -> Line | BadClip | None:
    """Returns the line of a clip whose prompt is known: kept, or given; None if the captioner has
    to see it."""
    try:
        prompt = read_meta(ref)["prompt"]
    except BadClip as bad:
        return bad
    row = given.get(ref.key) or given.get(PIECE.sub("", ref.key))
    if not settings.is_missing(prompt) or (row is None and settings.captioner is None):
        return {"key": ref.key, "from": "kept", "prompt": prompt}
    if row is not None:
        return {"key": ref.key, "from": "given", "prompt": sentence(settings.template, row)}
    return None


def see(captioner: Captioner, ref: ClipRef, template: str) -> Line | BadClip:
    try:
        caption = captioner(read_clip(ref).frames)
    except BadClip as bad:
        return bad
    except ValueError as error:
        return BadClip(ref.key, str(error))
    return {"key": ref.key, "from": "captioner", "prompt": sentence(template, {"caption": caption})}


def load_captioner(folder: Path, settings: Settings, device: str, number: int) -> Captioner:
    """Loads the captioner of worker `number`. device auto: spread over the GPUs, the CPU where
    there is none."""
    if device == "auto":
        count = torch.cuda.device_count()
        device = f"cuda:{number % count}" if count else "cpu"
    return Captioner(
        folder, instruction=settings.instruction, look=settings.look,
        max_tokens=settings.max_tokens, dtype=settings.dtype, device=device,
    )  # fmt: skip


def caption_clips(
    refs: Sequence[ClipRef],
    settings: Settings,
    given: Mapping[str, Row],
    device: str,
    executor: str,
    workers: int,
) -> Iterator[Line | BadClip]:
    """Yields the line of every clip; those that the captioner sees come last."""
    unseen = []
    for ref in tqdm(refs, unit="clip", desc="prompts"):
        line = decide(ref, settings, given)
        if line is None:
            unseen.append(ref)
        else:
            yield line
    if unseen:
        captioner = locate_captioner(str(settings.captioner))
        with progress(
            partial(see, template=settings.template), unseen, desc="captions", executor=executor,
            workers=workers,
            setup=partial(load_captioner, captioner, settings, device), name=attrgetter("name"),
        ) as results:  # fmt: skip
            yield from (line for _, line in results)


def caption(
    *,
    shards: Sequence[Path],
    out: Path,
    prompts: Path | None,
    settings: Settings,
    max_clips: int,
    max_bytes: int,
    bad_clip_budget: int,
    device: str,
    executor: str,
    workers: int,
    replace: bool = False,
) -> tuple[list[Line], dict[str, str]]:
    """Writes captions.jsonl and shards of the same clips with the new prompts; returns the lines,
    and key -> reason.

    A run that was interrupted keeps the captions that it has. A folder that already holds these
    very prompts is left as it is; one that holds others is made anew with `replace`, else
    ShardError. TooManyBad past the budget.
    """
    check(executor, workers)
    check_folder(out, shards)
    refs = index_shards(shards)
    given = prompts_for(refs, prompts) if prompts else {}
    content = {
        **asdict(settings), "max_clips": max_clips, "max_bytes": max_bytes,
        "prompts_sha256": hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest(),
        "shards_sha256": manifests_sha256(shards),
    }  # fmt: skip
    made_by = json.loads(json.dumps({"command": "data_prep.caption", "settings": content}))
    with making(out, made_by, replace) as folder:
        if folder:
            if settings.captioner:
                locate_captioner(settings.captioner)  # before anything is written
            journal, bad = folder / CAPTIONS_FILE, BadClips(bad_clip_budget)
            if not read_journal(journal):
                write_lines(journal, [{"made_by": made_by}])
            known = {line["key"]: line for line in read_journal(journal)[1:]}
            todo = [ref for ref in refs if ref.key not in known]
            gather(
                caption_clips(todo, settings, given, device, executor, workers), journal, known, bad
            )
            good = [ref for ref in refs if ref.key not in bad]
            write_lines(journal, [{"made_by": made_by}, *(known[ref.key] for ref in good)])
            with ShardWriter(
                folder, max_clips=max_clips, max_bytes=max_bytes, made_by=made_by
            ) as writer:
                copy_clips(
                    good,
                    writer,
                    bad,
                    lambda ref: with_prompt(read_meta_text(ref), known[ref.key]["prompt"]),
                )
    return read_journal(out / CAPTIONS_FILE)[1:], read_head(out)["skipped"]


def with_prompt(meta: bytes, prompt: str) -> bytes:
    """Returns a clip's JSON with another prompt; the same bytes if it is the same."""
    content = parse(meta)
    if content["prompt"] == prompt:
        return meta
    return json.dumps({**content, "prompt": prompt}, ensure_ascii=False, sort_keys=True).encode()


def preview(
    shards: Sequence[Path], prompts: Path | None, settings: Settings, device: str
) -> tuple[list[Line], dict[str, str], int]:
    """Returns lines of a few clips, reasons of those that have none, and the number of clips in
    all. Writes nothing."""
    refs = index_shards(shards)
    few = sorted(refs, key=lambda ref: stable_hash(ref.key))[:PREVIEW_CLIPS]
    lines = list(
        caption_clips(
            few, settings, prompts_for(refs, prompts) if prompts else {}, device, "local", 0
        )
    )
    bad = {line.key: line.reason for line in lines if isinstance(line, BadClip)}
    return [line for line in lines if not isinstance(line, BadClip)], bad, len(refs)


def main(cfg: DictConfig) -> None:
    console = Console(markup=False, highlight=False)
    shards = [Path(folder) for folder in listed(cfg.shards)]
    prompts = Path(cfg.prompts) if cfg.prompts else None
    look = Look(cfg.pictures, cfg.images, cfg.background)
    asked = [field.name for field in fields(Settings) if field.name != "look"]
    settings = Settings(look=look, **{name: cfg[name] for name in asked})
    if cfg.preview:
        lines, bad, total = preview(shards, prompts, settings, cfg.device)
        table = Table("key", "from", "prompt")
        for line in lines:
            table.add_row(line["key"], line["from"], line["prompt"])
        console.print(table)
        console.print(f"{len(lines)} of {total} clips were looked at. Nothing was written.")
    else:
        same = ("max_clips", "bad_clip_budget", "device", "executor", "workers", "replace")
        own = {name: cfg[name] for name in same} | {"max_bytes": int(cfg.max_mb * 2**20)}
        lines, bad = caption(
            shards=shards, out=Path(cfg.out), prompts=prompts, settings=settings, **own
        )
        counts = ", ".join(
            f"{count} {origin}"
            for origin, count in Counter(line["from"] for line in lines).most_common()
        )
        console.print(f"{cfg.out}: {len(lines)} prompts, {counts}", soft_wrap=True)
    print_bad(console, bad, None if cfg.preview else Path(cfg.out) / MANIFEST)


if __name__ == "__main__":
    run("prep caption")
