"""Notes at the end of a library's file, where neither the linker nor the loader looks; read without torch.

A note is its text, the text's length in 8 bytes, and the mark that says what it is. The last one is at the very end,
each other one before it. Whoever doesn't know a mark doesn't see what is before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

CALLS: Final = b"piecework calls\n"
"""Which operators of Python the library calls (foundation/torch_private/artifacts.py)."""

KERNELS: Final = b"piecework count\n"
"""Which kernels the library consists of (foundation/torch_private/scheduled_kernels.py)."""

INTERFACE: Final = b"piecework needs\n"
"""What the library takes and gives (ops/ir/interface.py), or which kernel it is (providers/libraries.py)."""

_MARKS: Final = (CALLS, KERNELS, INTERFACE)
_TAIL: Final = 8 + len(CALLS)


def append_note(library: Path, text: str, *, mark: bytes) -> None:
    """Put a note behind what the file has. Raises OSError."""
    data = text.encode()
    with library.open("ab") as file:
        file.write(data + len(data).to_bytes(8, "little") + mark)


def read_note(library: Path, *, mark: bytes) -> str:
    """Return the last note with a mark, or "" where there is none. Raises OSError, UnicodeDecodeError."""
    with library.open("rb") as file:
        end = file.seek(0, 2)
        while end >= _TAIL:
            file.seek(end - _TAIL)
            tail = file.read(_TAIL)
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] not in _MARKS or length > end - _TAIL:
                return ""
            end -= _TAIL + length
            if tail[8:] == mark:
                file.seek(end)
                return file.read(length).decode()
    return ""
