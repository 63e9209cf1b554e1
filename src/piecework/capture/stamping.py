"""Trace one block of a stack, stamp its siblings.

While a block is traced, what its forward asks torch for is written on a tape (tape.py). A sibling's forward then runs
against the tape (replay.py), on its own weights and names, with torch's functions doing nothing. If it asks for the
same, call by call, the block's nodes are copied with the sibling's tensors put in, and with its own constants at opaque
ops, which are the plan's. So a name may be anything and used in any way: what it leads to is what is compared. A
sibling that does something else is traced, and is a template for those that do the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from piecework.capture.blocks import in_place_of_forward, mark_copies
from piecework.capture.calls import Calls
from piecework.capture.constants import argument_at, with_arguments
from piecework.capture.cuts import is_opaque_name
from piecework.capture.replay import Differs, Replay
from piecework.capture.tape import Made, Place, Shape, Source, Taken, Template, Writer, metadata
from piecework.capture.tensors import NamedTensors
from piecework.foundation.torch_private import Tracer, current_tracer, plain_tensors

_MOST_TRIED: Final = 8
"""How many templates of a class, the one that fitted last first, a block is run against before it is traced."""


@dataclass
class StackCounts:
    """How many blocks were traced and stamped, by class, and why blocks could not be shared."""

    traced_of: Counter[type] = field(default_factory=Counter)
    stamped_of: Counter[type] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def traced(self) -> int:
        """How many were traced."""
        return self.traced_of.total()

    @property
    def stamped(self) -> int:
        """How many were stamped."""
        return self.stamped_of.total()

    @property
    def unshared(self) -> tuple[str, ...]:
        """The notes, and the classes of which no two blocks did the same."""
        different = [
            f"{cls.__name__} blocks are traced one by one: no two of the {count} do the same"
            for cls, count in self.traced_of.items()
            if count > 1 and not self.stamped_of[cls] and not any(n.startswith(f"{cls.__name__} ") for n in self.notes)
        ]
        return (*self.notes, *different)


class TraceAgain(BaseException):
    """The capture must begin again, with the blocks of class `cls` traced one by one.

    Not an Exception, so that the code that is being traced doesn't catch it.
    """

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.cls = cls


@dataclass(frozen=True)
class Stamping:
    """What `stamping` gives.

    Attributes:
        counts: kept up to date.
        parts: the modules inside blocks.
        calls: to be entered around the model's code, inside all other modes.
    """

    counts: StackCounts
    parts: frozenset[nn.Module]
    calls: contextlib.AbstractContextManager[object]


@contextlib.contextmanager
def stamping(
    module: nn.Module, *, tensors: NamedTensors, fake_mode: Any, opaque: frozenset[str], one_by_one: frozenset[type]
) -> Iterator[Stamping]:
    """Inside, calls of the blocks of `module`'s stacks are traced once per structure and stamped for the rest.

    A stack is a ModuleList; its blocks are the elements that share their class with another one.

    Args:
        module: the model.
        tensors: its tensors; they are put in place inside a block when it is traced.
        fake_mode: of the trace.
        opaque: operators at which the graph is cut, beside those that aren't torch's own.
        one_by_one: classes whose blocks are all traced.

    Raises TraceAgain.
    """
    stamper = _Stamper(tensors=tensors, fake_mode=fake_mode, opaque=opaque)
    leaks = "some keep a tensor where another block may find it"
    stamper.counts.notes.extend(f"{cls.__name__} blocks are traced one by one: {leaks}" for cls in one_by_one)
    blocks = [b for stack in _stacks(module) for b in stack if type(b) not in one_by_one]
    with in_place_of_forward(blocks, stamper.forward_of):
        parts = frozenset(part for block in blocks for part in block.modules())
        yield Stamping(stamper.counts, parts, stamper.calls)
    if stamper.failed is not None:  # the module's code caught it
        raise stamper.failed


def _stacks(module: nn.Module) -> list[list[nn.Module]]:
    stacks: list[list[nn.Module]] = []
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            by_class: dict[type, list[nn.Module]] = {}
            for element in part:
                by_class.setdefault(type(element), []).append(element)
            stacks.extend(found for found in by_class.values() if len(found) > 1)
    return stacks


@dataclass(frozen=True)
class _Call:
    """A call of a block's forward in a trace; `shape` are names and classes of the block's modules."""

    block: nn.Module
    forward: Callable[..., Any]
    args: Any
    kwargs: Any
    shape: Shape


class _Stamper:
    def __init__(self, *, tensors: NamedTensors, fake_mode: Any, opaque: frozenset[str]) -> None:
        self.counts = StackCounts()
        self.calls = Calls(tensors)
        self.failed: TraceAgain | None = None
        self._tensors = tensors
        self._fake_mode = fake_mode
        self._opaque = opaque
        self._templates: dict[type, list[Template]] = {}
        self._stand_ins: dict[Template, list[torch.Tensor]] = {}
        self._shapes: dict[tuple[torch.fx.Node, str], bool] = {}

    def forward_of(self, block: nn.Module) -> Callable[..., Any]:
        """Return what runs in place of a block's forward."""
        forward = block.forward

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._run(block, forward, args, kwargs)

        return run

    def _run(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        top = self.calls.innermost
        call = _Call(block, forward, args, kwargs, [(name, type(part)) for name, part in block.named_modules()])
        if isinstance(top, Replay):
            return top.block(call.shape, lambda template: self._replay(template, call))
        tracer = current_tracer()
        if tracer is None:
            return forward(*args, **kwargs)
        if self.calls.is_inside:
            self._tensors.swap(block.modules())
            return forward(*args, **kwargs)
        return self._stamp_or_trace(call, tracer, top)

    def _stamp_or_trace(self, call: _Call, tracer: Tracer, outer: Writer | None) -> Any:
        known = self._templates.setdefault(type(call.block), [])
        fitting = [t for t in known if t.shape == call.shape]
        for template in fitting[:_MOST_TRIED]:
            before = _Attributes(call.block)
            with tracer.paused():
                ran = self._replay(template, call)
            if ran is not None:
                replay, held = ran
                with plain_tensors():
                    nodes = self._bind(template, replay, tracer)
                    if nodes is not None:
                        result = self._stamp(type(call.block), replay, held, nodes, tracer)
                        known.remove(template)
                        known.insert(0, template)
                        if outer is not None:
                            outer.block(template, taken=replay.all_taken(), nodes=nodes, result=result)
                        return result
            before.restore()
        return self._trace(call, tracer, outer)

    def _replay(self, template: Template, call: _Call) -> tuple[Replay, list[Any]] | None:
        """Run a block against a template; returns its result in a list, or None where it does something else."""
        stand_ins = self._stand_ins.pop(template, None)
        if stand_ins is None:
            with plain_tensors(), self._fake_mode:
                stand_ins = [torch.empty(0) for _ in range(template.tape.num_made)]
        replay = Replay(template, stand_ins)
        held: list[Any] = []
        # what fails here by itself fails again when it is traced, and then with an error about the real tensors
        with self.calls.run(replay), contextlib.suppress(Differs, Exception):
            held.append(call.forward(*call.args, **call.kwargs))
        with plain_tensors():
            same = bool(held) and replay.finish(held)
            if replay.has_leaked(held):
                self.failed = TraceAgain(type(call.block))
                raise self.failed
        self._stand_ins[template] = stand_ins
        return (replay, held) if same else None

    def _trace(self, call: _Call, tracer: Tracer, outer: Writer | None) -> Any:
        self._tensors.swap(call.block.modules())
        writer = Writer(tracer, tensors=self._tensors, is_opaque=lambda name: is_opaque_name(name, self._opaque))
        with self.calls.run(writer):
            held = [call.forward(*call.args, **call.kwargs)]
        self.counts.traced_of[type(call.block)] += 1
        with plain_tensors():
            template = writer.finish(held[0], shape=call.shape)
            result = self._result(template, held, {}, writer.taken(), tracer)
            held.clear()
            writer.see_kept()
            problems = template.tape.problems
            if problems:
                self.counts.notes.append(f"{type(call.block).__name__} is traced by itself: it {problems[0]}")
            else:
                self._templates[type(call.block)].insert(0, template)
            if outer is not None:
                outer.block(None if problems else template, taken=writer.taken(), nodes={}, result=result)
        return result

    def _bind(self, template: Template, replay: Replay, tracer: Tracer) -> dict[torch.fx.Node, torch.fx.Node] | None:
        """Return the nodes of tensors that the template takes → the sibling's, None where these look different."""
        bound: dict[torch.fx.Node, torch.fx.Node] = {}
        for source, theirs in zip(template.tape.taken, replay.all_taken(), strict=True):
            if source.node is None:
                if theirs is not source.tensor:
                    return None
                continue
            node = self._partner(source, theirs, tracer)
            if node is None or bound.setdefault(source.node, node) is not node:
                return None
        by_node: dict[torch.fx.Node, dict[Place, Any]] = {}
        for constant, value in replay.constants.items():
            by_node.setdefault(constant.node, {})[constant.place] = value
        return bound if all(self._shape_holds(n, v, tracer) for n, v in by_node.items()) else None

    def _partner(self, source: Source, theirs: torch.Tensor, tracer: Tracer) -> torch.fx.Node | None:
        name = self._tensors.name_of(theirs)
        if source.name is not None and source.node is not None:
            if name is None or not self._tensors.same_metadata(source.name, name):
                return None
            return self._tensors.node(name, like=source.node.meta["val"])
        return tracer.node_of(theirs) if name is None and metadata(theirs) == source.metadata else None

    def _shape_holds(self, node: torch.fx.Node, values: Mapping[Place, Any], tracer: Tracer) -> bool:
        """Whether an opaque op's result looks the same with a sibling's constants."""
        values = {place: v for place, v in values.items() if argument_at(node, place) != v}
        known = (node, repr(values))
        if known not in self._shapes:
            self._shapes[known] = not values or self._look_at_shape(node, values, tracer)
        return self._shapes[known]

    def _look_at_shape(self, node: torch.fx.Node, values: Mapping[Place, Any], tracer: Tracer) -> bool:
        args, kwargs = torch.fx.node.map_arg(with_arguments(node, values), lambda n: n.meta["val"])
        assert callable(node.target)
        with contextlib.suppress(Exception), tracer.paused(), self._fake_mode:  # the user's code, which may look it up
            return bool(metadata(node.target(*args, **kwargs)) == metadata(node.meta["val"]))
        return False

    def _stamp(
        self, cls: type, replay: Replay, held: list[Any], bound: dict[torch.fx.Node, torch.fx.Node], tracer: Tracer
    ) -> Any:
        """Copy the template's nodes for a block of a class, adding them to `bound`; returns the sibling's result."""
        template = replay.template
        constants: dict[torch.fx.Node, dict[Place, Any]] = {}
        for constant, value in replay.constants.items():
            constants.setdefault(constant.node, {})[constant.place] = value
        for node in template.nodes:
            bound[node] = tracer.graph.node_copy(node, lambda n: bound.get(n, n))
            if node in constants:
                bound[node].args, bound[node].kwargs = with_arguments(bound[node], constants[node])
        mark_copies({node: bound[node] for node in template.nodes})
        self.counts.stamped_of[cls] += 1
        return self._result(template, held, bound, replay.all_taken(), tracer)

    def _result(
        self,
        template: Template,
        held: list[Any],
        nodes: Mapping[torch.fx.Node, torch.fx.Node],
        taken: Sequence[torch.Tensor],
        tracer: Tracer,
    ) -> Any:
        """Return a block's result, which `held` has, with new tensors in place of those that it computed.

        Args:
            template: its template.
            held: a list with what its forward returned.
            nodes: the template's nodes → its own, where these are others.
            taken: what it took from outside.
            tracer: the trace.
        """
        fresh: dict[Made, torch.Tensor] = {}

        def own(item: Any, theirs: Any) -> Any:
            if isinstance(item, Taken):
                tensor = taken[item.index]
                return self._tensors.fake(tensor) if self._tensors.is_known(tensor) else tensor
            if not isinstance(item, Made):
                return item if isinstance(item, torch.SymInt) else theirs
            like = template.returned.get(item)
            if like is None:
                return theirs
            if item not in fresh:
                with tracer.paused(), self._fake_mode:
                    fresh[item] = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device)
                tracer.attach(fresh[item], nodes.get(like.node, like.node), new_sizes=False)
            return fresh[item]

        mine, spec = pytree.tree_flatten(template.tape.result)
        theirs = pytree.tree_leaves(held[0])
        return pytree.tree_unflatten([own(m, t) for m, t in zip(mine, theirs, strict=True)], spec)


class _Attributes:
    """What a block's modules have as attributes, and what is in their lists, dicts and sets, to be put back."""

    def __init__(self, block: nn.Module) -> None:
        self._modules = [(vars(part), dict(vars(part))) for part in block.modules()]
        values = [v for _, before in self._modules for v in before.values()]
        self._contents = [(v, v.copy()) for v in values if type(v) in (list, dict, set)]

    def restore(self) -> None:
        """Undo what the block's forward did to them."""
        for now, before in self._modules:
            now.clear()
            now.update(before)
        for now, before in self._contents:
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(before)
