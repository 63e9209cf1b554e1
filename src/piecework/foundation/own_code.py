"""Our own code, as one digest: what compiles a model, so that a bundle that other code made is known."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[1]
_PARTS: Final = ("bundle", "capture", "compiler", "foundation", "models", "ops", "providers", "spec")
_SUFFIXES: Final = (".py", ".h", ".cpp", ".cu")


@functools.cache
def own_code_digest() -> str:
    """Return the digest of all files that a bundle's content may depend on; 300 files take 4 ms.

    Raises OSError where one can't be read.
    """
    found = hashlib.sha256()
    for part in _PARTS:
        for directory, folders, files in os.walk(f"{_ROOT}/{part}"):
            folders.sort()
            inside = directory[len(str(_ROOT)) :]
            for name in sorted(files):
                if name.endswith(_SUFFIXES):
                    with open(f"{directory}/{name}", "rb", buffering=0) as file:
                        data = file.read()
                    found.update(f"{inside}/{name}\n{len(data)}\n".encode())
                    found.update(data)
    return found.hexdigest()
