"""A registry in a thread: as much of the distribution protocol as bundles need, and lies where a test wants them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from piecework.foundation.digests import digest_bytes

Lie = Callable[[str, bytes], bytes | None]


class Registry(ThreadingHTTPServer):
    """What it holds by path below /v2/.

    `lie` makes another answer of a path's content, None for one that breaks off; `password` is what must follow
    "Authorization: Basic", if it isn't empty.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lie: Lie = lambda _path, data: data
        self.delay_s = 0.0
        self.password = ""

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that go away."""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def parse_request(self) -> bool:
        """Refuse whoever has no password, before anything else."""
        if not super().parse_request():
            return False
        wanted = self.server.password
        if not wanted or self.headers["Authorization"] == f"Basic {wanted}":
            return True
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="a registry"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        path = self._begin()
        if path.endswith("/tags/list"):
            name = path.removeprefix("/v2/").removesuffix("/tags/list")
            tags = [key.rpartition(":")[2] for key in self.server.manifests if key.startswith(f"{name}:")]
            return self._answer(200 if tags else 404, json.dumps({"name": name, "tags": tags}).encode(), path=path)
        return self._answer(*self._found(path), path=path)

    def do_HEAD(self) -> None:
        status, _ = self._found(self._begin())
        self._answer(status, b"", path="")

    def do_POST(self) -> None:
        self._begin()
        self.send_response(202)
        self.send_header("Location", "/upload")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_PUT(self) -> None:
        path = self._begin()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/upload":
            digest = parse_qs(urlsplit(self.path).query)["digest"][0]
            right = digest == f"sha256:{digest_bytes(data)}"
            if right:
                self.server.blobs[digest] = data
            return self._answer(201 if right else 400, b"", path="")
        name, _, tag = path.removeprefix("/v2/").partition("/manifests/")
        self.server.manifests[f"{name}:{tag}"] = data
        return self._answer(201, b"", path="")

    def _begin(self) -> str:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        time.sleep(self.server.delay_s)
        return path

    def _found(self, path: str) -> tuple[int, bytes]:
        if found := re.fullmatch(r"/v2/(.+)/blobs/(.+)", path):
            data = self.server.blobs.get(found[2])
        elif found := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path):
            data = self.server.manifests.get(f"{found[1]}:{found[2]}")
        else:
            data = None
        return (404, b"") if data is None else (200, data)

    def _answer(self, status: int, data: bytes, *, path: str) -> None:
        told = self.server.lie(path, data) if status == 200 else data
        self.send_response(status)
        self.send_header("Content-Length", str(len(data if told is None else told)))
        self.end_headers()
        if told is None:  # it breaks off
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(told)


@contextmanager
def running() -> Iterator[Registry]:
    """Run a registry until the block is left."""
    with Registry() as registry:
        thread = threading.Thread(target=registry.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield registry
        finally:
            registry.shutdown()
            thread.join()
