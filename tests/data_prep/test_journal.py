import pytest

from data_prep.journal import open_journal, read_journal, write_lines


def test_lines_come_back_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert read_journal(path) == []
    for line in ({"key": "a", "text": "ä\n"}, {"key": "b"}):
        with open_journal(path) as append:
            append(line)
    assert read_journal(path) == [{"key": "a", "text": "ä\n"}, {"key": "b"}]


def test_a_line_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "a"}\n{"key": ')
    assert read_journal(path) == [{"key": "a"}]
    with open_journal(path) as append:
        append({"key": "b"})
    assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n'


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\nno json\n{}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is not JSON"):
        read_journal(tmp_path / "a.jsonl")


def test_whole_files(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"b": 2}])
    assert read_journal(tmp_path / "a.jsonl") == [{"a": 1}, {"b": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
