"""What an artifact takes and gives, as it says itself: a plan that uses it otherwise is seen before it is opened.

An artifact of the eager backend has its interface beside the program, a library has it in a note at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from piecework.foundation.digests import is_digest
from piecework.foundation.reading import fields, items, text
from piecework.ops.ir.program import TensorSpec, read_symbols

UNKNOWN: Final = "?"
"""A result's size or stride that can't be written as an expression (bundle/sizes.py)."""


@dataclass(frozen=True)
class Interface:
    """What an artifact takes and gives.

    Attributes:
        program: the fingerprint of the program that it was made of.
        symbols: its dynamic sizes, each with the least and greatest value that it was compiled for.
        inputs: tensors that differ from call to call; sizes are expressions over the symbols.
        constants: tensors that are bound, as they are before they are packed.
        packs: how each constant is packed, "" where it isn't.
        results: tensors that a call gives; a size or stride may be `UNKNOWN`.
    """

    program: str
    symbols: tuple[tuple[str, int, int], ...]
    inputs: tuple[TensorSpec, ...]
    constants: tuple[TensorSpec, ...]
    packs: tuple[str, ...]
    results: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the interface as JSON."""
        return {
            "program": self.program,
            "symbols": [list(symbol) for symbol in self.symbols],
            "inputs": [spec.to_json() for spec in self.inputs],
            "constants": [spec.to_json() for spec in self.constants],
            "packs": list(self.packs),
            "results": [spec.to_json() for spec in self.results],
        }

    @staticmethod
    def from_json(given: object) -> Interface:
        """Read what `to_json` wrote. Raises ValueError where it is something else."""
        names = ("program", "symbols", "inputs", "constants", "packs", "results")
        data = fields(given, "an interface", required=names)
        if not is_digest(text(data["program"], "a program's fingerprint")):
            raise ValueError("a program's fingerprint that is no digest")
        inputs, constants, results = (
            tuple(TensorSpec.from_json(spec) for spec in items(data[name], name))
            for name in ("inputs", "constants", "results")
        )
        packs = items(data["packs"], "packs", length=len(constants))
        return Interface(
            program=data["program"],
            symbols=read_symbols(data["symbols"]),
            inputs=inputs,
            constants=constants,
            packs=tuple(text(how, "a packing", empty=True) for how in packs),
            results=results,
        )
