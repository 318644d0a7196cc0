"""Clips that cannot be used: they count against a budget, and are named with their reasons."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from acetate.data.shards import first_reasons

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
    """Prints all of them, or the first ones where a file has the rest."""
    shown = len(bad) if file is None else SHOWN
    for key, reason in islice(bad.items(), shown):
        console.print(Text.assemble(("skipped", "red"), f" {key}: {reason}"), soft_wrap=True)
    if len(bad) > shown:
        console.print(f"{len(bad) - shown} more are in {file}", soft_wrap=True)
