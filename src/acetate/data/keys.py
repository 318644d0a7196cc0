"""Keys of clips and latents: names that a tar takes for a sample, how long ones become short, and
what is wrong with whose."""

import re
import unicodedata
from collections.abc import Mapping
from itertools import islice
from typing import Any

from acetate.settings import Rule

LONGEST_KEY = 80  # bytes of UTF-8: a tar's plain header holds 100 of a member's name
ASCII = re.compile(r"[A-Za-z0-9_-]+")


def plain_key(name: str) -> str:
    """Returns the name in Unicode's NFC, with _ for everything but letters, marks and digits of any
    script, _ and -.

    webdataset cuts names at a dot.
    """
    name = unicodedata.normalize("NFC", name)
    kept = (
        char if char in "_-" or unicodedata.category(char)[0] in "LMN" else "." for char in name
    )
    return re.sub(r"\.+", "_", "".join(kept))


def is_key(key: Any) -> bool:
    """Returns whether a sample can have this key."""
    return (
        isinstance(key, str)
        and 0 < len(key) <= LONGEST_KEY
        and (bool(ASCII.fullmatch(key)) or plain_key(key) == key)
        and len(key.encode()) <= LONGEST_KEY
    )


KEY = Rule(
    f"1 to {LONGEST_KEY} bytes of letters and digits of any script in Unicode's NFC, _ and -",
    is_key,
)


def check_key(key: str) -> None:
    """Raises ValueError unless a sample can have this key."""
    if not is_key(key):
        raise ValueError(f"key {key!r}; keys are {KEY.says}")


def beginning(key: str, most: int) -> str:
    """Returns the beginning of a key, of at most so many bytes."""
    return key.encode()[:most].decode(errors="ignore")


def shortened(key: str, most: int, digest: str) -> str:
    """Returns the key; where it has more than `most` bytes, its beginning, a dash and the digest
    that tells it apart."""
    if len(key.encode()) <= most:
        return key
    return f"{beginning(key, most - len(digest) - 1)}-{digest}"


def first_reasons(bad: Mapping[str, str]) -> str:
    """Writes the first three of key -> reason in words."""
    return "; ".join(f"{key}: {reason}" for key, reason in islice(bad.items(), 3))
