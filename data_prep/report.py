"""The page that data_prep.inspect writes: one HTML file that needs nothing else."""

import base64
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from acetate.pages.templates import COLORS, filled, grounds
from data_prep.bad_clips import by_reason
from data_prep.examine import said_of_names

ROWS = 7  # bars of a panel before the rest is summed up
JOINING = {
    "above", "against", "along", "among", "and", "around", "before", "behind", "below", "beside",
    "between", "from", "have", "into", "onto", "over", "that", "their", "there", "these", "this",
    "those", "through", "towards", "under", "very", "while", "which", "with", "without",
}  # fmt: skip
SOFT_BINS = 32


@dataclass(frozen=True)
class Picture:
    """webp: `frames` pictures side by side, straight alpha. alpha: share of pixels at each of 256
    values."""

    webp: bytes
    frames: int
    alpha: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, float, float]:
        """Returns the shares of empty, semi-transparent and opaque pixels."""
        return self.alpha[0], sum(self.alpha[1:-1]), self.alpha[-1]

    @property
    def coverage(self) -> float:
        return sum(value * share for value, share in enumerate(self.alpha)) / 255


@dataclass(frozen=True)
class Entry:
    """A clip as its manifest and JSON describe it; picture: if it is of the sample."""

    key: str
    split: str
    frames: int
    width: int
    height: int
    fps: float
    prompt: str
    licence: str
    source: str
    picture: Picture | None
    decided: Mapping[str, str] = field(default_factory=dict)  # what was decided or done -> why

    @property
    def kind(self) -> str:
        return "still" if self.frames == 1 else "video"


@dataclass(frozen=True)
class Bucket:
    """Windows and clips of a training bucket, and what it does to them: enlarged, played forth and
    back, held."""

    windows: int
    clips: int
    enlarged: int
    most_enlarged: float  # times a side
    looped: int
    held: int  # stills

    @property
    def said(self) -> str:
        parts = (
            [f"{self.enlarged} enlarged, up to {self.most_enlarged:.3g} times a side"]
            if self.enlarged
            else []
        )
        parts += [f"{self.looped} too short, played forth and back"] if self.looped else []
        parts += [f"{self.held} stills, held"] if self.held else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Report:
    """pixels_at_most: of the training buckets, (frames, height, width) -> Bucket."""

    title: str
    made_by: str
    stored: int  # bytes
    entries: Sequence[Entry]
    buckets: Mapping[tuple[int, int, int], Bucket]
    pixels_at_most: int
    seed: int
    skipped: Mapping[str, str]

    @property
    def pictured(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.picture]


def render(report: Report) -> str:
    parts = {
        "subtitle": escape(report.made_by),
        "facts": facts(report),
        "alpha": alpha_panel([entry.picture for entry in report.entries if entry.picture]),
        "panels": panels(report),
        "sample": sample_text(report),
        "selects": selects(report.pictured),
        "grounds": grounds(),
        "cards": "".join(card(entry, entry.picture) for entry in report.pictured if entry.picture),
        "skipped": skipped(report.skipped),
    }
    return filled("report.html", report.title, parts)


def sample_text(report: Report) -> str:
    total, shown = len(report.entries), len(report.pictured)
    if shown == total:
        return "All of them. Point at a clip to play it."
    return (
        f"A sample of {shown:,} of {total:,}, drawn with seed {report.seed}. Point at a clip to "
        "play it."
    )


def facts(report: Report) -> str:
    entries = report.entries
    splits = Counter(entry.split for entry in entries)
    seconds = sum(entry.frames / entry.fps for entry in entries if entry.fps)
    rows = [
        ("clips", f"{len(entries):,}", ""),
        ("frames", f"{sum(entry.frames for entry in entries):,}", ""),
        ("of video", duration(seconds), ""),
        ("stored", size_text(report.stored), ""),
        ("to train, to validate", f"{splits['train']:,} + {splits['val']:,}", ""),
    ]
    if report.skipped:
        rows.append(("skipped", f"{len(report.skipped):,}", "bad"))
    return "".join(
        f'<div class="{mark}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
        for name, value, mark in rows
    )


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def size_text(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def panels(report: Report) -> str:
    entries = report.entries
    shapes = Counter(sides(entry.width, entry.height) for entry in entries)
    lengths = Counter(
        "still" if entry.frames == 1 else f"{entry.frames} frames" for entry in entries
    )
    buckets = {sides(*size): bucket.windows for size, bucket in report.buckets.items()}
    notes = {sides(*size): bucket.said for size, bucket in report.buckets.items()}
    named = said_of_names([entry.prompt for entry in entries])
    distinct = len({entry.prompt for entry in entries})
    parts = [
        panel("Sizes", "width and height in pixels", bars(shapes)),
        panel("Lengths", "", bars(lengths)),
        panel(
            "Training buckets",
            f"windows of frames, height and width; {report.pixels_at_most:,} pixels at most",
            bars(buckets, notes),
        ),
        panel("Licences", "", bars(Counter(entry.licence for entry in entries))),
        panel("Sources", "", bars(Counter(entry.source for entry in entries))),
        panel(
            "Prompts",
            f"{distinct:,} different ones; words that tell them apart"
            + (f". {named}" if named else ""),
            bars(words(entries)),
        ),
    ]
    return "".join(parts)


def sides(*numbers: int) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(map(str, numbers))


def words(entries: Sequence[Entry]) -> dict[str, int]:
    """Prompts that have the word; the most frequent of those that say something, have four letters
    or more, and that not nearly all share."""
    counts = Counter(
        word for entry in entries for word in set(re.findall(r"[^\W\d_]{4,}", entry.prompt.lower()))
    )
    most = 0.6 * len(entries)
    telling = {word: n for word, n in counts.items() if n <= most and word not in JOINING}
    return dict(sorted(telling.items(), key=lambda item: (-item[1], item[0]))[:ROWS])


def panel(title: str, note: str, body: str) -> str:
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="panel"><header><h3>{escape(title)}</h3>{note}</header>{body}</section>'


def bars(counts: Mapping[str, int], notes: Mapping[str, str] | None = None) -> str:
    """Draws the most frequent ones, each with its note, if it has one; what remains in one line."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    most = order[0][1] if order else 1
    rows = [
        f'<li><span title="{escape(name)}">{escape(name)}</span><b>{count:,}</b>'
        f'<i style="--share:{100 * count / most:.4g}%"></i>'
        f"{small_note((notes or {}).get(name, ''))}</li>"
        for name, count in order[:ROWS]
    ]
    if rest := order[ROWS:]:
        rows.append(
            f'<li class="rest"><span>{len(rest):,} '
            f"more</span><b>{sum(n for _, n in rest):,}</b></li>"
        )
    return f'<ul class="bars">{"".join(rows)}</ul>'


def small_note(text: str) -> str:
    return f'<small class="note">{escape(text)}</small>' if text else ""


def alpha_panel(pictures: Sequence[Picture]) -> str:
    """Draws the spread of alpha, in which every clip counts the same, however large."""
    mean = np.mean([picture.alpha for picture in pictures], axis=0) if pictures else np.zeros(256)
    shares = {"empty": mean[0], "soft": mean[1:-1].sum(), "opaque": mean[-1]}
    named = {"empty": "empty", "soft": "semi-transparent", "opaque": "opaque"}
    key = "".join(
        f'<li><i class="{n}"></i>{named[n]}<b>{100 * share:.1f} %</b></li>'
        for n, share in shares.items()
    )
    bins = np.array([part.sum() for part in np.array_split(mean[1:-1], SOFT_BINS)])
    heights = 100 * bins / max(bins.max(), 1e-12)
    columns = "".join(f'<i style="--share:{height:.3g}%"></i>' for height in heights)
    left = f'<div>{stack(list(shares.items()), "stack")}<ul class="key">{key}</ul></div>'
    right = (
        f'<div><div class="histogram" role="img" aria-label="Histogram of semi-transparent '
        f'alpha">{columns}</div>'
        '<div class="axis note"><span>1</span><span>semi-transparent pixels by '
        "alpha</span><span>254</span></div></div>"
    )
    return panel("Alpha", "", f'<div class="alpha">{left}{right}</div>')


def stack(shares: Sequence[tuple[str, float]], name: str) -> str:
    parts = "".join(
        f'<i class="{kind}" style="--share:{100 * share:.4g}%"></i>' for kind, share in shares
    )
    return f'<div class="{name}">{parts}</div>'


def selects(entries: Sequence[Entry]) -> str:
    """Returns the choices where there is more than one."""
    parts = []
    for name, plural in (("split", "splits"), ("kind", "kinds"), ("licence", "licences")):
        values = sorted({getattr(entry, name) for entry in entries})
        if len(values) > 1:
            options = "".join(f"<option>{escape(value)}</option>" for value in values)
            parts.append(
                f'<select name="{name}" aria-label="{name}"><option value="">all '
                f"{plural}</option>{options}</select>"
            )
    return "".join(parts)


def card(entry: Entry, picture: Picture) -> str:
    """Draws a large frame with three small ones beside it, or the middle one over eight colours."""
    aspect, n = entry.width / entry.height, picture.frames
    middle = n // 2
    uri = base64.b64encode(picture.webp).decode()
    small = [middle, *(round(i * (n - 1) / 2) for i in range(3))] if n > 1 else [0]
    strip = "".join(f'<div class="frame"><i style="--at:{i}"></i></div>' for i in small)
    eight = "".join(
        f'<div class="frame" style="--ground:{code}"><i style="--at:{middle}"></i></div>'
        for code in COLORS.values()
    )
    still = " still" if n == 1 else ""
    rate = f"{entry.frames} frames at {entry.fps:.4g} fps" if entry.frames > 1 else "still"
    shares = list(zip(("empty", "soft", "opaque"), picture.shares, strict=True))
    about = [rate, sides(entry.width, entry.height), entry.split, entry.licence, entry.source]
    data: dict[str, Any] = {
        "text": f"{entry.key} {entry.prompt} {entry.source}".lower(),
        "split": entry.split,
        "kind": entry.kind,
        "licence": entry.licence,
        "frames": entry.frames,
        "pixels": entry.width * entry.height,
        "coverage": round(picture.coverage, 5),
        "soft": round(picture.shares[1], 5),
    }
    attributes = " ".join(f'data-{name}="{escape(str(value))}"' for name, value in data.items())
    ratio = 4 / 3 * aspect if n > 1 else aspect
    return (
        f'<article class="card" {attributes} '
        f'style="--frames:{n};--picture:url(data:image/webp;base64,{uri})">'
        f'<div class="sheets" role="img" aria-label="{escape(entry.key)}">'
        f'<div class="sheet strip{still}" style="--ratio:{ratio:.4f}">{strip}</div>'
        f'<div class="sheet palette" style="--ratio:{2 * aspect:.4f}">{eight}</div></div>'
        f"{stack(shares, 'share')}"
        f'<div class="text"><h3 class="name">{escape(entry.key)}</h3><p '
        f'class="prompt">{escape(entry.prompt)}</p>'
        f'<p class="about">{escape(" · ".join(about))}</p>{decisions(entry.decided)}'
        "</div></article>"
    )


def decisions(decided: Mapping[str, str]) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(why)}</dd>" for name, why in decided.items()
    )
    return f'<dl class="decided">{rows}</dl>' if rows else ""


def skipped(reasons: Mapping[str, str]) -> str:
    """Draws a table for each kind of reason, the most frequent first."""
    if not reasons:
        return ""
    tables = []
    for kind, clips in by_reason(reasons).items():
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td>{escape(reason)}</td></tr>"
            for key, reason in clips.items()
        )
        tables.append(
            f"<details open><summary><b>{len(clips):,}</b> {escape(kind)}</summary><table><thead>"
            f"<tr><th>clip</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></details>"
        )
    return (
        f'<section class="skipped"><h2>Skipped</h2><p class="muted">{len(reasons):,} clips could '
        f"not be used.</p>{''.join(tables)}</section>"
    )
