import json
import os

import pytest
import torch
from safetensors.torch import save_file

from acetate.formats.exported import MARK, check_replaceable, write_export


def text(content):
    return lambda path: path.write_text(content)


def test_an_export_is_replaced_by_the_next(tmp_path):
    out = tmp_path / "out"
    sizes = write_export(out, {"a.txt": text("abc"), "sub/b.txt": text("d")}, {"step": 1})
    assert sizes == {"a.txt": 3, "sub/b.txt": 1}
    assert json.loads((out / MARK).read_text()) == {"step": 1, "files": sizes}
    assert os.access(out / "sub", os.X_OK)
    write_export(out, {"c.txt": text("e")}, {"step": 2})
    assert sorted(os.listdir(out)) == ["c.txt", MARK]
    assert os.listdir(tmp_path) == ["out"]


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds what no export wrote \(mine\.txt\)"):
        write_export(tmp_path, {"a.txt": text("a")}, {})
    out = tmp_path / "out"
    out.mkdir()
    write_export(out, {"a.txt": text("a")}, {})
    (out / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"\(notes\.txt\); only an earlier export is replaced"
    ):
        check_replaceable(out)
    with pytest.raises(FileExistsError, match=r"mine\.txt holds what no export wrote"):
        check_replaceable(tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mark", ["{", "[]", "{}", '{"files": ["a.txt"]}', "null", "\ud800"])
def test_a_mark_of_others_replaces_nothing(tmp_path, mark):
    (tmp_path / MARK).write_bytes(mark.encode("utf-8", "surrogatepass"))
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds what no export wrote \(a\.txt\)"):
        check_replaceable(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileExistsError, match="holds what no export wrote"):
        check_replaceable(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_a_full_disk_leaves_the_earlier_export(tmp_path, small_disk, kind):
    out, big = tmp_path / "out", {"w": torch.zeros(10**6)}
    write_export(out, {"a.txt": text("before")}, {})
    writer = (
        (lambda path: save_file(big, path))
        if kind == "safetensors"
        else (lambda path: torch.save(big, path))
    )
    with pytest.raises(OSError, match=r"out could not be written .* MiB are free there.*untouched"):
        write_export(out, {"a.txt": text("after"), "w": writer}, {})
    assert (out / "a.txt").read_text() == "before"
    assert os.listdir(tmp_path) == ["out"]
