"""A remote in an OCI registry: `oci://host/name`, one tag per bundle, or `oci://host/name:tag` for one of them.

A bundle is an artifact: its manifest.json is the config, and each file is a layer under the digest that it has in the
manifest anyway. Annotations say what it is, also by the names that KServe's kernel cache gives what it keeps.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final, cast, final
from urllib.parse import urljoin

from piecework.bundle.format import MANIFEST, SIGNATURES
from piecework.bundle.manifest import FileEntry, Manifest, corrupt, parse_manifest
from piecework.bundle.signatures import MAX_SIGNATURES_BYTES, Head
from piecework.bundle.store.interface import ASKED, bundle_key, is_key, is_of
from piecework.bundle.store.remote import MAX_HEAD_BYTES, Remote, remote_errors
from piecework.errors import CorruptBundle, StoreError
from piecework.foundation.digests import digest_bytes, is_digest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.piecework.bundle.v1"
CONFIG_TYPE: Final = "application/vnd.piecework.bundle.manifest.v1+json"
FILE_TYPE: Final = "application/vnd.piecework.bundle.file.v1"
_TITLE: Final = "org.opencontainers.image.title"
_ADDRESS: Final = re.compile(
    r"(?P<scheme>oci|oci\+http)://(?P<host>[A-Za-z0-9.\-]+|\[[0-9a-fA-F:]+\])(?P<port>:\d+)?"
    r"/(?P<name>[a-z0-9]+([._\-/]+[a-z0-9]+)*)(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}))?"
)
_LOCAL: Final = ("localhost", "127.0.0.1", "[::1]")
_MAX_ANSWER_BYTES: Final = 4 << 20
_MAX_PAGES: Final = 100
_CHUNK: Final = 1 << 20
_PATIENCE_S: Final = (5.0, 60.0)
"""Seconds to wait for a connection, and for its next bytes."""


@final
class OciRemote(Remote):
    """See the module. Credentials are those of `docker login`.

    Args:
        url: `oci://host/name`, with a tag for a single bundle. Plain HTTP is spoken with this machine, and with
            another one where the address starts with `oci+http://`.

    Raises StoreError where that is no such address, or the package oras is missing.
    """

    def __init__(self, url: str) -> None:
        address = _ADDRESS.fullmatch(url.rstrip("/"))
        if address is None:
            raise StoreError(asked=f"use the remote {url}", found="no such address", try_="oci://HOST/NAME or :TAG")
        self._url = url
        self._tag: str | None = address["tag"]
        host = address["host"] + (address["port"] or "")
        plain = address["scheme"] == "oci+http" or address["host"] in _LOCAL
        self._api = f"{'http' if plain else 'https'}://{host}/v2/{address['name']}"
        with remote_errors(f"use the remote {url}"):
            from oras.container import Container  # noqa: PLC0415  only those who have such a remote need it
            from oras.provider import Registry  # noqa: PLC0415

            self._container = Container("name")
            self._container.registry, self._container.namespace = host, None
            self._container.repository = address["name"]
            self._registry = Registry(hostname=host, insecure=plain)
            # its own way waits up to two minutes for what can't be reached, and for ever for what doesn't answer
            self._registry.do_request = functools.partial(Registry.do_request.__wrapped__, self._registry)
            self._registry.session.request = functools.partial(self._registry.session.request, timeout=_PATIENCE_S)
            auth = self._registry.auth
            auth.load_configs(self._container)
            auth.authenticate_request = functools.partial(_answer_challenge, auth, auth.authenticate_request)

    @property
    def url(self) -> str:
        """See `Remote.url`."""
        return self._url

    @property
    def holds_one(self) -> bool:
        """See `Remote.holds_one`."""
        return self._tag is not None

    def keys(self, asked: str | None = None) -> tuple[str, ...]:
        """See `Remote.keys`."""
        if self._tag is not None:
            head = self.head("")
            found = [] if head is None else [_key_of(head, bundle=self._url)]
        else:
            found = [tag for tag in self._tags() if is_key(tag)]
        return tuple(sorted(key for key in found if asked is None or is_of(key, asked)))

    def head(self, key: str) -> Head | None:
        """See `Remote.head`."""
        with remote_errors(f"read the bundle {key} of {self._url}"):
            path, headers = f"manifests/{self._tag or key}", {"Accept": OCI_MANIFEST}
            with self._ask("GET", path, headers=headers, stream=True) as response:
                if response.status_code == 404:
                    return None
                data = _content(response, most=_MAX_ANSWER_BYTES)
            manifest, signatures = _parse(data, bundle=f"{key} of {self._url}")
            return Head(
                self._blob(manifest, most=MAX_HEAD_BYTES),
                None if signatures is None else self._blob(signatures, most=MAX_SIGNATURES_BYTES),
            )

    def chunks(self, entry: FileEntry) -> Generator[bytes, None, None]:
        """See `Remote.chunks`."""
        path = f"blobs/sha256:{entry.sha256}"
        with remote_errors(f"read a file of {self._url}"), self._ask("GET", path, stream=True) as response:
            _require_success(response)
            yield from response.iter_content(_CHUNK)

    def put_file(self, path: Path, entry: FileEntry) -> None:
        """See `Remote.put_file`."""
        with remote_errors(f"write to {self._url}"):
            layer = {"digest": f"sha256:{entry.sha256}", "size": entry.size}
            _require_success(self._registry.upload_blob(str(path), self._container, layer))

    def put_head(self, key: str, head: Head, manifest: Manifest) -> None:
        """See `Remote.put_head`."""
        parts = {MANIFEST: head.manifest}
        if head.signatures is not None:
            parts[SIGNATURES] = head.signatures
        with tempfile.TemporaryDirectory(prefix="piecework-") as directory:
            for name, data in parts.items():
                (Path(directory) / name).write_bytes(data)
                self.put_file(Path(directory) / name, _entry(data))
        files = dict(manifest.files)
        if head.signatures is not None:
            files[SIGNATURES] = _entry(head.signatures)
        content = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": _descriptor(CONFIG_TYPE, _entry(head.manifest)),
            "layers": [_descriptor(FILE_TYPE, entry, title=name) for name, entry in files.items()],
            "annotations": describing(manifest, key=key),
        }
        with remote_errors(f"write the bundle {key} to {self._url}"):
            data, headers = json.dumps(content).encode(), {"Content-Type": OCI_MANIFEST}
            _require_success(self._ask("PUT", f"manifests/{self._tag or key}", data=data, headers=headers))

    def close(self) -> None:
        """See `Remote.close`."""
        self._registry.session.close()

    def _tags(self) -> list[str]:
        tags: list[str] = []
        url: str | None = f"{self._api}/tags/list"
        with remote_errors(f"list the bundles of {self._url}"):
            for _ in range(_MAX_PAGES):
                if url is None:
                    break
                with self._registry.do_request(url, "GET", stream=True) as response:
                    if response.status_code == 404:
                        break
                    answer = json.loads(_content(response, most=_MAX_ANSWER_BYTES))
                tags += [str(tag) for tag in answer.get("tags") or ()]
                following = response.links.get("next", {}).get("url")
                url = urljoin(url, following) if following else None
                if url is not None and not url.startswith(f"{self._api}/"):
                    raise ValueError("the list goes on at another address")
        return tags

    def _blob(self, entry: FileEntry, *, most: int) -> bytes:
        with self._ask("GET", f"blobs/sha256:{entry.sha256}", stream=True) as response:
            return _content(response, most=most)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        return self._registry.do_request(f"{self._api}/{path}", method, **options)


def describing(manifest: Manifest, *, key: str) -> dict[str, str]:
    """Return what an artifact says of itself, for people and for tools that choose among artifacts.

    `io.kserve.km/…` are the labels of KServe's kernel caches (mcv, cacheplan.go): who made it, what kind it is, and
    what tells it from others.
    """
    facts = {f"{fact.kind}.{fact.name}": fact.value for fact in manifest.facts if fact.kind in ("target", "torch")}
    said = {name: value for name, value in manifest.identity.items() if isinstance(value, str | int | float)}
    return {
        _TITLE: f"piecework bundle of {manifest.identity.get('architecture', 'a module')}",
        "org.opencontainers.image.version": manifest.piecework,
        "io.kserve.km/framework": "piecework",
        "io.kserve.km/cache-type": "piecework-bundle",
        "io.kserve.km/cache-hash": key,
        "dev.piecework.key": key,
        "dev.piecework.digest": manifest.digest,
        **{f"dev.piecework.{name}": str(value) for name, value in {**facts, **said}.items()},
    }


def _answer_challenge(auth: Any, by_token: Any, answer: Any, headers: Any, *, refresh: bool = False) -> Any:
    """Answer a registry that wants name and password itself, as one with htpasswd does; oras asks others for a token.

    Returns the headers to ask again with, and whether there is something new in them.
    """
    if not answer.headers.get("Www-Authenticate", "").lower().startswith("basic"):
        return by_token(answer, headers, refresh=refresh)
    secret = getattr(auth, "_basic_auth", None)
    return ({**(headers or {}), "Authorization": f"Basic {secret}"}, True) if secret else (headers, False)


def _key_of(head: Head, *, bundle: str) -> str:
    manifest = parse_manifest(head.manifest, bundle=bundle)
    return bundle_key(str(manifest.identity.get(ASKED, "")), manifest.facts)


def _entry(data: bytes) -> FileEntry:
    return FileEntry(digest_bytes(data), len(data))


def _descriptor(kind: str, entry: FileEntry, *, title: str | None = None) -> dict[str, object]:
    made: dict[str, object] = {"mediaType": kind, "digest": f"sha256:{entry.sha256}", "size": entry.size}
    return made if title is None else {**made, "annotations": {_TITLE: title}}


def _parse(data: bytes, *, bundle: str) -> tuple[FileEntry, FileEntry | None]:
    """Return where an artifact's manifest.json and signatures.json are. Raises CorruptBundle."""
    try:
        value = json.loads(data)
        layers = {layer["annotations"][_TITLE]: layer for layer in value["layers"] if layer.get("annotations")}
        signatures = layers.get(SIGNATURES)
        if value["config"]["mediaType"] != CONFIG_TYPE:
            raise _no_bundle(bundle)
        return _located(value["config"]), None if signatures is None else _located(signatures)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_bundle(bundle) from error


def _located(descriptor: Mapping[str, object]) -> FileEntry:
    algorithm, _, digest = str(descriptor["digest"]).partition(":")
    if algorithm != "sha256" or not is_digest(digest):
        raise ValueError("another digest than SHA-256")
    return FileEntry(digest, int(cast("int", descriptor["size"])))


def _no_bundle(bundle: str) -> CorruptBundle:
    return corrupt(MANIFEST, bundle=bundle, found="is not there: the registry has something else under this tag")


def _content(response: Any, *, most: int) -> bytes:
    """Return a good answer's content, of which no more than a little over `most` bytes are read."""
    _require_success(response)
    data = bytearray()
    for chunk in response.iter_content(_CHUNK):
        data += chunk
        if len(data) > most:
            raise ValueError(f"an answer of more than {most} bytes")
    return bytes(data)


def _require_success(response: Any) -> None:
    if response.status_code not in (200, 201, 202):
        raise ValueError(f"the registry answers {response.status_code} {response.reason}")
