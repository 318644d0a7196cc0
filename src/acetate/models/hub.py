"""Repositories of the Hugging Face hub, fetched or cached; where neither can be, an error within
seconds."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# for the one question that is asked before a download, whose own are tried again and again
SECONDS = 5.0


def is_hub_name(source: str) -> bool:
    """OWNER/NAME, which no local path has to be."""
    return (
        not Path(source).is_absolute()
        and not source.startswith((".", "~"))
        and source.count("/") == 1
    )


def from_hub(
    name: str,
    setting: str,
    *,
    allow: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Path:
    """The folder of a repository's files, from the cache alone where the hub cannot be asked.

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
