"""Fetches repositories of the Hugging Face hub, or finds them in the cache; where neither can be,
fails within seconds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# for the one question that is asked before a download, whose own are tried again and again
SECONDS = 5.0


def is_hub_name(source: str) -> bool:
    """Returns whether a source is OWNER/NAME, which no local path has to be."""
    return (
        not Path(source).is_absolute()
        and not source.startswith((".", "~"))
        and source.count("/") == 1
    )


def refuse_code(folder: Path, setting: str) -> None:
    """Raises ValueError for a folder of transformers whose configs name code of their own, which is
    never run; the reader of a config that is no JSON says so."""

    def refuse(part: dict[str, Any]) -> dict[str, Any]:
        if part.get("auto_map"):
            raise NamesCode(part["auto_map"])
        return part

    for file in sorted(folder.glob("*config*.json")):
        try:
            json.loads(file.read_bytes(), object_hook=refuse)
        except NamesCode as found:
            raise ValueError(
                f"{setting}: {file} names code of its own, auto_map {found}, and code of models is "
                "never run. Give a model that transformers knows; if it knows this one, take "
                "auto_map out of the file."
            ) from None
        except (ValueError, RecursionError):
            continue


class NamesCode(Exception):
    """A config has an auto_map."""


def from_hub(
    name: str,
    setting: str,
    *,
    allow: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Path:
    """Returns the folder of a repository's files, from the cache alone where the hub cannot be
    asked.

    allow, ignore: patterns of files. Raises FileNotFoundError that names the setting and says what
    to do.
    """
    reason = ""
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        reason = (
            f"the hub has no such repository, or not for you ({status or type(error).__name__})"
        )
    except Exception as error:  # httpx's own, which it does not export for all versions
        reason = f"the hub cannot be reached ({type(error).__name__})"
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=allow and list(allow), ignore_patterns=ignore and list(ignore),
                local_files_only=bool(reason),
            )
        )  # fmt: skip
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{setting}={name} is no folder here, is not in the cache of the hub, and "
            f"{reason or f'could not be fetched ({type(error).__name__})'}. Correct the path; or "
            f"download it where there is a network (hf download {name}) and give its folder."
        ) from error
