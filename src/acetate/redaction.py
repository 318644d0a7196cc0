"""Takes secrets out of settings and texts before they are written down: files, dashboards, logs."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard
from urllib.parse import quote, unquote

from acetate.settings import is_list, is_mapping

HIDDEN = "***"
# What stands for the secret of a setting until a program needs it
TOKEN = re.compile(r"\*\*\*[\w.-]+\*\*\*")
SECRET = re.compile(
    r"key|token|secret|passw|pwd|credential|signature|cookie|bearer|authoriz|storage_options",
    re.IGNORECASE,
)
COUNTS = re.compile(r"token", re.IGNORECASE)  # prompt_tokens=128 is no secret
PLACES = re.compile(r"\.(endpoint_url|region_name)$")  # below storage_options, and no secret
REFERENCE = re.compile(r"\$\{[\w.:]+\}")  # to another setting, or to the environment
# of a URL: user, password, or a token in the place of both
LOGIN = re.compile(r"(?<=://)[^/\s?#]+(?=@)")
# and what a signed one is signed with: every value behind the question mark, also in quotes, as
# Hydra's errors show it
QUOTED = r"(?<==)(?:'[^']*'|\"[^\"]*\")"
QUERY = re.compile(rf"(?<=://)([^\s?#'\",]*)\?((?:{QUOTED}|[^\s#'\"])+)")
PAIR = re.compile(rf"{QUOTED}|(?<==)[^&#\s,\]}}]+")
OVERRIDE = re.compile(r"(?s)([+~-]{0,2}[\w.@/-]+)=(.*)")  # name=value, as on a command line
SHORTEST = 4  # letters of a secret that is looked for in texts: others would be found everywhere
KNOWN: set[str] = set()  # what this process has been given


def _is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def redacted(value: Any, name: str = "") -> Any:
    """Returns a copy of settings, or of a command line's arguments, with *** in the place of
    secrets.

    Secret are logins and queries in URLs, everything below `storage_options` but places, and values
    whose name contains key, token, secret, passw, pwd, credential, signature, cookie, bearer or
    authoriz. Switches and null stay, and so do numbers of tokens, references such as ${oc.env:NAME}
    and what stands for a secret.
    """
    if is_mapping(value):
        return {
            _text(key) if isinstance(key, str) else key: redacted(item, f"{name}.{key}")
            for key, item in value.items()
        }
    if _is_list(value):
        return [redacted(item, name) for item in value]
    if is_secret(name, value):
        return HIDDEN
    return _text(value) if isinstance(value, str) else value


def is_secret(name: str, value: Any) -> bool:
    """Returns whether nobody may see the value of a setting, by the setting's name."""
    if value is None or isinstance(value, bool | Mapping | list | tuple) or value == "":
        return False
    if isinstance(value, int | float) and COUNTS.search(name) and "storage_options" not in name:
        return False
    if isinstance(value, str) and (TOKEN.search(value) or REFERENCE.fullmatch(value)):
        return False
    return bool(SECRET.search(name)) and not PLACES.search(name)


def secrets_of(value: Any, name: str = "") -> Iterable[str]:
    """Yields the secrets in settings, as texts."""
    if is_mapping(value):
        for key, item in value.items():
            yield from secrets_of(key)
            yield from secrets_of(item, f"{name}.{key}")
    elif _is_list(value):
        for item in value:
            yield from secrets_of(item, name)
    elif is_secret(name, value):
        yield str(value)
    elif isinstance(value, str):
        yield from LOGIN.findall(value)
        for _, query in QUERY.findall(value):
            yield from PAIR.findall(query)


def settings_with_secrets(value: Any, name: str = "") -> Iterator[str]:
    """Yields the names of settings that hold a secret in plain text."""
    if is_mapping(value):
        for key, item in value.items():
            inner = f"{name}.{key}" if name else str(key)
            if redacted({key: None}) != {key: None}:
                yield name
            yield from settings_with_secrets(item, inner)
    elif is_list(value):
        for item in value:
            yield from settings_with_secrets(item, name)
    elif redacted(value, name) != value:
        yield name


def remember(secrets: Iterable[str]) -> None:
    """Makes `scrubbed` leave these secrets out from now on, also a password and a bearer's token
    alone."""
    for secret in secrets:
        for text in (secret, secret.partition(":")[2], secret.rpartition(" ")[2]):
            KNOWN.update(form for form in (text, unquote(text), quote(text, safe="")))


def scrubbed(text: str, secrets: Iterable[str] = ()) -> str:
    """Returns a text without the secrets that are known, `secrets`, and those of URLs."""
    for secret in sorted({*KNOWN, *secrets}, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _urls(text)


class Scrubbed(logging.Formatter):
    """Formats lines as another formatter does, without secrets, also in tracebacks."""

    def __init__(self, formatter: logging.Formatter | None) -> None:
        super().__init__()
        self.formatter = formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return scrubbed(self.formatter.format(record))


def scrub_logs() -> None:
    """Makes all handlers that there are leave secrets out."""
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    for handler in {h for one in loggers if isinstance(one, logging.Logger) for h in one.handlers}:
        if not isinstance(handler.formatter, Scrubbed):
            handler.setFormatter(Scrubbed(handler.formatter))


def _text(text: str) -> str:
    override = OVERRIDE.fullmatch(text)
    if override and "://" not in override[1] and not TOKEN.search(text):
        name, value = override.groups()
        braces = value[:1] in ("{", "[") and SECRET.search(value)
        plain = value in ("", "null", "true", "false") or REFERENCE.fullmatch(value)
        if not plain and ((SECRET.search(name) and not PLACES.search(name)) or braces):
            return f"{name}={HIDDEN}"
    return _urls(text)


def _urls(text: str) -> str:
    def keep(match: re.Match[str]) -> str:
        return match[0] if TOKEN.fullmatch(match[0].strip("'\"")) else HIDDEN

    text = LOGIN.sub(keep, text)
    return QUERY.sub(lambda match: f"{match[1]}?{PAIR.sub(keep, match[2])}", text)
