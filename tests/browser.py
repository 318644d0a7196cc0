"""Pages as a browser shows them."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


def chromium(page, folder, fragment="", *options):
    """The page's DOM after its script, and what the console said."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-sync",
            "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={folder}",
            "--enable-logging=stderr", "--virtual-time-budget=3000",
            *(options or ["--dump-dom"]), f"{page.as_uri()}#{fragment}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def screenshot(page, folder, fragment=""):
    """The page's pixels, (900, 1400, 3), and what the console said."""
    file = folder / "screen.png"
    shot = ("--window-size=1400,900", f"--screenshot={file}")
    _, said = chromium(page, folder / "profile", fragment, *shot)
    return np.array(Image.open(file).convert("RGB")), said
