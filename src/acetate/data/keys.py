"""Keys of clips and latents: what a tar takes as the name of a sample, and how long names become
short ones."""

import re
import unicodedata

LONGEST_KEY = 80  # bytes of UTF-8: a tar's plain header holds 100 of a member's name


def plain_key(name: str) -> str:
    """The name in Unicode's NFC, with _ for everything but letters, marks and digits of any script,
    _ and -.

    webdataset cuts names at a dot.
    """
    name = unicodedata.normalize("NFC", name)
    kept = (
        char if char in "_-" or unicodedata.category(char)[0] in "LMN" else "." for char in name
    )
    return re.sub(r"\.+", "_", "".join(kept))


def check_key(key: str) -> None:
    """ValueError unless a sample can have this key."""
    if not key or plain_key(key) != key or len(key.encode()) > LONGEST_KEY:
        raise ValueError(
            f"key {key!r}; keys are 1 to {LONGEST_KEY} bytes of letters and digits of any script "
            "in Unicode's NFC, _ and -"
        )


def beginning(key: str, most: int) -> str:
    """The beginning of a key, of at most so many bytes."""
    return key.encode()[:most].decode(errors="ignore")


def shortened(key: str, most: int, digest: str) -> str:
    """The key; where it has more than `most` bytes, its beginning, a dash and the digest that tells
    it apart."""
    if len(key.encode()) <= most:
        return key
    return f"{beginning(key, most - len(digest) - 1)}-{digest}"
