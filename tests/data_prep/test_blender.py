import os
import sys

import pytest

from data_prep import blender
from data_prep.blender import Blender, BlenderError, installed, interpreter


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_that_is_not_there(tmp_path):
    with pytest.raises(BlenderError, match=r"blender=.*none cannot be started: No such file"):
        interpreter(str(tmp_path / "none"))


def test_an_interpreter_without_bpy():
    with pytest.raises(BlenderError, match=r"does not import bpy.*No module named 'bpy'.*3\.11"):
        interpreter(sys.executable)


def test_a_library_of_the_system_that_is_missing(tmp_path):
    said = "ImportError: libXi.so.6: cannot open shared object file: No such file or directory"
    python = program(tmp_path / "python", f"echo '{said}' >&2; exit 1")
    with pytest.raises(BlenderError, match=r"apt-get install .*libxi6"):
        interpreter(python)


def test_an_environment_is_made_once_and_anew_after_a_failure(tmp_path, monkeypatch, capfd):
    folder, tools = tmp_path / "cache" / "bpy", tmp_path / "tools"
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    program(tools / "uv", "echo 'no such distribution' >&2; exit 2")
    with pytest.raises(
        BlenderError, match=r"could not be installed.*no such distribution.*blender="
    ):
        installed(folder)
    log = tmp_path / "calls"
    program(tools / "uv", f'echo "$@" >> {log}; mkdir -p {folder}')
    assert installed(folder) == installed(folder) == str(folder / "bin" / "python")
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["venv", "pip"]
    assert "350 MB to download" in capfd.readouterr().err


def test_no_uv_and_a_python_that_bpy_has_no_wheel_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(blender, "PYTHON", "3.99")
    with pytest.raises(BlenderError, match=r"needs Python 3\.99.*pip install uv.*blender="):
        installed(tmp_path / "bpy")


def test_a_process_that_ends_is_named_with_its_last_words(tmp_path):
    python = program(tmp_path / "python", "echo 'no display' >&2; exit 3")
    with pytest.raises(BlenderError, match="ended at its start with exit code 3: no display"):
        Blender(python, 1)
