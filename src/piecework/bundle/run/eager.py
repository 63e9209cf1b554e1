"""Run an eager artifact: call a program's operators one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from piecework.bundle.sizes import size_expression
from piecework.errors import CorruptBundle
from piecework.foundation.torch_private import TORCHS_NAMESPACES, find_overload, is_computation
from piecework.ops.ir.decode import decode
from piecework.ops.ir.interface import UNKNOWN, Interface
from piecework.ops.ir.program import Dim, Program, TensorSpec, constant_name
from piecework.ops.ir.resolve import FUNCTIONS, resolve_target

_TORCHS: Final = frozenset({"aten", "prims", "mkldnn", "quantized_decomposed"})
_WRONG: Final = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""What torch's operators raise of arguments that they don't take, and of values too."""


class EagerRunner:
    """An instance of an eager artifact, with the interface of torch's AOTInductor runners.

    Args:
        program: what it runs; its providers are imported.
        interface: what it says that it takes and gives.
    """

    def __init__(self, program: Program, interface: Interface | None = None) -> None:
        self._program = program
        self._interface = interface
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]] = [
            (resolve_target(c.target), c.args, c.kwargs) for c in program.calls
        ]
        self._constants: list[torch.Tensor] = []

    def bind(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Bind constants by name ("w0" …)."""
        self._constants = [constants[constant_name(i)] for i in range(len(self._program.constants))]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the program on tensors; returns its outputs with the strides it declares, without autograd.

        Raises CorruptBundle where an operator can't be called so, whatever the values are, or the results are others
        than the artifact says.
        """
        results: list[Any] = []
        tables: Mapping[str, Sequence[Any]] = {"n": results, "i": inputs, "c": self._constants}

        def reference(kind: str, index: int) -> Any:
            return tables[kind][index]

        with torch.no_grad():
            for number, (function, args, kwargs) in enumerate(self._calls):
                given = [decode(a, reference) for a in args]
                named = {k: decode(v, reference) for k, v in kwargs.items()}
                try:
                    results.append(function(*given, **named))
                except _WRONG as error:
                    if _fails_for_all_values(function, given, named):
                        raise _lie(f"its call {number}, of {self._program.calls[number].target}: {error}") from error
                    raise
        outputs = [decode(o, reference) for o in self._program.outputs]
        if self._interface is not None:
            _check_results(self._interface, inputs, outputs)
        return outputs


def check_program(program: Program, interface: Interface) -> None:
    """Raise ValueError where a program isn't what its artifact says, or calls what no piece does."""
    same = (program.fingerprint(), program.inputs, program.constants)
    if same != (interface.program, interface.inputs, interface.constants):
        raise ValueError("its program is another one than it says")
    declared = {name: (low, high) for name, low, high in program.symbols}
    if list(declared) != [name for name, _, _ in interface.symbols]:
        raise ValueError("its program has other sizes than it says")
    if any(interface.packs) or len(interface.results) != len(program.outputs):
        raise ValueError("it says that it gives or takes something else")
    for call in program.calls:
        _check_target(call.target)


def _check_target(target: str) -> None:
    """Raise ValueError for an operator that can't be part of a piece, as far as that is known before it is imported."""
    if target in FUNCTIONS:
        return
    namespace, _, rest = target.partition(".")
    if namespace not in TORCHS_NAMESPACES:
        return
    if namespace not in _TORCHS or find_overload(f"{namespace}::{rest}") is None or not is_computation(rest):
        raise ValueError(f"it calls {target}, which no piece does"[:200])


def _fails_for_all_values(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call fails on tensors without values as well."""

    def stand_in(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, list):
            return [stand_in(item) for item in value]
        return torch.device("meta") if isinstance(value, torch.device) else value

    try:
        function(*map(stand_in, args), **{name: stand_in(value) for name, value in kwargs.items()})
    except NotImplementedError:
        return False
    except _WRONG:
        return True
    return False


def _check_results(interface: Interface, inputs: Sequence[torch.Tensor], outputs: Sequence[Any]) -> None:
    sizes: dict[str, int] = {}
    for spec, tensor in zip(interface.inputs, inputs, strict=True):
        sizes.update((d, size) for d, size in zip(spec.shape, tensor.shape, strict=True) if isinstance(d, str))
    for number, (spec, output) in enumerate(zip(interface.results, outputs, strict=True)):
        if not isinstance(output, torch.Tensor) or not _agrees(spec, output, sizes):
            raise _lie(f"its result {number} is another one than it says")


def _agrees(spec: TensorSpec, tensor: torch.Tensor, sizes: Mapping[str, int]) -> bool:
    if str(tensor.dtype) != f"torch.{spec.dtype}" or tensor.dim() != len(spec.shape):
        return False
    return all(_is(dim, size, sizes) for dim, size in zip(spec.shape, tensor.shape, strict=True))


def _is(dim: Dim, size: int, sizes: Mapping[str, int]) -> bool:
    try:
        return dim == UNKNOWN or size_expression(str(dim))(sizes) == size
    except (KeyError, ZeroDivisionError):
        return True  # a size that no input has by itself


def _lie(found: str) -> CorruptBundle:
    return CorruptBundle(
        asked="run a piece of a bundle",
        found=f"the artifact is not what it says: {found}"[:400],
        try_="get the bundle from where it was compiled, or compile the model again",
        file="artifacts",
    )
