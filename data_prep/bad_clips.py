"""Clips that cannot be used: they count against a budget, and are named with their reasons."""

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from acetate.data.keys import first_reasons

SHOWN = 20


class TooManyBad(RuntimeError):
    """More bad clips than the budget allows."""


class BadClips(dict[str, str]):
    """Key -> reason of clips that cannot be used; more of them than `budget` are TooManyBad."""

    def __init__(self, budget: int):
        super().__init__()
        self.budget = budget

    def add(self, more: Mapping[str, str]) -> None:
        self.update(more)
        if len(self) > self.budget:
            raise TooManyBad(
                f"{len(self)} bad clips, bad_clip_budget={self.budget}: {first_reasons(self)}. "
                "Repair them, move them away or raise bad_clip_budget."
            )


def print_bad(console: Console, bad: Mapping[str, str], file: Path | None) -> None:
    """Prints all of them by their reasons, or the first ones where a file has the rest."""
    left = len(bad) if file is None else SHOWN
    for kind, clips in by_reason(bad).items():
        if len(clips) > 1 or not left:
            console.print(f"{len(clips)} skipped: {kind}", soft_wrap=True)
        for key, reason in islice(clips.items(), left):
            console.print(Text.assemble(("skipped", "red"), f" {key}: {reason}"), soft_wrap=True)
        left = max(0, left - len(clips))
    if file is not None and len(bad) > SHOWN:
        console.print(f"{len(bad) - SHOWN} more are in {file}", soft_wrap=True)


def by_reason(bad: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns key -> reason by the kind of reason, the most frequent kind first."""
    kinds: dict[str, dict[str, str]] = {}
    for key, reason in bad.items():
        kinds.setdefault(kind_of_reason(reason), {})[key] = reason
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def kind_of_reason(reason: str) -> str:
    """Returns a reason without names and numbers, so that like reasons count together."""
    bare = re.sub(r"\S*[/\\]\S*|\S+\.[A-Za-z]\w{2,3}\b:?", "", reason)
    parts = [
        " ".join(re.sub(r"#?\d[\d.x]*|#[\da-f]{6}", "N", part).split()).strip(" :,")
        for part in re.split("[;(]", bare)
    ]
    kind = next((part for part in parts if len(part.split()) > 2), parts[0])
    return re.sub(r"(#?N, )+#?N", "N", kind)
