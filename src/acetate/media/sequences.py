"""Frames of a sequence: all images of a folder, or those whose names are one pattern, such as
`walk/frame (*).png`."""

import re
from pathlib import Path

from acetate.media.clip import MediaError
from acetate.media.images import IMAGES, OPAQUE_IMAGES

COUNTER = "*"  # stands for a frame's number in a pattern


def is_sequence(path: Path) -> bool:
    """Tells whether the path is a folder or a pattern of names, and no file."""
    return path.is_dir() or (COUNTER in path.name and not path.exists())


def sequence_files(path: Path) -> list[Path]:
    """Returns the frames in natural order: frame2 before frame10. Raises MediaError if there is
    none."""
    folder, pattern = (path, None) if path.is_dir() else (path.parent, _compiled(path.name))
    files = [
        file
        for file in (folder.iterdir() if folder.is_dir() else ())
        if file.suffix.lower() in IMAGES + OPAQUE_IMAGES
        and not file.name.startswith(".")
        and (pattern is None or pattern.fullmatch(file.name))
    ]
    if not files:
        raise MediaError(
            f"{path}: no image in the folder; a sequence is a folder of {', '.join(IMAGES)}"
        )
    return sorted(
        files,
        key=lambda file: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", file.name)],
    )


def check_frames(path: Path, files: list[Path]) -> None:
    """Raises MediaError that names the first frame that is an empty placeholder."""
    for file in files:
        if not file.stat().st_size:
            raise MediaError(
                f"{path}: its frame {file.name} is empty (0 bytes), {len(files)} frames in all; "
                "render it again, or take it and the numbers after it away"
            )


def _compiled(name: str) -> re.Pattern[str]:
    before, after = name.split(COUNTER, 1)
    return re.compile(rf"{re.escape(before)}\d+{re.escape(after)}", re.IGNORECASE)
