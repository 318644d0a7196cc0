"""Every command of README.md and docs/, as written, in a fresh copy of the clone after a short
`make demo`.

A block that is marked `sh` runs on a CPU, line by line, shortened only by settings that are
appended. Other marks say what a block needs: `sh gpu`, `sh cluster`, `sh cloud`, `sh model`,
`sh blender`, `sh hours`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from acetate.data.synthetic import KINDS, render
from tests.paths import ROOT
from tests.processes import program

PAGES = sorted(
    ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
    key=lambda page: (page == "docs/figures.md", page),  # last, as it trains the base anew
)
NEEDS = {"gpu", "cluster", "cloud", "model", "blender", "hours"}
# Files of a user's own; numbered stills of one folder would be one source
THINGS = ("hair", "vase", "smoke", "torch", "dust", "shade", "star", "wig")
# What makes each program short, by its name
SHORTER = {
    "train": ["data.num_workers=0", "data.val_clips=1", "data.batch_size=2"],
    "evaluate": ["data.num_workers=0", "data.val_clips=1"],
    "sample": ["steps=2"],
    "follow": ["count=3", "steps=2"],
    "estimate": ["wan=tiny"],  # test_estimate has those of Wan2.1
    "synthesize": ["clips=12", "frames=9", "size=48", "workers=0"],
}


def blocks(page: str) -> Iterator[tuple[str, list[str]]]:
    """The mark of each block of commands, and its lines without comments, continued ones joined."""
    for mark, body in re.findall(r"^```(.*?)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        lines = [
            re.sub(r"(^|\s+)#(?!SBATCH).*", "", line)
            for line in body.replace("\\\n", " ").splitlines()
        ]
        yield mark, [body] if mark == "python" else [line.strip() for line in lines if line.strip()]


def program_of(line: str) -> str:
    """`train`, `shard`, ..., or the first word of a line that is no command of ours."""
    words = shlex.split(line)
    for place, word in enumerate(words):
        if word == "train.py":
            return "train"
        if word.endswith("acetate") and place + 1 < len(words):
            return words[place + 2] if words[place + 1] == "prep" else words[place + 1]
    return words[0]


def shortened(line: str, resumed: int = 0) -> str:
    """With settings appended. resumed: how many lines have gone on with a run; each ends a step
    later."""
    more = [] if of_clips(line) else list(SHORTER.get(program_of(line), []))
    if program_of(line) == "train":
        more += [f"trainer.max_steps={2 + resumed}", f"trainer.val_check_interval={2 + resumed}"]
        more += ["callbacks.samples.solver.steps=2"] if "dit_dora" in line else []
    return " ".join([line, *more])


def of_clips(line: str) -> bool:
    """Whether it measures finished clips, not a run."""
    words = shlex.split(line)
    place = words.index("evaluate") if "evaluate" in words else len(words)
    return any("=" not in word for word in words[place + 1 :])


def of_ours(line: str) -> tuple[str, list[str]] | None:
    """The program and its arguments where the line starts one of ours and a shell would take every
    word to the letter."""
    words = shlex.split(line)
    if re.search(r"[$*?~|&;<>`]", line):
        return None
    if words[0] in ("acetate", ".venv/bin/acetate"):
        return "acetate", words[1:]
    return ("train.py", words[2:]) if words[:2] == ["python", "train.py"] else None


class Clone:
    """A copy of what the repository holds, with an environment to enter as the README says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith("tests/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(sys.prefix)

    def run(self, line: str) -> None:
        """AssertionError with what it printed where the line fails. Our own programs begin in a
        process that has imported the packages they need."""
        if started := of_ours(line):
            log = self.folder.with_name("log")
            log.unlink(missing_ok=True)
            name, arguments = started
            code, said = program(
                log, name, *arguments, environment={"WANDB_MODE": "offline"}, folder=self.folder
            )
            assert code == 0, f"$ {line}\n{said[-5000:]}"
            return
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in ("ACETATE_ROOT", "PYTHONPATH")
        }
        env |= {
            "PYTHONPATH": f"{self.folder}/src:{self.folder}",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }
        done = subprocess.run(
            ["bash", "-c", f". .venv/bin/activate && {line}"],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """After the lines of `make demo`, shortened, and with clips of a user's own in FOLDER."""
    clone = Clone(tmp_path_factory.mktemp("fresh") / "acetate")
    recipe = subprocess.run(
        ["make", "-n", "demo"], cwd=clone.folder, capture_output=True, text=True, check=True
    )
    lines = [
        line
        for line in recipe.stdout.replace("\\\n", " ").splitlines()
        if line.startswith(".venv/bin/acetate")
    ]
    assert len(lines) >= 6
    clone.run('test "$(acetate --version)" = "$(.venv/bin/acetate --version)"')
    for line in lines:
        clone.run(shortened(line))
    (clone.folder / "FOLDER").mkdir()
    for number in range(len(THINGS)):
        clip = render(KINDS[number % len(KINDS)], number, 1, 64, 64)
        rgba = torch.cat([(clip.rgb[:, 0] + 1) / 2, clip.alpha[:, 0]]).mul(255).round().byte()
        Image.fromarray(rgba.permute(1, 2, 0).numpy()).save(
            clone.folder / f"FOLDER/{THINGS[number]}.png"
        )
    return clone


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_needs(page):
    for mark, lines in blocks(page):
        language, *needs = mark.split()
        assert language in ("sh", "text", "python"), f"{page}: ```{mark}\n{lines[:1]}"
        assert len(needs) < 2
        assert NEEDS.issuperset(needs), f"{page}: ```{mark}"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.xdist_group("documentation")
@pytest.mark.parametrize(
    "page",
    [
        page if page == "README.md" else pytest.param(page, marks=pytest.mark.pages)
        for page in PAGES
    ],
)
def test_commands_run_as_written(page, clone):
    resumed = 0
    for line in [line for mark, lines in blocks(page) if mark == "sh" for line in lines]:
        # the demo's own lines have run; the others are these tests, and hours
        if line.startswith("make "):
            continue
        resumed += re.search(r" resume=(?!auto)", line) is not None
        clone.run(shortened(line, resumed if " resume=" in line else 0))
    for code in [text for mark, texts in blocks(page) if mark == "python" for text in texts]:
        (clone.folder / "page.py").write_text(code)
        clone.run("python page.py")
