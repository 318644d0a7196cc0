"""One candidate, decoded once within limits of size, time and memory: what it is, or why it is
refused."""

import json
import re
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from acetate.console import printable
from acetate.documents import FieldError
from acetate.media.clip import AS_STATED, Asked, Frames, Limits, Stream
from acetate.media.mattes import is_cutout
from acetate.media.sequences import is_sequence
from acetate.video_io import (
    VIDEOS,
    Description,
    MediaError,
    Rect,
    describe,
    open_packed,
    open_pair,
    open_rgba,
)
from data_prep.candidates import Candidate, sidecar
from data_prep.decisions import OVERRIDES, check_choices
from data_prep.executor import alone_and_lean
from data_prep.found import FOUND, Found, Kind
from data_prep.looks import Look, look_of
from data_prep.rectangles import detected_rectangles, given_rectangles
from data_prep.tables import column, read_text

FROM_NAME = "Transparent background: "  # begins prompts that are made of file names
NAMELESS = "Transparent background"  # the prompt where a name has no word
SLEEPING = 10  # times as long by the clock as by the processor
LEAST_PIXELS = 2**16  # that a picture counts as: small ones take as long as that to begin and end
BYTES_PER_DECODED = 2.5  # memory that reading and measuring take, for each byte of the decoded clip
PREMULTIPLIED = {
    "": None, "1": True, "true": True, "yes": True, "0": False, "false": False, "no": False,
}  # fmt: skip
NO_ALPHA = (
    "has no alpha: it is neither RGBA nor colour with a matte beside it (NAME_fgr + NAME_pha, NAME "
    "+ NAME_matte)"
)


@dataclass(frozen=True)
class Settings:
    """The limits of what a file may take. choices: decisions for all clips, as in
    Decisions.overridden."""

    max_pixels: int = 2**26
    max_frames: int = 200_000
    memory_gb: float = 2
    seconds: float = 10  # for the headers, and again for decoding, which gets more by its size
    megapixels_per_second: float = 4  # that decoding is given time for
    detect_packed: bool = True
    layer: str | None = None  # of OpenEXR files
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        return Limits(
            self.max_pixels,
            self.max_frames,
            int(self.memory_gb * 2**30 / BYTES_PER_DECODED),
            BYTES_PER_DECODED,
        )

    def __post_init__(self) -> None:
        check_choices(self.choices, "override.")


SETTINGS = Settings()


@dataclass(frozen=True)
class Task:
    key: str
    candidate: Candidate
    settings: Settings
    guarded: bool  # in a process of its own, which may be killed


@dataclass(frozen=True)
class Outcome:
    """found or reason. seconds: of one core. look: of a still."""

    found: Found | None
    reason: str | None
    seconds: float
    look: Look | None = None


def guard(settings: Settings, number: int) -> None:
    """Gives a worker process, once, memory_gb on top of what its libraries have mapped. number: is
    not used."""
    load()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bound = mapped + int(settings.memory_gb * 2**30)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(
        resource.RLIMIT_AS, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard)
    )
    alone_and_lean()


def load() -> None:
    """Imports what measures clips, before a file's own time begins: torch, and what imagehash needs
    for its first hash. The process that hands out files does without."""
    import scipy.fftpack  # noqa: F401

    import data_prep.analysis  # noqa: F401


def examine(_: None, task: Task) -> Outcome:
    """Examines a file, and never raises for what is wrong with it. A decoder that hangs is ended
    with its process."""
    load()
    begun = time.process_time()
    look: Look | None = None
    try:
        (found, look), reason = _examined(task), None
    except (MediaError, FieldError) as error:
        found, reason = None, printable(error)
    except (MemoryError, RuntimeError) as error:
        # as torch says it
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        found, reason = (
            None,
            f"needs more than memory_gb={task.settings.memory_gb:g}; cut or scale it, or raise "
            "that",
        )
    finally:
        _allow(task, 0)
    return Outcome(found, reason, time.process_time() - begun, look)


def lost(task: Task, reason: str) -> Outcome:
    """Returns the outcome of a task whose process ended."""
    if signal.SIGALRM.name in reason or signal.SIGPROF.name in reason:
        said = (
            f"took more than its time, seconds={task.settings.seconds:g} and 1 more for every "
            f"{task.settings.megapixels_per_second:g} megapixels; raise seconds if the file is good"
        )
    else:
        said = f"ended the process that decoded it ({reason})"
    return Outcome(None, said, 0.0)


def said_of_names(prompts: Sequence[str]) -> str | None:
    """Returns how many prompts are missing or mere file names, and what to do; None if none is."""
    found = [text.removeprefix(FROM_NAME) for text in prompts if text.startswith(FROM_NAME)]
    missing = sum(text.strip() in ("", NAMELESS, FROM_NAME.strip()) for text in prompts)
    said = []
    if found:
        examples = ", ".join(f'"{text}"' for text in dict.fromkeys(found[:3]))
        said.append(f"{len(found)} of {len(prompts)} prompts are made of file names ({examples})")
    if missing:
        said.append(f"{missing} of {len(prompts)} are missing, as their file names have no word")
    if not said:
        return None
    return (
        f"{', and '.join(said)}, which a DiT learns nothing from: write NAME.txt beside the files "
        "or a column prompt into a table, or caption the shards (acetate prep caption, with "
        "captioner= or prompts=)"
    )


def prompt_from_name(name: str) -> str:
    """Words of a file name, without numbers and hashes where something else is left; NAMELESS where
    it has none, as a name whose bytes are no text."""
    words = [word for word in re.split(r"[\W_]+", name) if word]
    telling = [word for word in words if word.isalpha() and len(word) > 1]
    return f"{FROM_NAME}{' '.join(telling or words)}" if words else NAMELESS


def _allow(task: Task, seconds: float) -> None:
    """Ends the process after so many seconds, even inside of a decoder, by the default action of
    both signals; 0 takes them back.

    Time of the processor, so that a busy machine refuses nothing; and of the clock, for a decoder
    that sleeps.
    """
    if task.guarded:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, SLEEPING * seconds)


def _examined(task: Task) -> tuple[Found, Look | None]:
    from data_prep.analysis import analyse

    candidate, settings = task.candidate, task.settings
    path, row, limits = candidate.files[0], candidate.row, settings.limits
    _allow(task, settings.seconds)
    asked = _asked(candidate, settings)
    header = describe(path, limits, asked)
    volume = header.frames * max(header.width * header.height, LEAST_PIXELS) / 1e6
    _allow(task, settings.seconds + volume / settings.megapixels_per_second)
    candidate, header, notes = _with_own_alpha(candidate, header, limits)
    path = candidate.files[0]
    kind, rects = _kind(candidate, header, settings)
    clip = opened(kind, candidate.files, rects, limits, asked)
    # linear light was divided, or left, in reading: what comes out of it is straight
    linear, declared = header.divided is not None, asked.premultiplied
    believed = declared if declared is None or not linear else False
    look = _looking(clip)
    decisions = analyse(clip, premultiplied=believed, matte=kind == "matte")
    if decisions.reasons.get("alpha_range"):
        clip.notes.append(decisions.reasons["alpha_range"])
    decisions = decisions.overridden("the command line", settings.choices)
    try:
        decisions = decisions.overridden(
            "the table", {name: column(row, name) for name in OVERRIDES if name in row}
        )
    except ValueError as error:
        raise MediaError(f"{path}: its table says {error}") from error
    text = sidecar(task.candidate.path)
    cut_from = (
        f"{candidate.origin.get('source', '')}/{candidate.origin['path']}"
        if "path" in candidate.origin
        else ""
    )
    found = Found(
        key=task.key,
        kind=kind,
        files=[str(file.resolve()) for file in candidate.files],
        frames=clip.held,
        width=clip.shape[1],
        height=clip.shape[0],
        fps=clip.fps,
        prompt=(_text(text) if text else "")
        or printable(column(row, "prompt", "caption", "text"))
        or prompt_from_name(candidate.name),
        licence=column(row, "licence", "license") or "unknown",
        source=column(row, "source") or "unknown",
        group=printable(column(row, "group") or cut_from or candidate.name),
        lossy=clip.lossy,
        premultiplied=clip.premultiplied if believed is None else believed,
        color_rect=rects[0] if rects else None,
        alpha_rect=rects[1] if rects else None,
        decisions=decisions.as_json(),
        layer=asked.layer,
        divide=declared if linear else None,
        notes=[printable(note) for note in (*clip.notes, *notes)],
    )
    FOUND.check(json.loads(json.dumps(asdict(found))), str(path))
    return found, look[0] if look and clip.held == 1 else None


def _looking(clip: Stream) -> list[Look]:
    """Returns where the look of its first picture will be, if it is a still by its headers."""
    seen, pictures = list[Look](), clip.pictures

    def looked_at() -> Iterator[Frames]:
        for picture in pictures:
            if not seen:
                seen.append(look_of(picture))
            yield picture

    if clip.frames == 1:
        clip.pictures = looked_at()
    return seen


def _asked(candidate: Candidate, settings: Settings) -> Asked:
    """Returns what the table says of reading the file. Raises MediaError for a word that is
    none."""
    said = column(candidate.row, "premultiplied").lower()
    if said not in PREMULTIPLIED:
        raise MediaError(
            f"{candidate.files[0]}: its table says premultiplied={said}; it is one of "
            f"{', '.join(filter(None, PREMULTIPLIED))}"
        )
    return Asked(PREMULTIPLIED[said], column(candidate.row, "layer") or settings.layer)


def _with_own_alpha(
    candidate: Candidate, header: Description, limits: Limits
) -> tuple[Candidate, Description, tuple[str, ...]]:
    """Returns, of a picture and its matte, the one that is RGBA by itself, if there is one, its
    header, and what to say of the other."""
    if not candidate.matte:
        return candidate, header, ()
    path, matte = candidate.files
    if header.alpha and least_alpha(open_rgba(path, limits)) < 255:
        said = f"{matte.name} beside it is not used: the picture has alpha of its own"
        return replace(candidate, files=(path,), matte=False), header, (said,)
    other = describe(matte, limits)
    if other.alpha and is_cutout(open_rgba(matte, limits)):
        said = f"{path.name} beside it is not used: {matte.name} has colour and alpha"
        return replace(candidate, files=(matte,), matte=False), other, (said,)
    return candidate, header, ()


def _text(path: Path) -> str:
    try:
        return printable(read_text(path).strip())
    except UnicodeDecodeError as error:
        raise MediaError(f"{path}: not UTF-8 ({error}); save it as such") from error


def _kind(
    candidate: Candidate, header: Description, settings: Settings
) -> tuple[Kind, tuple[Rect, Rect] | None]:
    """Returns the kind, with the rectangles of a packed video. Raises MediaError for what has no
    alpha."""
    path = candidate.files[0]
    if len(candidate.files) == 2:
        return ("matte" if candidate.matte else "pair"), None
    if path.stem.lower().endswith("_fgr"):
        raise MediaError(f"{path} has no partner {path.stem[:-4]}_pha.*")
    if header.alpha:
        return (
            "sequence" if is_sequence(path) else "still" if header.frames == 1 else "video"
        ), None
    rects = given_rectangles(candidate, header)
    if rects is None and header.lost:
        raise MediaError(f"{path}: {header.lost}")
    if rects is None and settings.detect_packed and path.suffix.lower() in VIDEOS:
        rects = detected_rectangles(path, settings.limits)
    if rects is None:
        raise MediaError(f"{path} {NO_ALPHA}, and no rectangles are given or found")
    return "packed", rects


def opened(
    kind: Kind,
    files: Sequence[Path],
    rects: tuple[Rect, Rect] | None,
    limits: Limits,
    asked: Asked = AS_STATED,
) -> Stream:
    """Opens a clip. rects: of colour and alpha in the pictures of a packed video."""
    if kind in ("pair", "matte"):
        return open_pair(files[0], files[1], limits)
    if rects is not None:
        return open_packed(files[0], *rects, limits)
    return open_rgba(files[0], limits, asked)


def least_alpha(clip: Stream) -> int:
    """Returns the least alpha of all its pictures."""
    return min(int(picture[..., 3].min()) for picture in clip)


def as_json(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)


def of_json(line: dict[str, Any]) -> Outcome:
    """Reads what `as_json` wrote. Raises TypeError for another version's line."""
    found, look = line["found"], line["look"]
    return Outcome(
        Found(**found) if found else None,
        line["reason"],
        line["seconds"],
        Look(*look) if look else None,
    )
