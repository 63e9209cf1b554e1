"""Run an eager artifact: call a program's operators one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from piecework.ops.ir.decode import decode
from piecework.ops.ir.program import Program, constant_name
from piecework.ops.ir.resolve import resolve_target
from piecework.providers.discovery import load_operators


class EagerRunner:
    """An instance of an eager artifact, with the interface of torch's AOTInductor runners."""

    def __init__(self, program: Program) -> None:
        self._program = program
        load_operators(c.target for c in program.calls)
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]] = [
            (resolve_target(c.target), c.args, c.kwargs) for c in program.calls
        ]
        self._constants: list[torch.Tensor] = []

    def bind(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Bind constants by name ("w0" …)."""
        self._constants = [constants[constant_name(i)] for i in range(len(self._program.constants))]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the program on tensors; returns its outputs with the strides it declares, without autograd."""
        results: list[Any] = []
        tables: Mapping[str, Sequence[Any]] = {"n": results, "i": inputs, "c": self._constants}

        def reference(kind: str, index: int) -> Any:
            return tables[kind][index]

        with torch.no_grad():
            for function, args, kwargs in self._calls:
                results.append(
                    function(
                        *(decode(a, reference) for a in args), **{k: decode(v, reference) for k, v in kwargs.items()}
                    )
                )
        return [decode(o, reference) for o in self._program.outputs]


def read_program(path: Path) -> Program:
    """Read an eager artifact."""
    return Program.from_json(json.loads(path.read_bytes()))
