"""Writing over earlier results, and where the system refuses."""

import errno
import resource

import pytest

from acetate import replacing, video_out
from acetate.video_io import describe
from acetate.video_out import FORMATS, SUFFIXES, write_clip
from tests.test_video_out import film, noise


def contents(folder):
    return {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_a_new_result_replaces_the_old_one(tmp_path, name):
    write_clip(tmp_path / "a", *film(4), 24, [name])
    write_clip(tmp_path / "a", *film(2, hidden=(0.0, 0.0, 0.0)), 24, [name])
    write_clip(tmp_path / "other" / "a", *film(2, hidden=(0.0, 0.0, 0.0)), 24, [name])
    replaced = {path: data for path, data in contents(tmp_path).items() if path.parts[0] != "other"}
    assert replaced.keys() == contents(tmp_path / "other").keys()  # no frame of the longer clip
    assert all(describe(path).frames == 2 for path in tmp_path.iterdir() if path.name != "other")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_disk_full(tmp_path, monkeypatch, name, old):
    if old:
        write_clip(tmp_path / "a", *film(3), 24, [name])
    before = contents(tmp_path)
    write = video_out.WRITERS[name]

    def full(paths, clip):
        write(paths, clip)  # so that there is something to leave behind
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(video_out.WRITERS, name, full)
    with pytest.raises(
        OSError, match=r"No space left on device\); [\d.]+ MB are free in .*Free some space"
    ) as error:
        write_clip(tmp_path / "a", *film(), 24, [name])
    assert error.value.errno == errno.ENOSPC and str(tmp_path / f"a{SUFFIXES[name][0]}") in str(
        error.value
    )
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == (
        len(SUFFIXES[name]) if old else 0
    )


@pytest.mark.parametrize("name", ["webm", "prores", "pair", "apng", "webp", "preview"])
def test_the_system_refuses_more_bytes(tmp_path, name):
    """The real thing for files: encoders and muxers report it, and late (at the flush)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        with pytest.raises(OSError, match="not written") as error:
            write_clip(tmp_path / "a", *noise(3, 96, 96), 24, [name])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_earlier_formats_stay(tmp_path, monkeypatch):
    def full(paths, clip):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(video_out.WRITERS, "webm", full)
    with pytest.raises(OSError, match=r"a\.webm: not written"):
        write_clip(tmp_path / "a", *film(1), 24, ["apng", "webm", "png"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.apng"]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"file/a\.webm: not written.*name a folder that can be written"
    ):
        write_clip(tmp_path / "file" / "a", *film(1), 24, ["webm"])


def test_old_folder_comes_back(tmp_path, monkeypatch):
    write_clip(tmp_path / "a", *film(3), 24, ["png"])
    before, replace = contents(tmp_path), replacing.os.replace

    def stubborn(source, target):
        if source.name.startswith(".tmp-"):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(replacing.os, "replace", stubborn)
    with pytest.raises(PermissionError, match=r"a_png: not written \(Permission denied\)"):
        write_clip(tmp_path / "a", *film(1), 24, ["png"])
    assert contents(tmp_path) == before


def test_leftovers_of_a_killed_run(tmp_path):
    (tmp_path / ".tmp-a_png").mkdir()
    (tmp_path / ".tmp-a_png" / "0007.png").write_bytes(b"half")
    (tmp_path / ".tmp-a.webm").write_bytes(b"half")
    (png, webm) = write_clip(tmp_path / "a", *film(2), 24, ["png", "webm"])
    assert describe(png).frames == describe(webm).frames == 2
    assert sorted(tmp_path.iterdir()) == sorted((png, webm))
