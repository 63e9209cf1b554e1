"""A Hugging Face Hub of one repository on this machine, as far as huggingface_hub asks it to fetch a snapshot."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the first").hexdigest()


@dataclass
class LocalHub:
    """What it has, and what it was asked for.

    Attributes:
        files: of the repository "owner/tiny", by path; its revisions are "main", "old" and COMMIT.
        downloads: the paths of files that were fetched, in order.
        requests: how many requests there were.
        refusal: an error of the Hub's ("GatedRepo") for whoever asks for a file.
    """

    files: dict[str, bytes]
    downloads: list[str] = field(default_factory=list)
    requests: int = 0
    refusal: str = ""
    endpoint: str = ""


@contextmanager
def local_hub(directory: Path) -> Iterator[LocalHub]:
    """Serve a model directory as "owner/tiny", and as "tiny", while the block runs."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    hub = LocalHub(files)

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            hub.requests += 1
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith(("tiny/", "api/models/tiny/")):  # as "gpt2" is one of the first, without an owner
                path = path.replace("tiny/", "owner/tiny/", 1)
            match path.split("/", 4):
                case ["api", "models", "owner", "tiny", rest] if rest.startswith("revision/"):
                    known = rest.removeprefix("revision/") in ("main", "old", COMMIT)
                    self.json({"id": "owner/tiny", "sha": COMMIT}) if known else self.error("RevisionNotFound")
                case ["api", "models", "owner", "tiny", _]:
                    self.json([{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in files.items()])
                case ["owner", "tiny", "resolve", _, name] if name in files:
                    self.file(name)
                case _:
                    self.error("RepoNotFound")

        do_HEAD = do_GET

        def file(self, name: str) -> None:
            if hub.refusal:
                return self.error(hub.refusal)
            if self.command == "GET":
                hub.downloads.append(name)
            self.answer(files[name], headers={"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": COMMIT})

        def json(self, value: object) -> None:
            self.answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

        def error(self, code: str) -> None:
            status = 403 if code == "GatedRepo" else 404
            self.answer(b"", headers={"X-Error-Code": code, "X-Error-Message": code}, status=status)

        def answer(self, body: bytes, *, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    def etag(data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
