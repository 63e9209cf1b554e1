"""A remote at any address that fsspec knows: `s3://`, `gs://`, `file://`, `memory://` …

files/<sha256>                    the files of all bundles, each once
bundles/<key>/signatures.json
bundles/<key>/manifest.json       written last
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final, final

from piecework.bundle.format import MANIFEST, SIGNATURES
from piecework.bundle.manifest import FileEntry, Manifest
from piecework.bundle.signatures import MAX_SIGNATURES_BYTES, Head
from piecework.bundle.store.interface import is_key, is_of
from piecework.bundle.store.remote import MAX_HEAD_BYTES, Remote, remote_errors

_CHUNK: Final = 64 << 20
_LOCAL: Final = ("file", "local")
_S3_PATIENCE: Final = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2}}
"""Else a start without a network waits for minutes."""


@final
class FsspecRemote(Remote):
    """See the module. Credentials and endpoints are taken from where the file system's package takes them.

    Args:
        url: such as `s3://bucket/path`.

    Raises StoreError where the address isn't known or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with remote_errors(f"use the remote {url}"):
            import fsspec.core  # noqa: PLC0415  only those who have a remote need it

            protocol = url.partition("://")[0]
            options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
            if protocol in ("s3", "s3a"):
                options["config_kwargs"] = _S3_PATIENCE
            self._fs, self._root = fsspec.core.url_to_fs(self._url, **options)
        self._is_local = protocol in _LOCAL

    @property
    def url(self) -> str:
        """See `Remote.url`."""
        return self._url

    def keys(self, asked: str | None = None) -> tuple[str, ...]:
        """See `Remote.keys`."""
        with remote_errors(f"list the bundles of {self._url}"):
            try:
                names = self._fs.ls(f"{self._root}/bundles", detail=False)
            except FileNotFoundError:
                return ()
            found = [str(name).rstrip("/").rpartition("/")[2] for name in names]
        return tuple(sorted(key for key in found if is_key(key) and (asked is None or is_of(key, asked))))

    def head(self, key: str) -> Head | None:
        """See `Remote.head`."""
        with remote_errors(f"read the bundle {key} of {self._url}"):
            manifest = self._read(self._of(key, MANIFEST), most=MAX_HEAD_BYTES)
            if manifest is None:
                return None
            return Head(manifest, self._read(self._of(key, SIGNATURES), most=MAX_SIGNATURES_BYTES))

    def chunks(self, entry: FileEntry) -> Generator[bytes, None, None]:
        """See `Remote.chunks`."""
        path = f"{self._root}/files/{entry.sha256}"
        with remote_errors(f"read a file of {self._url}"):
            for start in range(0, entry.size, _CHUNK):
                # one byte more than there should be, to see whether there is
                end = start + _CHUNK if start + _CHUNK < entry.size else entry.size + 1
                yield self._fs.cat_file(path, start=start, end=end)

    def put_file(self, path: Path, entry: FileEntry) -> None:
        """See `Remote.put_file`."""
        place = f"{self._root}/files/{entry.sha256}"
        with remote_errors(f"write to {self._url}"):
            try:
                if self._fs.info(place)["size"] == entry.size:
                    return
            except FileNotFoundError:
                pass
            if self._is_local:
                self._replace(place, path.read_bytes())
            else:
                self._fs.put_file(str(path), place)

    def put_head(self, key: str, head: Head, manifest: Manifest) -> None:
        """See `Remote.put_head`."""
        del manifest
        with remote_errors(f"write the bundle {key} to {self._url}"):
            if head.signatures is not None:
                self._replace(self._of(key, SIGNATURES), head.signatures)
            else:
                with contextlib.suppress(FileNotFoundError):  # of another build
                    self._fs.rm_file(self._of(key, SIGNATURES))
            self._replace(self._of(key, MANIFEST), head.manifest)

    def _of(self, key: str, name: str) -> str:
        return f"{self._root}/bundles/{key}/{name}"

    def _read(self, path: str, *, most: int) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(path, start=0, end=most + 1)
        except FileNotFoundError:
            return None
        return data

    def _replace(self, place: str, data: bytes) -> None:
        """Write a file that others see whole or not at all, as they do in object stores."""
        if not self._is_local:
            self._fs.pipe_file(place, data)
            return
        unfinished = f"{place}.{os.urandom(8).hex()}"
        self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(unfinished, data)
        self._fs.mv(unfinished, place)
