"""Blender as a Python module, in an interpreter and environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import OpenEXR
from filelock import FileLock
from numpy.typing import NDArray

from acetate.replacing import writing

VERSION = "5.0.1"  # of bpy, whose wheels run on this Python alone
PYTHON = "3.11"
SCENES = Path(__file__).parent / "in_blender"
SYSTEM = (
    "libgl1 libice6 libsm6 libx11-6 libxext6 libxfixes3 libxi6 libxkbcommon0 libxrender1"
    " libxxf86vm1"
)
OTHERWISE = (
    f"Or name an interpreter that has bpy {VERSION.split('.')[0]}.x: blender=FOLDER/bin/python"
)
TAIL = 5  # lines of Blender's own words in an error


class BlenderError(RuntimeError):
    """Blender cannot be found, started or installed, or fails at a scene."""


def home() -> Path:
    """Returns where the environment lies that is made at first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "acetate" / f"bpy-{VERSION}"


def interpreter(chosen: str | None) -> tuple[str, str]:
    """Returns an interpreter that has Blender, and Blender's version. chosen: its path; None: the
    one of the environment in the user's cache, which is made where it is missing. Raises
    BlenderError."""
    python = chosen or installed(home())
    try:
        done = subprocess.run(
            [python, "-E", "-s", "-c", "import bpy; print('bpy', bpy.app.version_string)"],
            capture_output=True, text=True,
        )  # fmt: skip
    except OSError as error:
        raise BlenderError(f"blender={python} cannot be started: {error.strerror}.") from error
    for line in done.stdout.splitlines():
        if line.startswith("bpy "):
            return python, line.removeprefix("bpy ")
    raise BlenderError(no_blender(python, done.stderr, chosen is not None))


def no_blender(python: str, said: str, named: bool) -> str:
    """Makes the error that says why `import bpy` failed and what helps."""
    last = said.strip().splitlines()[-1] if said.strip() else "it said nothing"
    if "cannot open shared object" in last:
        way = f"A library of the system is missing; on Debian: apt-get install {SYSTEM}"
    elif named:
        way = f"Install it there (bpy {VERSION} needs Python {PYTHON}), or leave blender= out"
    else:
        way = f"Remove {home()}, and the next run makes it anew. {OTHERWISE}"
    return f"{python} does not import bpy, Blender as a Python module: {last}. {way}."


def installed(folder: Path) -> str:
    """Returns the interpreter of the environment in `folder`, made there if no run has finished
    one."""
    python, whole = folder / "bin" / "python", folder / ".complete"
    if not whole.exists():
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not whole.exists():
                install(folder, python)
                with writing(whole):
                    whole.touch()
    return str(python)


def install(folder: Path, python: Path) -> None:
    steps = commands(folder, python)
    text = (
        f"Blender {VERSION} is installed once into {folder}: about 350 MB to download, 0.9 GB on "
        "the disk, a minute or a few."
    )
    print(text, file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).strip().splitlines()[-TAIL:])
            raise BlenderError(
                f"bpy {VERSION} could not be installed into {folder}: {' '.join(step)} said: "
                f"{said}. {OTHERWISE}."
            )


def commands(folder: Path, python: Path) -> list[list[str]]:
    """Returns the commands that make the environment: with uv, which brings the interpreter; else
    with this one, if it is of the version."""
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent),
        os.environ.get("PATH", ""))))  # fmt: skip
    bpy = f"bpy=={VERSION}"
    if uv:
        return [
            [uv, "venv", "--quiet", "--no-project", "--python", PYTHON, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(python), bpy],
        ]
    if "{}.{}".format(*sys.version_info) == PYTHON:
        return [[sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", bpy]]  # fmt: skip
    raise BlenderError(
        f"bpy {VERSION} needs Python {PYTHON}, this is {sys.version.split()[0]}, and there is no "
        f"uv to bring one. Install it: pip install uv. {OTHERWISE}."
    )


class Blender:
    """A process that renders one clip after another; it ends with this object, or with this
    process. threads: that it renders with. BlenderError."""

    def __init__(self, python: str, threads: int):
        self.threads = threads
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  ends with this
        self.process = subprocess.Popen(
            [python, "-E", "-s", str(SCENES / "serve.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
        )  # fmt: skip
        weakref.finalize(self, end, self.process)
        self._answer("at its start")

    def render(self, facts: dict[str, Any]) -> NDArray[np.float32]:
        """Returns the frames (T, H, W, 4): linear light multiplied by coverage, and coverage."""
        what = f"at {facts['kind']} of seed {facts['seed']}"
        with tempfile.TemporaryDirectory(prefix="acetate-render-") as name:
            request = {"facts": facts, "folder": name, "threads": self.threads}
            assert self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                self._gone(what)
            answer = self._answer(what)
            files = [Path(name) / f"{frame:05d}.exr" for frame in range(facts["frames"])]
            if "error" in answer or not all(file.exists() for file in files):
                self._failed(what, Path(name), answer.get("error", "no picture was written"))
            return np.stack([pixels(file) for file in files])

    def _answer(self, what: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._gone(what)

    def _gone(self, what: str) -> Any:
        code = self.process.wait()
        self.said.seek(0)
        last = " ".join(self.said.read().strip().splitlines()[-TAIL:])
        killed = " (by the kernel, if memory ran out: use fewer workers)" if code == -9 else ""
        raise BlenderError(f"Blender ended {what} with exit code {code}{killed}: {last}")

    def _failed(self, what: str, folder: Path, error: str) -> None:
        free = shutil.disk_usage(folder).free / 2**20
        if free < 16:
            raise OSError(
                f"{folder.parent} has {free:.0f} MiB left, too few for a clip's frames. Make room, "
                "or name another place with TMPDIR=FOLDER, and run the same command again, which "
                "keeps what is finished."
            )
        raise BlenderError(f"Blender failed {what}: {error.strip().splitlines()[-1]}")


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()


def pixels(file: Path) -> NDArray[np.float32]:
    """Reads the picture in a file, (H, W, 4)."""
    with OpenEXR.File(str(file)) as picture:
        return np.array(picture.channels()["RGBA"].pixels, np.float32)
