"""Rules for the values of settings, in words and as a test."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

ENDLESS = 2**31 - 1  # a bound of counts that is not worth saying


class SettingError(ValueError):
    """A setting, by its name, has a value that breaks its rule."""

    def __init__(self, name: str, value: Any, message: str) -> None:
        super().__init__(message)
        self.name, self.value = name, value

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return type(self), (self.name, self.value, str(self))


@dataclass(frozen=True)
class Rule:
    """A rule: `says` completes "must be ..."; `holds` tells whether a value keeps it."""

    says: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raises SettingError that names the setting, its value and the rule."""
        if not self.holds(value):
            hint = " No value is written null, not None." if value == "None" else ""
            raise SettingError(name, value, f"{name}={shown(value)}: must be {self.says}.{hint}")


def shown(value: Any) -> str:
    """Writes a value as on a command line, cut where it is long."""
    if value is None:
        return "null"
    written = str(value).lower() if isinstance(value, bool) else str(value)
    return written if len(written) <= 80 else f"{written[:77]}..."


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Returns whether a value is a sequence and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _span(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    parts = [
        f"{word} {bound:g}" if abs(bound) < 1e6 else f"{word} {bound:,}"
        for word, bound in (
            ("above", above), ("at least", low), ("below", below), ("at most", high),
        )
        if bound is not None and bound < ENDLESS
    ]  # fmt: skip
    return (" " + ", ".join(parts)) if parts else ""


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Rule:
    """Makes a rule: a finite number in the given span."""

    def holds(value: Any) -> bool:
        return (
            _is_number(value)
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    return Rule(f"a number{_span(low, high, above, below)}", holds)


def whole(low: int | None = None, high: int | None = None) -> Rule:
    """Makes a rule: a whole number in the given span."""
    within = number(low, high)
    return Rule(
        f"a whole number{_span(low, high, None, None)}",
        lambda value: isinstance(value, int) and within.holds(value),
    )


def strides(step: int, rest: int, high: int) -> Rule:
    """Makes a rule: a whole number step * k + rest, k from 0, at most `high`."""
    few = ", ".join(str(step * k + rest) for k in range(4))
    return Rule(
        f"one of {few}, ... ({step}k+{rest}), at most {high:,}",
        lambda value: whole(1, high).holds(value) and value % step == rest,
    )


flag = Rule("true or false", lambda value: isinstance(value, bool))
text = Rule("text", lambda value: isinstance(value, str))
words = Rule("text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
place = Rule(
    "the name of a file or folder, or a URL",
    lambda value: (
        isinstance(value, str) and bool(value.strip()) and not re.search(r"[\0\n\r]", value)
    ),
)
anything = Rule("anything", lambda value: True)


def one_of(*known: Any) -> Rule:
    return Rule(
        f"one of {', '.join(map(str, known))}",
        lambda value: any(value == item and type(value) is type(item) for item in known),
    )


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.says}, or null", lambda value: value is None or rule.holds(value))


def either(*rules: Rule) -> Rule:
    return Rule(
        ", or ".join(rule.says for rule in rules), lambda value: any(r.holds(value) for r in rules)
    )


def several(rule: Rule, least: int = 1, most: int | None = None) -> Rule:
    """Makes a rule: a list of values that each keep the rule, `least` of them or more, at most
    `most`."""
    if most == least:
        count = f"a list of {least}"
    else:
        count = f"a list, of at least {least}" if least else "a list"
    return Rule(
        f"{count}, each {rule.says}",
        lambda value: (
            is_list(value)
            and least <= len(value) <= (len(value) if most is None else most)
            and all(map(rule.holds, value))
        ),
    )


def rising(rule: Rule) -> Rule:
    """Makes a rule: two values [low, high], low at most high."""
    two = several(rule, 2, 2)
    return Rule(
        f"[low, high], each {rule.says}", lambda value: two.holds(value) and value[0] <= value[1]
    )


def mapping(keys: Rule, values: Rule) -> Rule:
    return Rule(
        f"a mapping of {keys.says} to {values.says}",
        lambda value: (
            is_mapping(value)
            and len(value) > 0
            and all(keys.holds(k) and values.holds(v) for k, v in value.items())
        ),
    )
