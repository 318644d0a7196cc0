"""Reads JSON that others wrote, within bounds, and holds it against a schema before anything is
made of it."""

import json
import os
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from acetate.settings import Rule, is_mapping, mapping, text

DEEPEST = 32  # levels of what no schema describes
MOST_VALUES = 2**24  # of a document: 64 bytes of memory or more each
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60
_shown.maxlevel = 3


class FieldError(ValueError):
    """A field, named by its place in a document, has a value that breaks its rule."""


def open_plain(path: Path, most: int | None = None) -> BinaryIO:
    """Opens a file to read. Raises OSError for a pipe, a device or a folder, none of which is
    waited for, and for a file of more than `most` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and (most is None or found.st_size <= most):
        return open(descriptor, "rb")
    os.close(descriptor)
    if most is None or not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is no plain file")
    raise OSError(too_large(path, most))


def read_plain(path: Path, most: int) -> bytes:
    """Reads a file's bytes. Raises OSError as `open_plain`."""
    with open_plain(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def too_large(name: object, most: int) -> str:
    return f"{name} has more than {most:,} bytes, the most that is read of such a file"


def parse(data: bytes | str) -> Any:
    """Returns the value of a JSON text. Raises ValueError with the reason for a text that is no
    JSON, is nested too deeply or has more than MOST_VALUES values."""
    commas = data.count(b",") if isinstance(data, bytes) else data.count(",")
    if commas > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def shown(value: Any) -> str:
    """Writes a value as an error shows it, cut where it is long."""
    try:
        return _shown.repr(value)
    except ValueError:  # whole numbers of thousands of digits
        return f"a {type(value).__name__}"


def is_shallow(value: Any) -> bool:
    """Returns whether nothing in the value is nested deeper than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for held in level
            if isinstance(held, Mapping | list | tuple)
            for inner in (held.values() if isinstance(held, Mapping) else held)
        ]
        if not level:
            return True
    return False


def can_be_written(value: str) -> bool:
    """Returns whether a text has no half of a surrogate pair, which JSON can hold and UTF-8
    cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def prose(most: int) -> Rule:
    """Makes a rule: text of at most so many characters."""
    return Rule(
        f"text of at most {most:,} characters of Unicode",
        lambda value: isinstance(value, str) and len(value) <= most and can_be_written(value),
    )


something = Rule(f"nested at most {DEEPEST} levels deep", is_shallow)
names = Rule(
    f"an object of names and values, nested at most {DEEPEST} levels deep",
    lambda value: isinstance(value, dict) and is_shallow(value),
)
reasons = Rule(
    "an object of texts by key",
    lambda value: (
        isinstance(value, dict) and (not value or mapping(text, prose(2**20)).holds(value))
    ),
)
many = Rule("a list", lambda value: isinstance(value, list))


@dataclass(frozen=True)
class Schema:
    """The fields of an object. open: whether others may stand beside them."""

    required: Mapping[str, Rule]
    optional: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    open: bool = True

    def check(self, value: Any, place: str = "") -> None:
        """Raises FieldError that names the first field that is missing, unknown or breaks its
        rule. place: of the object in its document."""
        if not is_mapping(value):
            raise FieldError(f"{place or 'all of it'}={shown(value)}: must be an object")
        at = f"{place}." if place else ""
        for name, rule in self.required.items():
            if name not in value:
                raise FieldError(f"{at}{name} is missing: must be {rule.says}")
            if not rule.holds(value[name]):
                raise broken(f"{at}{name}", value[name], rule)
        if len(value) == len(self.required):
            return
        for name in value.keys() - self.required.keys():
            rule = self.optional.get(name)
            if rule is None and not self.open:
                raise FieldError(f"{at}{shown(name)} is unknown")
            if not (rule or something).holds(value[name]):
                raise broken(f"{at}{name}", value[name], rule or something)


def broken(name: str, value: Any, rule: Rule) -> FieldError:
    return FieldError(f"{name}={shown(value)}: must be {rule.says}")
