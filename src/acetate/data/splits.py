"""Decides which clips train and which validate."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Literal, TypeVar

from acetate.draws import stable_hash

Split = Literal["train", "val"]
Item = TypeVar("Item")


def assign_splits(groups: Mapping[str, str], val_fraction: float) -> dict[str, Split]:
    """Returns key -> split from key -> group. A group (variants of one source) is never torn
    apart."""
    side = split_rule(groups.values(), val_fraction)
    return {key: side(group) for key, group in groups.items()}


def split_rule(groups: Iterable[str], val_fraction: float) -> Callable[[str], Split]:
    """Returns a function from a group to its split. The groups are gone through once and not kept.

    A group's side depends on its name alone, so that a clip keeps its side when others are added.
    With two groups and val_fraction > 0 at least one is in val; at least one is always in train.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}; must be in [0, 1)")
    end = val_fraction * 2**63
    first = last = None
    for place in ((stable_hash("split", group), group) for group in groups):
        first = place if first is None else min(first, place)
        last = place if last is None else max(last, place)
    forced = first if val_fraction > 0 and first != last else None

    def side(group: str) -> Split:
        place = (stable_hash("split", group), group)
        # The last one lies before the end only where all do.
        return "val" if (place[0] < end and place != last) or place == forced else "train"

    return side


def splits_of(stage: str | None) -> tuple[Split, ...]:
    """Returns the splits that a stage of Lightning's needs: a held-out set has none that trains."""
    return ("val",) if stage == "validate" else ("train", "val")


def kind_of(key: str) -> str:
    """Returns the word that a key begins with, as in `smoke-000012`; "" for none."""
    word = re.match("[A-Za-z]*", key)
    return word[0].lower() if word else ""


def validation_draw(
    items: Iterable[Item], count: int, name: Callable[[Item], str], key: Callable[[Item], str]
) -> list[Item]:
    """Draws at most `count` of the items, the same ones each time by their names, in turns of kinds
    by their keys.

    Not the first ones in the alphabet, which are often all of one kind.
    """
    return in_turns(sorted(items, key=lambda item: stable_hash("val", name(item)))[:count], key)


def in_turns(items: Sequence[Item], key: Callable[[Item], str]) -> list[Item]:
    """Reorders the items so that those of different kinds come before the second one of any:
    pictures of the first few then show what there is."""
    kinds: dict[str, list[Item]] = {}
    for item in items:
        kinds.setdefault(kind_of(key(item)), []).append(item)
    rounds = zip_longest(*([(item,) for item in kind] for kind in kinds.values()), fillvalue=())
    return [item for one in chain.from_iterable(rounds) for item in one]
