import os
import signal
import subprocess
import sys

import pytest

from data_prep.journal import lock_of, only_writer, open_journal, read_journal, write_lines
from tests.paths import ROOT


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


def test_one_writer_at_a_time(tmp_path):
    with only_writer(tmp_path / "out"):
        with (
            pytest.raises(RuntimeError, match="out is being written by another process"),
            only_writer(tmp_path / "out"),
        ):
            pass
        with only_writer(tmp_path / "out", rank=1), only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "out"):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_mode_of_the_lock(tmp_path, umask):
    before = os.umask(umask)
    try:
        with only_writer(tmp_path / "out"):
            assert lock_of(tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)


def test_a_writer_that_was_killed_is_none(tmp_path):
    code = (
        "from pathlib import Path; from data_prep.journal import only_writer\nwith "
        f"only_writer(Path({str(tmp_path / 'out')!r})): print('held', flush=True); input()"
    )
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **streams) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match="being written"), only_writer(tmp_path / "out"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with only_writer(tmp_path / "out"):
        pass
