"""Settings without their secrets, for whatever is written down: files, dashboards, logs."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SECRET = re.compile(r"key|token|secret|passw|credential|signature|storage_options", re.IGNORECASE)
COUNTS = re.compile(r"token", re.IGNORECASE)  # prompt_tokens=128 is no secret
# of a URL: user, password, or a token in the place of both
LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
QUERY = re.compile(
    r"(?<=[?&])([^=&#\s]*(?:key|token|secret|passw|credential|sig)[^=&#\s]*)=[^&#\s]*",
    re.IGNORECASE,
)
OVERRIDE = re.compile(r"(?s)([+~-]{0,2}[\w.@/-]+)=(.*)")  # name=value, as on a command line


def redacted(value: Any, name: str = "") -> Any:
    """A copy of settings, or of a command line's arguments, with *** in the place of secrets.

    Secret are logins in URLs, everything below `storage_options`, and values whose name contains
    key, token, secret, passw, credential or signature. Switches and null stay, and so do numbers of
    tokens.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if SECRET.search(name) and not (isinstance(value, int | float) and COUNTS.search(name)):
        return HIDDEN
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    override = OVERRIDE.fullmatch(text)
    if override and "://" not in override[1]:
        name, value = override.groups()
        braces = value[:1] in ("{", "[") and SECRET.search(value)
        if value not in ("", "null", "true", "false") and (SECRET.search(name) or braces):
            return f"{name}={HIDDEN}"
    return QUERY.sub(rf"\1={HIDDEN}", LOGIN.sub(HIDDEN, text))
