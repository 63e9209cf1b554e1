"""A stand-in for Python: it notes how it was called, then prints what that process would, or fails as told."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_stub(place: Path, answers: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write the program into a new directory, and return it; `answers` are figures by command, cell or script.

    It writes its calls into `place/calls`, and fails where `place/<name>.fail` exists.
    """
    place.mkdir()
    (place / "tmp").mkdir()
    python = place / "python"
    python.write_text(
        f"""#!{sys.executable} -S
import json, os, sys
from pathlib import Path
place = Path({str(place)!r})
words = sys.argv[1:]
with open(place / "calls", "a") as file:
    print(*(word.replace(chr(10), ' ') for word in words), file=file)
name = Path(words[0]).name if words[0] != "-m" else words[2] if words[1] == "piecework" else words[1].rpartition(".")[2]
if (place / (name + ".fail")).exists():
    sys.exit("told to fail")
if words[0] == "-c":
    print("0.0.1" if "metadata" in words[1] else "{{}}")
else:
    print(json.dumps({dict(answers)!r}[name]))
"""
    )
    python.chmod(0o755)
    return python
