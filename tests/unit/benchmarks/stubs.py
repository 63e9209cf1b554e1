"""A stand-in for Python: it notes how it was called, then prints what that process would, or fails as told."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stub:
    """The program, and the directory where it notes its calls."""

    python: Path
    place: Path

    def calls(self) -> list[list[str]]:
        """Return the words of each call, those left out that only ask Python for something."""
        found = [line.split() for line in (self.place / "calls").read_text().splitlines()]
        return [words for words in found if words[0] != "-c"]

    def names(self) -> list[str]:
        """Return the command, cell or script of each call."""
        return [name_of(words) for words in self.calls()]

    def fail(self, name: str) -> None:
        """Let a command, cell or script fail from now on."""
        (self.place / f"{name}.fail").touch()


def name_of(words: list[str]) -> str:
    """Return what a call runs."""
    if words[0] != "-m":
        return Path(words[0]).name
    return words[2] if words[1] == "piecework" else words[1].rpartition(".")[2]


def value_of(words: list[str], option: str) -> str:
    """Return the word after an option."""
    return words[words.index(option) + 1]


def write_stub(place: Path, answers: Mapping[str, Any]) -> Stub:
    """Write the program into a new directory; `answers` are figures by command, cell or script."""
    place.mkdir()
    (place / "tmp").mkdir()
    python = place / "python"
    python.write_text(
        f"""#!{sys.executable} -S
import json, os, sys
from pathlib import Path
place = Path({str(place)!r})
words = [word for word in sys.argv[1:] if word != "-P"]
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
    return Stub(python, place)
