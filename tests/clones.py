"""A fresh clone of this repository, with the changes that are not committed yet."""

import os
import shutil
import subprocess
import sys
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


def run_in(cwd: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` of the clone, as a user's shell runs it: nothing is redirected."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACETATE_", "WANDB_"))
    }
    variables |= {"PYTHONPATH": f"{cwd / 'src'}{os.pathsep}{cwd}", **environment}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=580,
    )
