import pytest

from data_prep.tables import read_tables, read_text
from data_prep.tree import walk


def tables(source, *names):
    for name in names:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    read = read_tables(walk(source))
    return {
        str(path.relative_to(source)): row.get("prompt") for path, row in read.rows.items()
    }, read.notes


def test_what_rows_may_call_a_file(tmp_path):
    rows = {
        "./dot.png": "dot.png", "/footage/abs.png": "abs.png", r"sub\back.png": "sub/back.png",
        "Case.PNG": "case.png", "e\u0301.png": "\u00e9.png", "C:\\x\\sub\\win.png": "sub/win.png",
        f"{tmp_path}/whole.png": "whole.png", f"{tmp_path.name}/from.png": "from.png",
    }  # fmt: skip
    lines = [f"{name},{number}" for number, name in enumerate(rows)]
    (tmp_path / "t.csv").write_text("\n".join(["File,Prompt", *lines]))
    found, notes = tables(tmp_path, *rows.values(), "back.png", "other/dot.png")
    assert found == {name: str(number) for number, name in enumerate(rows.values())}
    assert "t.csv, row 2: /footage/abs.png is taken for abs.png, by the end of its path" in notes
    assert len(notes) == 5  # those that are not the very name


def test_columns_may_be_spelled_colour(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "t.csv").write_text("file,Colour Rect,colour\na.mp4,0 0 8 8,black\n")
    (row,) = read_tables(walk(tmp_path)).rows.values()
    assert row == {"file": "a.mp4", "color_rect": "0 0 8 8", "color": "black"}


def test_every_row_that_means_nothing_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("file,prompt\na.png,1\nb.png,2\n,3\n/x/c.png,4\na.png,5\n")
    (tmp_path / "u.csv").write_text("picture,prompt\na.png,1\n")
    found, notes = tables(tmp_path, "a.png", "1/c.png", "2/c.png")
    assert found == {"a.png": "5"}
    assert notes == [
        "t.csv, row 2: b.png names no file",
        "t.csv, row 3: names no file",
        "t.csv, row 4: /x/c.png could be 2 files, 1/c.png first",
        "t.csv, row 5: a.png has a row already; this one counts",
        "u.csv: no row of it names a file; the column for that is one of file, path, name, "
        "filename, file_name, video_fgr, video_pha",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_of_encodings(tmp_path, encoding):
    (tmp_path / "t.csv").write_text("file;prompt\na.png;ö\n", encoding=encoding)
    (tmp_path / "._t.csv").write_bytes(b"\0\5\x16\7\xff")
    assert tables(tmp_path, "a.png") == ({"a.png": "ö"}, [])
    assert read_text(tmp_path / "t.csv").startswith("file")


def test_tables_of_folders_below(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/t.jsonl").write_text('{"file_name": "a.png", "prompt": "x"}\n')
    (tmp_path / "set/metrics.csv").write_text("step,loss\n1,0.5\n")
    assert tables(tmp_path, "set/a.png", "a.png") == ({"set/a.png": "x"}, [])


def test_a_table_below_that_is_not_used_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/latin.csv").write_bytes("file,prompt\na.png,caf\u00e9\n".encode("latin-1"))
    (tmp_path / "set/headless.csv").write_text("a.png,a red disc\nb.png,a blue one\n")
    found, notes = tables(tmp_path, "set/a.png", "set/b.png")
    assert not found and len(notes) == 2
    assert notes[0].startswith("set/headless.csv: no row of it names a file; the column for that")
    assert notes[1].startswith("set/latin.csv: no row of it counts: ") and "utf-8" in notes[1]


def test_a_bare_name_means_nothing_in_another_folder(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/t.csv").write_text("file,prompt\n/footage/a.png,1\n/x/other/b.png,2\n")
    found, notes = tables(tmp_path, "other/a.png", "other/b.png")
    assert found == {"other/b.png": "2"}
    assert notes[0] == "set/t.csv, row 1: /footage/a.png names no file"
