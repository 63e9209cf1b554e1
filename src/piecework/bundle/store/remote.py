"""Where bundles lie for other machines: the interface of a remote.

A remote keeps a bundle's files by their digests and its head, manifest and signatures, under its key. The head is
written last: a bundle whose files are not all there yet is not there. What a remote says is believed of nothing; it is
compared with the manifest by `piecework.bundle.store.travel`. The double for tests is fsspec's `memory://`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final, Self

from piecework.bundle.manifest import FileEntry, Manifest
from piecework.bundle.signatures import Head
from piecework.errors import InternalError, PieceworkError, StoreError

MAX_HEAD_BYTES: Final = 4 << 20
"""Of a manifest in a remote, of which a start may read many: a hundred times what a model of 80 layers has."""


class Remote(ABC):
    """A place with bundles; a context manager that closes its connections.

    All methods raise StoreError where it can't be reached, and may run in several threads.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  most have none of their own
        """Close the connections."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, for people."""

    @property
    def holds_one(self) -> bool:
        """Whether the address is that of a single bundle, which the next one replaces."""
        return False

    @abstractmethod
    def keys(self, asked: str | None = None) -> tuple[str, ...]:
        """Return the keys of its bundles, sorted; of what was asked for only, where that is given."""

    @abstractmethod
    def head(self, key: str) -> Head | None:
        """Return the manifest and the signatures of a bundle, neither checked, or None where there is none."""

    @abstractmethod
    def chunks(self, entry: FileEntry) -> Generator[bytes, None, None]:
        """Yield the content of a file of some bundle, neither checked nor cut off where it should end."""

    @abstractmethod
    def put_file(self, path: Path, entry: FileEntry) -> None:
        """Upload a file with this digest and size, unless it is there."""

    @abstractmethod
    def put_head(self, key: str, head: Head, manifest: Manifest) -> None:
        """Publish a bundle whose files are there."""


@contextlib.contextmanager
def remote_errors(asked: str) -> Iterator[None]:
    """Turn whatever a client of a remote raises inside the block into a StoreError."""
    try:
        yield
    except (PieceworkError, InternalError):
        raise
    except ImportError as error:
        raise StoreError(
            asked=asked,
            found=f"a package for such addresses can't be imported: {error}",
            try_="pip install 'piecework[remote]'; for gs:// gcsfs as well",
        ) from error
    except Exception as error:
        said = str(error).strip().splitlines()
        raise StoreError(
            asked=asked,
            found=f"{type(error).__name__}: {said[0] if said else 'no more is known'}",
            try_="check the address, the network and the credentials",
        ) from error
