"""A fresh clone of this repository, with the changes that are not committed yet."""

import shutil
import subprocess
from pathlib import Path

from tests.paths import ROOT


def clone(folder: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    changed = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "--modified",
        "--others",
        "--exclude-standard",
        "-z",
    ]
    for name in subprocess.run(changed, check=True, capture_output=True, text=True).stdout.split(
        "\0"
    ):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder
