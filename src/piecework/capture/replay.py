"""Run a block's forward against another block's tape (tape.py): does it ask torch for the same, call by call?

The forward really runs, on the block's own names and constants, so whatever it looks at, it sees. Only torch's
functions do nothing: each call is compared with the tape's next one, and gives what the tape says, with stand-ins for
the tensors. The first call that differs ends it (`Differs`). Constants of opaque ops may differ; those are the plan's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.utils import _pytree as pytree

from piecework.capture.tape import BlockCall, Made, Place, Shape, Taken, Template, TorchCall, setting
from piecework.foundation.torch_private import call_arguments
from piecework.ops.ir.layer import LayerName

_EQUAL: Final = frozenset({bool, int, str, bytes, LayerName, torch.device})
_SHAPES: Final = frozenset({tuple, torch.Size})
"""A shape with symbolic sizes that the tape gives comes as a plain tuple."""
_NAMES: Final = frozenset({bool, int, float, str, LayerName})
"""Types of an opaque op's constants that may be others in another block."""


class Differs(BaseException):
    """The forward does something else than the tape. Not an Exception, so that the model's code doesn't catch it."""


class Constant(NamedTuple):
    """A constant of an opaque op's node."""

    node: torch.fx.Node
    place: Place


class Replay:
    """One run against a tape.

    Args:
        template: the tape, and the nodes it belongs to.
        stand_ins: as many tensors as calls on the tape gave, which nothing else refers to.

    Attributes:
        constants: of opaque ops, as the forward gave them.
    """

    def __init__(self, template: Template, stand_ins: list[torch.Tensor]) -> None:
        self.template = template
        self._taken: list[torch.Tensor | None] = [None] * len(template.tape.taken)
        self.constants: dict[Constant, Any] = {}
        self._calls = iter(template.tape.calls)
        self._stand_ins = stand_ins
        self._index = {id(t): i for i, t in enumerate(stand_ins)}
        self._failed = False

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Compare a call with the tape's next one, and return what that gave."""
        call = self._next()
        if not isinstance(call, TorchCall) or function != call.function or setting() != call.setting:
            raise self._differs()
        if call.node is None:
            same = self._same(call.arguments, (args, kwargs))
        else:
            given = call_arguments(call.node.target, args, kwargs)
            same = all(self._same_argument(call.node, (n, ()), v, given[n]) for n, v in call.arguments.items())
        if not same:
            raise self._differs()
        return self._read(call.result)

    def block(self, shape: Shape, run: Callable[[Template], tuple[Replay, list[Any]] | None]) -> Any:
        """Compare the call of an inner block of the given shape; `run` replays it and returns None where it differs."""
        call = self._next()
        if not isinstance(call, BlockCall) or call.template.shape != shape:
            raise self._differs()
        ran = run(call.template)
        if ran is None:
            raise self._differs()
        inner, held = ran
        if not all(self._same(mine, t) for mine, t in zip(call.taken, inner.all_taken(), strict=True)):
            raise self._differs()
        for (node, place), value in inner.constants.items():
            self.constants[Constant(call.nodes.get(node, node), place)] = value
        leaves, spec = pytree.tree_flatten(call.result)
        theirs = pytree.tree_leaves(held[0])
        made = [self._read(m) if _is_tensor(m) else t for m, t in zip(leaves, theirs, strict=True)]
        return pytree.tree_unflatten(made, spec)

    def finish(self, held: list[Any]) -> bool:
        """Whether the forward came to the tape's end and returned the same as the tape's, but for constants."""
        if self._failed or next(self._calls, None) is not None:
            return False
        mine, spec = pytree.tree_flatten(self.template.tape.result)
        theirs, other = pytree.tree_flatten(held[0])
        return spec == other and all(
            self._same(m, t) if _is_tensor(m) or isinstance(m, torch.SymInt) else type(m) is type(t)
            for m, t in zip(mine, theirs, strict=True)
        )

    def all_taken(self) -> Sequence[torch.Tensor]:
        """Return the tensors that the forward, now at its end, took in place of those of `Tape.taken`."""
        return [t for t in self._taken if t is not None]

    def has_leaked(self, held: list[Any]) -> bool:
        """Whether something beside the block's result, which `held` has, still refers to a stand-in."""
        counts = Counter(id(x) for x in pytree.tree_leaves(held))
        alone = 2  # the list's reference, and that of the question itself
        return any(sys.getrefcount(self._stand_ins[i]) > alone + counts[key] for key, i in self._index.items())

    def _next(self) -> TorchCall | BlockCall:
        call = None if self._failed else next(self._calls, None)
        if call is None:
            raise self._differs()
        return call

    def _differs(self) -> Differs:
        self._failed = True
        return Differs()

    def _read(self, value: Any) -> Any:
        """Return what is written on the tape, with this block's tensors."""
        if isinstance(value, Made):
            return self._stand_ins[value.index]
        if isinstance(value, Taken):
            return self._taken[value.index]
        if not isinstance(value, (tuple, list, dict)):
            return value
        leaves, spec = pytree.tree_flatten(value)
        return pytree.tree_unflatten([self._read(x) if _is_tensor(x) else x for x in leaves], spec)

    def _same_argument(self, node: torch.fx.Node, place: Place, mine: Any, theirs: Any) -> bool:
        """Compare an argument of an opaque op; a constant is noted."""
        if type(mine) in _NAMES and type(mine) is type(theirs):
            self.constants[Constant(node, place)] = str(theirs) if isinstance(theirs, str) else theirs
            return True
        if type(mine) in (tuple, list) and type(mine) is type(theirs):
            name, indices = place
            return len(mine) == len(theirs) and all(
                self._same_argument(node, (name, (*indices, i)), m, t)
                for i, (m, t) in enumerate(zip(mine, theirs, strict=True))
            )
        return self._same(mine, theirs)

    def _same(self, mine: Any, theirs: Any) -> bool:
        kind = type(mine)
        if kind is Made:
            return id(theirs) in self._index and self._index[id(theirs)] == int(mine.index)
        if kind is Taken:
            if not isinstance(theirs, torch.Tensor) or id(theirs) in self._index:
                return False
            if self._taken[mine.index] is None:
                self._taken[mine.index] = theirs
            return self._taken[mine.index] is theirs
        if mine is theirs:
            return True
        if kind is not type(theirs) and not (kind in _SHAPES and type(theirs) in _SHAPES):
            return False
        if issubclass(kind, (tuple, list)):
            return len(mine) == len(theirs) and all(self._same(m, t) for m, t in zip(mine, theirs, strict=True))
        if kind is dict:
            return list(mine) == list(theirs) and all(self._same(mine[k], theirs[k]) for k in mine)
        if kind is slice:
            return all(self._same(getattr(mine, n), getattr(theirs, n)) for n in ("start", "stop", "step"))
        if issubclass(kind, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return bool(mine.node.expr == theirs.node.expr)
        if kind in (float, complex):
            return repr(mine) == repr(theirs)  # tells 0.0 from -0.0, and takes nan for nan
        return bool(mine == theirs) if kind in _EQUAL else False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Made, Taken))
