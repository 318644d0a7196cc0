"""Fetches in one stream through fsspec's file systems, over HTTP such that tokens stay with their
origin, and ends a download before its time."""

import threading
from collections.abc import Awaitable, Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import fsspec

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, ClientSession
    from yarl import URL

# What a request may take along to another origin; tokens may stand in any other header
PLAIN = {"accept", "accept-encoding", "connection", "host", "range", "user-agent"}


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


@cache
def client_for(origin: "URL") -> Callable[..., Awaitable["ClientSession"]]:
    """Returns the `get_client` of fsspec's file system for one scheme, host and port. Where a
    redirect leads to another one, headers, logins and cookies are left out."""

    from aiohttp import ClientSession

    async def keep(request: "ClientRequest", handler: "ClientHandlerType") -> "ClientResponse":
        if request.url.origin() != origin:
            for name in {*request.headers}:
                if name.lower() not in PLAIN:
                    request.headers.popall(name)
        return await handler(request)

    async def client(**settings: Any) -> ClientSession:
        return ClientSession(**settings, middlewares=(keep,))

    return client


def in_one_stream(url: str, timeout: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns storage options, and arguments of get_file, that make fsspec write a file from its
    start to its end, so that its size tells how far it is; over HTTP also such that headers stay
    with the URL's origin.

    Left alone, s3fs and gcsfs fetch pieces at once into a file that has its whole length from the
    start, and aiohttp ends whatever takes longer than five minutes.
    """
    protocol = url.split("://")[0]
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout
        from yarl import URL

        # Later than _download's own, which says more
        limits = ClientTimeout(total=None, sock_connect=2 * timeout, sock_read=2 * timeout)
        return {"timeout": limits, "get_client": client_for(URL(url).origin())}, {}
    if protocol == "s3":
        return {"max_concurrency": 1}, {}
    return {}, {"concurrency": 1} if protocol == "gs" else {}
