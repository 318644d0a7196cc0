"""A web server of this machine, with the faults that a test wants."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


@dataclass
class Server:
    """asked: path, with its query, and headers of every request so far."""

    url: str
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@contextmanager
def serving(
    folder: Path, answer: Callable[[str, dict[str, str]], Answer | None] | None = None
) -> Iterator[Server]:
    """The files of a folder. answer(path, headers): what is said instead, None for the file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = dict(self.headers)
            server.asked.append((self.path, headers))
            said = answer(self.path, headers) if answer else None
            status, fields, body = said or found(folder / urlsplit(self.path).path[1:])
            self.send_response(status)
            for header in {**fields, "Content-Length": str(len(body))}.items():
                self.send_header(*header)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """The tests print no requests."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def found(path: Path) -> Answer:
    return (200, {}, path.read_bytes()) if path.is_file() else (404, {}, b"")
