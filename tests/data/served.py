"""Shards behind a web server of this machine, with the faults that a test wants."""

import gzip
import shutil
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pytest

from acetate.data.shards import BadClip, index_shards, read_clip
from acetate.data.store import Remote
from acetate.data.writer import ShardWriter, encode_clip

TARS, PER_TAR = 4, 3


KEYS = [f"clip{i:02d}" for i in range(TARS * PER_TAR)]


SETTINGS = {
    "frames": 5, "height": 16, "width": 16, "batch_size": 5, "seed": 0, "num_workers": 0,
    "val_batch_size": 2,
    "val_clips": 2, "bad_clip_budget": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    with ShardWriter(out, max_clips=PER_TAR, max_bytes=10**9, made_by={}) as writer:
        for i, key in enumerate(KEYS):
            pixels = np.random.default_rng(i).integers(0, 256, (5, 16, 16, 4), dtype=np.uint8)
            writer.add(key, encode_clip(pixels, 16), split="val" if i % PER_TAR == 2 else "train",
                prompt=key,
                       source="", licence="", lossy=False, premultiplied_source=False)  # fmt: skip
    return out


class Handler(BaseHTTPRequestHandler):
    """Serves `source`, a folder or the URL of another server, with the faults that wait for a
    file's name."""

    def __init__(self, *args, source, faults, asked):
        self.source, self.faults, self.asked = source, faults, asked
        super().__init__(*args)

    def do_GET(self):
        name = unquote(urlsplit(self.path).path).rsplit("/")[-1]
        if self.command == "GET":
            self.asked.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        status, headers, body = (500, {}, b"broken") if fault == "500" else self.found()
        if fault == "late":
            time.sleep(0.8)
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        if fault == "bomb":
            self.send_header("Content-Encoding", "gzip")
            body = gzip.compress(b" " * 10**7)
        if fault != "endless":
            self.send_header("Content-Length", headers.get("Content-Length") or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "endless":
            with suppress(OSError):
                while True:
                    self.wfile.write(body * 1000)
        if fault == "slow":  # all of it, over longer than the tests' timeout
            for i in range(16):
                self.wfile.write(body[i * len(body) // 16 : (i + 1) * len(body) // 16])
                time.sleep(0.2)
            return
        with suppress(OSError):  # nobody waits for it any more
            self.wfile.write(
                body[: len(body) // 2] if fault and fault not in ("late", "bomb") else body
            )
        if fault == "stall":
            self.wfile.flush()
            time.sleep(4)
        if isinstance(fault, threading.Event):  # the other half comes after it
            self.wfile.flush()
            fault.wait(60)
            with suppress(OSError):  # nobody waits for it any more
                self.wfile.write(body[len(body) // 2 :])
        self.close_connection = bool(fault)

    do_HEAD = do_GET

    def found(self):
        if isinstance(self.source, Path):
            path = self.source / self.path.lstrip("/")
            return (200, {}, path.read_bytes()) if path.exists() else (404, {}, b"")
        request = urllib.request.Request(
            self.source + self.path, method=self.command, headers=dict(self.headers)
        )
        try:
            with urllib.request.urlopen(request) as answer:
                kept = {
                    k: v
                    for k, v in answer.headers.items()
                    if k.lower() not in ("content-length", "connection")
                }
                return answer.status, kept, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, {}, error.read()

    def log_message(self, *_):
        return


class Server:
    def __init__(self, source):
        self.source, self.faults, self.asked = source, {}, []

    @contextmanager
    def run(self):
        handler = partial(Handler, source=self.source, faults=self.faults, asked=self.asked)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        yield self
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "served")
    with Server(tmp_path / "served").run() as running:
        yield running


def quick(tmp_path, **settings):
    """Tries again at once. That nothing comes for a while is a fault where a test says so alone: a
    busy machine lets a process wait for seconds."""
    return Remote(**({"cache_dir": tmp_path / "cache", "retries": 2, "backoff": 0.01} | settings))


def tar_bytes(shards):
    return max(path.stat().st_size for path in shards.glob("*.tar"))


def read_all(folder):
    """key -> frames, or the reason why there are none."""
    results = {}
    for ref in index_shards([folder]):
        try:
            results[ref.key] = read_clip(ref).frames
        except BadClip as bad:
            results[ref.key] = bad.reason
    return results


def reported(results):
    return {key: reason for key, reason in results.items() if isinstance(reason, str)}


def damaged(name, value):
    """What makes another manifest of one: a field of its first tar, or one of its own."""

    def damage(manifest):
        place = (
            manifest["shards"][0] if name in manifest["shards"][0] and name != "clips" else manifest
        )
        if value is None:
            del place[name]
        else:
            place[name] = value

    return damage


@contextmanager
def s3():
    """Address and storage options of a server of its own."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    moto.start()
    address = "http://{}:{}".format(*moto.get_host_and_port())
    # So small a block that pieces of each tar would be fetched at once
    yield (
        address,
        {
            "key": "k",
            "secret": "s",
            "default_block_size": 1024,
            "config_kwargs": {"retries": {"max_attempts": 1}},
        },
    )
    moto.stop()


@contextmanager
def gs():
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server").create_server(
        "127.0.0.1", 0, in_memory=True
    )
    emulator.start()
    yield f"http://127.0.0.1:{emulator._api._httpd.server_port}", {"token": "anon", "project": "p"}
    emulator.stop()


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, shards):
    """URL of clips of which one tar is damaged and one is missing, options to read it, and the
    server in front of it that makes mistakes."""
    with (
        {"s3": s3, "gs": gs}[request.param]() as (address, options),
        Server(address).run() as faulty,
    ):
        files = fsspec.filesystem(request.param, endpoint_url=address, **options)
        files.mkdir("bucket")
        for path in shards.iterdir():
            files.pipe(f"bucket/clips/{path.name}", path.read_bytes())
        files.pipe(
            "bucket/clips/clips-000002.tar", (shards / "clips-000002.tar").read_bytes()[:-512]
        )
        files.rm("bucket/clips/clips-000003.tar")
        yield f"{request.param}://bucket/clips", options | {"endpoint_url": faulty.url}, faulty
