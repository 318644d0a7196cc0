"""Finds the files of a tar, and reads them."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

Span = tuple[int, int]  # offset and size in a tar


def find_members(file: BinaryIO, size: int) -> Iterator[tuple[str, Span]]:
    """Yields name and place of each file that lies whole within a tar's `size` bytes. Raises
    tarfile.TarError where its headers break."""
    at = -1
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.size < 0 or member.offset <= at:
                raise tarfile.ReadError("a header that points back")
            at = member.offset
            if member.offset_data + member.size <= size:
                yield member.name, (member.offset_data, member.size)


def read_at(file: BinaryIO, span: Span, most: int) -> bytes:
    """Reads the bytes of a span. Raises ValueError for more than `most` bytes."""
    offset, size = span
    if size > most:
        raise ValueError(f"{size} bytes; at most {most} belong there")
    file.seek(offset)
    return file.read(size)
