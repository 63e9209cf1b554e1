"""IR ops become what their provider has: native bodies are written out, so that a backend fuses them.

before: piecework::silu_mul(gate, up)
after:  aten::mul(aten::silu(gate), up)              where the provider is inlined (`native`, `aten`)
or:     piecework__triton::silu_mul(gate, up)        where it is called

Applies to every op declared with `piecework.op`, after all passes that match such ops. The provider is the first of the
order whose `supports` holds for the call's dtypes and for all sizes that are declared; an implementation in place is
taken only where nothing reads its argument afterwards. Each call site has its choice, with the reason against every
other provider.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any, Final, final

import torch

from piecework.bundle.sizes import size_expression
from piecework.compiler.passes.inline import Body, NotTraceable, trace_body, varies
from piecework.compiler.passes.splice import Splice
from piecework.compiler.rewrite.fakes import FakeRun, Symbols, declare, made_of, run_on_fakes
from piecework.compiler.rewrite.liveness import dead_arguments
from piecework.compiler.rewrite.verify import same_results
from piecework.errors import InternalError, OpError
from piecework.foundation.torch_private import (
    TORCHS_NAMESPACES,
    SymbolicSession,
    data_dependent_errors,
    size_oblivious,
)
from piecework.ops.ir.op import IrOp, ir_op
from piecework.ops.ir.operator import Implementation
from piecework.ops.ir.program import Call, Program, TensorSpec
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.ir.resolve import resolve_target
from piecework.ops.ir.selection import CallFacts, Choice, Rejected, choose_implementation

_NO_OPS: Final = frozenset({"operator", "torch", "math"})


@dataclass(frozen=True)
class CallSite:
    """What became of one call of an IR op.

    Attributes:
        op: the op's name, as orders of providers write it.
        arguments: the call's, for people: "float32[s0, 64], float32[64], 1e-06".
        provider: whose implementation it has.
        rejected: the other providers, and why they were not taken.
        origins: numbers of the calls of the captured piece that the call stands for.
    """

    op: str
    arguments: str
    provider: str
    rejected: tuple[Rejected, ...] = ()
    origins: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the call site as JSON."""
        rejected = [[r.provider, r.why] for r in self.rejected]
        return {
            "op": self.op,
            "arguments": self.arguments,
            "provider": self.provider,
            "rejected": rejected,
            "origins": list(self.origins),
        }


@dataclass(frozen=True)
class Lowered:
    """A program without IR ops, and what became of each that it had, in order."""

    program: Program
    sites: tuple[CallSite, ...] = ()


@final
@dataclass
class Lowering:
    """Lowers programs by one order; equal calls are traced once.

    Args:
        order: of providers. They are loaded already.
        absent: why some of them can't be used.
    """

    order: ProviderOrder
    absent: Mapping[str, str] = field(default_factory=dict)
    _bodies: dict[str, Body | NotTraceable] = field(default_factory=dict)

    def lower(
        self,
        program: Program,
        *,
        strict_outputs: frozenset[int] = frozenset(),
        origins: Sequence[tuple[int, ...]] | None = None,
    ) -> Lowered:
        """Lower a program.

        Args:
            program: a piece's.
            strict_outputs: positions of results that must keep their strides.
            origins: for each call, what it was when it was captured; None: the program is as it was captured.

        Raises OpError where no provider of the order supports a call.
        """
        ops = [_op_of(call) for call in program.calls]
        if not any(ops):
            return Lowered(program)
        run = run_on_fakes(program, known=lambda call, run: self._known(call, run, program.symbols))
        out = Splice()
        sites = []
        for index, (call, op) in enumerate(zip(program.calls, ops, strict=True)):
            if op is None:
                out.copy(index, call)
                continue
            choice = self._choose(op, index, program, run)
            origin = (index,) if origins is None else origins[index]
            sites.append(CallSite(op.short_name, _shown(call, run), choice.provider, choice.rejected, origin))
            body = self._body(op, choice.implementation, call, run, program.symbols)
            if isinstance(body, Body):
                given = [*call.args, *call.kwargs.values()]
                out.inline(index, [value for value in given if varies(run.described(value))], body)
            else:
                out.call(index, call, choice.implementation, signature=op.signature)
        made = replace(program, calls=tuple(out.calls), outputs=tuple(out.moved(o) for o in program.outputs))
        wrong = same_results(program, made, strict_outputs=strict_outputs)
        if wrong is not None:
            raise InternalError(f"lowering {[site.op for site in sites]} changed a piece: {wrong}")
        return Lowered(made, tuple(sites))

    def _known(self, call: Call, run: FakeRun, symbols: Symbols) -> Any:
        """Return an IR op's results by its native body, which is traced once for all calls that are alike."""
        op = _op_of(call)
        body = None if op is None else self._body(op, op.implementations["native"], call, run, symbols)
        if not isinstance(body, Body):
            return None
        results = tuple(run.sizes.tensor(spec) for spec in body.specs)
        return results if len(results) > 1 else results[0]

    def _choose(self, op: IrOp, index: int, program: Program, run: FakeRun) -> Choice:
        call = program.calls[index]
        args = [run.described(a) for a in call.args]
        kwargs = {name: run.described(value) for name, value in call.kwargs.items()}

        def ask(implementation: Implementation) -> bool | str:
            answer = _supports(implementation, args, kwargs, symbols=program.symbols)
            if answer is True and implementation.inlined:
                body = self._body(op, implementation, call, run, program.symbols)
                return f"supports() said yes, but {body.why}" if isinstance(body, NotTraceable) else True
            return answer

        facts = CallFacts(
            rows=_rows(args, program.symbols),
            dead=dead_arguments(op.signature, index, program, run),
            absent=self.absent,
            inside=True,
            ask=ask,
        )
        decoded = [run.decoded(a) for a in call.args]
        return choose_implementation(
            self.order, op, decoded, {n: run.decoded(v) for n, v in call.kwargs.items()}, facts=facts
        )

    def _body(
        self, op: IrOp, implementation: Implementation, call: Call, run: FakeRun, symbols: Symbols
    ) -> Body | NotTraceable | None:
        """Return an implementation's body for a call, or None where it is called instead."""
        if not implementation.inlined:
            return None
        args = [run.described(a) for a in call.args]
        kwargs = {name: run.described(value) for name, value in call.kwargs.items()}
        key = json.dumps([op.name, implementation.provider, args, kwargs, list(symbols)], sort_keys=True)
        if key not in self._bodies:
            self._bodies[key] = trace_body(implementation.function, args, kwargs, symbols=symbols)
        body = self._bodies[key]
        if isinstance(body, Body) and implementation.function is not op.native:
            native = self._body(op, op.implementations["native"], call, run, symbols)
            if isinstance(native, Body) and body.specs != native.specs:
                raise OpError(
                    asked=f"{implementation.provider}'s {op.name} of {_shown(call, run)}",
                    found=f"results {_specs(body.specs)}, where the op gives {_specs(native.specs)}",
                    try_="correct the implementation, or let its supports() refuse such calls",
                )
        return body


def _op_of(call: Call) -> IrOp | None:
    namespace = call.target.partition(".")[0]
    return None if namespace in TORCHS_NAMESPACES | _NO_OPS else ir_op(resolve_target(call.target))


def _supports(
    implementation: Implementation, args: Sequence[Any], kwargs: Mapping[str, Any], *, symbols: Symbols
) -> bool | str:
    """Ask an implementation about a call in a session of its own: its questions about sizes must not narrow others."""
    if implementation.supports is None:
        return True
    session = SymbolicSession()
    sizes = declare(symbols, session=session)
    try:
        with torch.no_grad(), size_oblivious():
            answer = implementation.supports(
                *(made_of(a, sizes) for a in args), **{name: made_of(value, sizes) for name, value in kwargs.items()}
            )
    except data_dependent_errors():
        return "nothing: it looks at the values of the arguments"
    answer = answer if isinstance(answer, str) else bool(answer)
    guards = sorted({guard.expr for guard in session.narrowing_guards()})
    if answer is True and guards:
        declared = ", ".join(f"{name} from {low} to {high}" for name, low, high in symbols)
        return f"yes only where {' and '.join(guards)}, of {declared}"
    return answer


def _rows(args: Sequence[Any], symbols: Symbols) -> tuple[int, int] | None:
    """Return the least and the greatest number of rows of the first tensor."""
    first = next((a["tensor"] for a in args if isinstance(a, Mapping) and "tensor" in a), None)
    if first is None:
        return None
    leading = TensorSpec.from_json(first).shape[:-1]
    counts = []
    for corner in product(*((low, high) for _, low, high in symbols)):
        named = {name: value for (name, _, _), value in zip(symbols, corner, strict=True)}
        try:
            counts.append(prod(d if isinstance(d, int) else size_expression(d)(named) for d in leading))
        except ValueError:
            return None  # a size that isn't made of sums and products
    return min(counts), max(counts)


def _shown(call: Call, run: FakeRun) -> str:
    given = [(run.described(a), "") for a in call.args]
    given += [(run.described(value), f"{name}=") for name, value in call.kwargs.items()]
    return ", ".join(label + _shown_argument(value) for value, label in given)


def _shown_argument(value: Any) -> str:
    if isinstance(value, Mapping):
        if "tensor" in value:
            return _spec(TensorSpec.from_json(value["tensor"]))
        return str(next(iter(value.values())))
    return str(value)


def _spec(spec: TensorSpec) -> str:
    return f"{spec.dtype}[{', '.join(str(d) for d in spec.shape)}]"


def _specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{_spec(spec)} of strides {list(spec.stride)}" for spec in specs)
