"""The IR ops that opaque ops call inside: collect what is declared, dedupe it, and lower each as a piece of its own.

The bodies become artifacts like those of other pieces, one per form of call, over all of its sizes. What a provider's
own function serves is called, and not compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from piecework.bundle.plan import NativeCall, ShapeRange, UniquePiece
from piecework.bundle.sizes import size_expression
from piecework.capture.capture import CapturedGraph
from piecework.capture.sources import ran_files
from piecework.compiler.deduplicate import Forward
from piecework.compiler.encode import encode_torch_type
from piecework.compiler.passes.lower import CallSite, Lowering
from piecework.compiler.rewrite.fakes import Sizes, declare
from piecework.compiler.split import OpaqueCall
from piecework.errors import InternalError, OpError
from piecework.foundation.torch_private import SymbolicSession, find_overload, size_oblivious
from piecework.ops.ir.call_form import CallForm, Size, TensorForm
from piecework.ops.ir.declared_calls import DeclaredCall, DynamicSizes, declared
from piecework.ops.ir.op import IrOp, ir_op
from piecework.ops.ir.opaque_op import OpaqueOp, declared_op
from piecework.ops.ir.operator import num_results
from piecework.ops.ir.program import Call, Program, TensorSpec, encode_float

_MOST_LEVELS: Final = 16


@dataclass(frozen=True)
class NativePiece:
    """A body as what `compile_artifacts` compiles: an artifact for all sizes, of a program without constants."""

    program: Program
    primary: str | None = None
    pack: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Native:
    """What serves the calls of one form.

    Attributes:
        form: the calls.
        ops: the opaque ops that declare them.
        sites: which providers were chosen, for the op first and then for those that its body calls.
        program: the call as it stands, of one IR op.
        piece: what is compiled; None where the provider's function is called.
    """

    form: CallForm
    ops: tuple[str, ...]
    sites: tuple[CallSite, ...]
    program: Program
    piece: NativePiece | None

    @property
    def provider(self) -> str:
        """The provider that serves the calls."""
        return self.sites[0].provider

    def planned(self, ranges: Sequence[ShapeRange]) -> NativeCall:
        """Return what the plan has of it; `ranges` are the compiled form, where there is one."""
        piece = None
        if self.piece is not None:
            piece = UniquePiece(
                fingerprint=self.program.fingerprint(),
                program=self.piece.program.fingerprint(),
                ranges=tuple(ranges),
                num_ops=len(self.piece.program.calls),
                num_constants=0,
                device=self.program.inputs[0].device,
            )
        return NativeCall(self.form, self.ops, self.provider, piece)

    def to_json(self) -> dict[str, Any]:
        """Return it for people, as part of a bundle's explanation."""
        return {
            "call": self.form.text(),
            "ops": list(self.ops),
            "compiled": self.piece is not None,
            "sites": [site.to_json() for site in self.sites],
        }


def collect_natives(paths: Sequence[Forward], *, lowering: Lowering, sources: set[Path]) -> tuple[Native, ...]:
    """Return the bodies for the calls that the opaque ops of some forwards declare, each different one once.

    Args:
        paths: the forwards.
        lowering: chooses the providers, and writes their bodies out.
        sources: is given the files whose code ran.

    Raises OpError for a declaration that is wrong, and where no provider that is asked for supports a call.
    """
    users: dict[CallForm, dict[str, None]] = {}
    seen: set[str] = set()
    with ran_files(sources):
        for path in paths:
            for step in path.steps:
                if not isinstance(step, OpaqueCall):
                    continue
                op = declared_op(step.node.target)
                if op is None or op.declaration is None:
                    continue
                call = _Described(path.captured, step.node.args, step.node.kwargs)
                if (key := f"{op.name} {call.key}") not in seen:
                    seen.add(key)
                    for form in _forms(op, call):
                        users.setdefault(form, {})[op.name] = None
        return tuple(native(form, ops=tuple(ops), lowering=lowering) for form, ops in users.items())


def native(form: CallForm, *, ops: Sequence[str], lowering: Lowering) -> Native:
    """Lower the call of an IR op, and then what its body calls. Raises OpError where no provider supports it."""
    op = _op(form)
    program = program_of(form, op)
    lowered = lowering.lower(program)
    sites = lowered.sites
    chosen = op.implementation(sites[0].provider)
    assert chosen is not None
    if not chosen.inlined:
        return Native(form, tuple(ops), sites, program, None)
    for _ in range(_MOST_LEVELS):
        lowered = lowering.lower(lowered.program)
        if not lowered.sites:
            return Native(form, tuple(ops), sites, program, NativePiece(lowered.program))
        sites += lowered.sites
    raise OpError(
        asked=f"compile the body of {op.name}",
        found=f"operators that call each other more than {_MOST_LEVELS} deep",
        try_="an operator whose native function doesn't call itself",
    )


def program_of(form: CallForm, op: IrOp) -> Program:
    """Return the program that makes one call."""
    tensors = [a for a in form.arguments if isinstance(a, TensorForm)]
    numbers = iter(range(len(tensors)))
    given = [{"i": next(numbers)} if isinstance(a, TensorForm) else a for a in form.arguments]
    parameters = op.signature.parameters.values()
    args = [a for a, p in zip(given, parameters, strict=True) if p.kind is p.POSITIONAL_OR_KEYWORD]
    kwargs = {p.name: a for a, p in zip(given, parameters, strict=True) if p.kind is p.KEYWORD_ONLY}
    calls = [Call(f"{op.name.replace('::', '.')}.default", tuple(args), kwargs)]
    count = num_results(op.signature)
    if count > 1:
        calls += [Call("operator.getitem", ({"n": 0}, i), {}) for i in range(count)]
    outputs = tuple({"n": i} for i in range(1, count + 1)) if count > 1 else ({"n": 0},)
    return Program(form.sizes, tuple(tensor.spec() for tensor in tensors), (), tuple(calls), outputs)


def constant(value: Any) -> Any:
    """Return an argument that is no tensor as forms have it, or None where they can't: lists and dynamic numbers."""
    if isinstance(value, float):
        return encode_float(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return encode_torch_type(value)


class _Described:
    """The arguments of an opaque op's call, over the declared sizes: t0, t1 …"""

    def __init__(self, captured: CapturedGraph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        declared_sizes = captured.request.traced_sizes
        numbers = {name: f"t{number}" for number, name in enumerate(declared_sizes)}
        self._names = {old: numbers[name] for old, name in captured.size_names.items() if name in numbers}
        self.symbols = tuple((numbers[name], dim.min, dim.max) for name, dim in declared_sizes.items())
        request = captured.request
        self._examples = {id(stand_in): request.examples.get(n, stand_in) for n, stand_in in request.objects.items()}
        self._args = [self._described(a) for a in args]
        self._kwargs = {name: self._described(value) for name, value in kwargs.items()}
        self.key = repr((self._args, self._kwargs))

    def made(self, sizes: Sizes) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments as stand-ins."""

        def made(value: Any) -> Any:
            if isinstance(value, TensorSpec):
                return sizes.tensor(value)
            if isinstance(value, _Size):
                return sizes.size(value.text)
            return [made(item) for item in value] if isinstance(value, list) else value

        return [made(a) for a in self._args], {name: made(value) for name, value in self._kwargs.items()}

    def _described(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._described(item) for item in value]
        if not isinstance(value, torch.fx.Node):
            return self._examples.get(id(value), value)
        found = value.meta.get("val")
        if isinstance(found, torch.Tensor):
            return TensorSpec(
                shape=tuple(self._size(d) for d in found.shape),
                stride=tuple(self._size(d) for d in found.stride()),
                dtype=str(found.dtype).removeprefix("torch."),
                device=found.device.type,
            )
        return _Size(self._size(found)) if isinstance(found, (int, torch.SymInt)) else found

    def _size(self, size: Any) -> Size:
        if isinstance(size, int):
            return size
        return re.sub(r"\b[su]\d+\b", lambda m: self._names.get(m.group(0), m.group(0)), str(size.node.expr))


@dataclass(frozen=True)
class _Size:
    """A size that an opaque op takes as a number."""

    text: Size


def _forms(op: OpaqueOp, call: _Described) -> Iterator[CallForm]:
    """Yield the forms of the calls that an opaque op declares for some arguments."""
    asked = f"compile the calls that {op.name} declares"
    session = SymbolicSession()
    sizes = declare(call.symbols, session=session)
    ranges = {name: (low, high) for name, low, high in call.symbols}

    def make(name: str, low: int, high: int) -> Any:
        ranges[name] = low, high
        return session.size(name, low=low, high=high, hint=max(low, min(high, 32)))

    made = DynamicSizes(make, upper=lambda size: _bounds(sizes.text(size), ranges, asked=asked)[1], asked=asked)
    assert op.declaration is not None
    with torch.no_grad(), session.fake_mode, size_oblivious():
        args, kwargs = call.made(sizes)
        try:
            calls = list(declared(op.declaration, made, args, kwargs, asked=asked))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise OpError(
                asked=asked, found=f"{type(error).__name__}: {error}", try_="look at shapes and dtypes only"
            ) from error
        for one in calls:
            _check(one, asked=asked)
    for one in calls:
        yield _form(one, text=sizes.text, ranges=ranges, asked=asked)


def _check(call: DeclaredCall, *, asked: str) -> None:
    """Raise OpError where an op can't be called so."""
    try:
        call.op.native(*call.args, **call.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise OpError(
            asked=asked,
            found=f"{call.op.name} does not take such arguments: {str(error).splitlines()[0]}",
            try_="declare the call with the shapes and dtypes that it is made with",
        ) from error


def _form(
    call: DeclaredCall,
    *,
    text: Callable[[Any], int | str],
    ranges: Mapping[str, tuple[int, int]],
    asked: str,
) -> CallForm:
    """Return the form of a call with stand-ins; `text` writes a size, `ranges` has the sizes that it writes."""
    names: dict[str, str] = {}

    def size(value: Any) -> Size:
        written = text(value)
        return written if isinstance(written, int) else names.setdefault(written, f"s{len(names)}")

    def tensor(value: torch.Tensor) -> TensorForm:
        strides: list[int | None] = []
        packed: Any = 1
        for axis in range(value.dim() - 1, -1, -1):
            stride = value.stride(axis)
            like_packed = text(stride) == text(packed)
            if not like_packed and not isinstance(stride, int):
                raise OpError(
                    asked=asked,
                    found=f"an argument of {call.op.name} whose stride along axis {axis} is {text(stride)}",
                    try_="declare arguments that are contiguous, or whose strides don't depend on dynamic sizes",
                )
            strides.insert(0, None if like_packed else stride)
            packed = stride * value.shape[axis]
        dtype = str(value.dtype).removeprefix("torch.")
        return TensorForm(tuple(size(d) for d in value.shape), tuple(strides), dtype, value.device.type)

    arguments: list[Any] = []
    for value in call.op.bound(call.args, call.kwargs) or ():
        made = tensor(value) if isinstance(value, torch.Tensor) else constant(value)
        if made is None and value is not None:
            raise OpError(
                asked=asked,
                found=f"an argument of {call.op.name} of type {type(value).__name__}",
                try_="tensors, and numbers, strings and dtypes that are the same in every call",
            )
        arguments.append(made)
    if not any(isinstance(a, TensorForm) for a in arguments):
        raise OpError(asked=asked, found=f"a call of {call.op.name} without tensors", try_="declare tensor arguments")
    sizes = tuple((new, *_bounds(old, ranges, asked=asked)) for old, new in names.items())
    return CallForm(call.op.name, tuple(arguments), sizes)


def _bounds(text: int | str, ranges: Mapping[str, tuple[int, int]], *, asked: str) -> tuple[int, int]:
    """Return the least and the greatest value of a size, an expression that grows or falls with each of its sizes."""
    try:
        ends = [size_expression(str(text))({name: pair[end] for name, pair in ranges.items()}) for end in (0, 1)]
    except (ValueError, KeyError):
        raise OpError(
            asked=asked, found=f"the size {text}", try_="sums, products and quotients of dynamic sizes"
        ) from None
    return min(ends), max(ends)


def _op(form: CallForm) -> IrOp:
    found = ir_op(find_overload(form.op))
    if found is None:
        raise InternalError(f"the form of a call of {form.op}, which is no operator")
    return found
