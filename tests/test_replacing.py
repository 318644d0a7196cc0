"""Processes that are killed at each rename."""

import signal
import subprocess
import sys

import pytest

from acetate.replacing import rename_over, standing

KILLED = """
import os, signal, sys
from pathlib import Path
from acetate.replacing import rename_over
left = int(sys.argv[3])
def hook(event, arguments):
    global left
    if event == "os.rename":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
rename_over(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def make(path, text, folder):
    if folder:
        path.mkdir()
    (path / "part" if folder else path).write_text(text)


def text_of(path):
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_whole_one_stands_at_any_rename(tmp_path, before, after):
    """Of files and folders over files and folders; what was interrupted can be done again."""
    path, temporary = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.tmp"
    make(path, "old", before)
    make(temporary, "new", after)
    for renames in range(3):
        command = [sys.executable, "-c", KILLED, str(temporary), str(path), str(renames)]
        if subprocess.run(command).returncode != -signal.SIGKILL:
            break
        assert text_of(standing(path)) == "old"
    assert renames == (1 if not before and not after else 2)
    assert standing(path) == path
    assert text_of(path) == "new"


def test_the_old_one_comes_back_if_the_new_one_cannot_be_renamed(tmp_path):
    make(tmp_path / "last.ckpt", "old", folder=True)
    with pytest.raises(FileNotFoundError):
        rename_over(tmp_path / "gone", tmp_path / "last.ckpt")
    assert text_of(tmp_path / "last.ckpt") == "old"


def test_nothing_stands_where_nothing_was(tmp_path):
    assert standing(tmp_path / "last.ckpt") == tmp_path / "last.ckpt"
