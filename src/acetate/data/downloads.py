"""Ends a download before its time."""

import threading

import fsspec


class FetchError(OSError):
    """A file did not come, or not as promised, in all of its tries."""


class MoreThanSaid(FetchError):
    """A file has more bytes than were expected; it may come right in another try."""


class TooLarge(FetchError):
    """A file has more bytes than are read of such a file."""


class Bounded(fsspec.Callback):
    """Ends a download, which calls it, at its `most` bytes, or when nobody waits for it."""

    def __init__(self, most: float, given_up: threading.Event) -> None:
        super().__init__()
        self.most, self.given_up = most, given_up

    def relative_update(self, inc: int = 1) -> None:
        self.absolute_update(self.value + inc)

    def absolute_update(self, value: int) -> None:
        self.value = value
        if value > self.most:
            raise MoreThanSaid(f"more than the {self.most} bytes come that the manifest says")
        if self.given_up.is_set():
            raise FetchError("nobody waits for it any more")
