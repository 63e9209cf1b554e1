"""Trace one block of a stack, stamp its siblings.

While a block is traced, every attribute that its code reads from the block's modules is noted. A sibling is admitted to
the template when each of those reads would give the same there: equal constants, tensors of the same shape and stride,
the same submodules and functions. Then the template's nodes are copied with the sibling's tensors put in. Whatever
can't be checked that way (a write to a module, a value passed between blocks behind the arguments' back) makes the
block be traced by itself; the notes say why.

Layers' names need not be the same. A LayerName is read through a token (tokens.py), and where the trace only hands it
on to opaque ops, every sibling is stamped with its own. Strings and integers take one trace more: the first sibling
that differs in nothing else is traced with tokens in their place. If nothing looked at them, and its trace is equal
node for node to the template's, which was traced without, the names are free in the template as well. So no block is
ever stamped with a string or an integer that two traces did not agree on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from piecework.capture.locations import relative_path
from piecework.capture.matching import Matching, metadata
from piecework.capture.names import PassNames, Place, names_of, set_names, settle, with_arguments
from piecework.capture.observing import ABSENT, Observer
from piecework.capture.recording import Key, Recording, TraceAgain, by_read
from piecework.capture.sources import profiling
from piecework.capture.template import Template, arriving, equal_but_for_names, moved, shape_of, transfer_names
from piecework.capture.tensors import NamedTensors
from piecework.capture.tokens import is_hidden, look_inside
from piecework.capture.watching import Watch
from piecework.foundation.torch_private import Tracer, last_node, nodes_after, operator_name, plain_tensors

_CHANGES: Final = "changes the containers it is called with"

LookedAt = dict[type, set[Key]]
"""Names that the code of a class's blocks looks at, so that they are no better than other constants."""


@dataclass
class StackCounts:
    """How many blocks were traced and stamped, and why blocks could not be shared."""

    traced: int = 0
    stamped: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """A call of a block in a trace.

    Attributes:
        block: the block.
        modules: its modules by path.
        tracer: the trace.
        args, kwargs: what it is called with.
        leaves, spec: the same, flat.
        cls: the block's own class.
        profiler: sees what the model's code does, or None.
    """

    block: nn.Module
    modules: Mapping[str, nn.Module]
    tracer: Tracer
    args: Any
    kwargs: Any
    leaves: Sequence[Any]
    spec: pytree.TreeSpec
    cls: type[nn.Module]
    profiler: Any


class Stamper:
    """Runs the calls of blocks: stamps, or traces and makes templates.

    Args:
        counts: kept up to date.
        tensors: the model's tensors; they are put in place inside a block when it is traced.
        fake_mode: of the trace.
        opaque: operators at which the graph is cut, beside those that aren't torch's own.
        looked_at: what earlier attempts have found out, added to.

    Attributes:
        observer: makes the blocks report to this stamper.
        failed: why the capture must begin again, if it must.
    """

    def __init__(
        self,
        *,
        counts: StackCounts,
        tensors: NamedTensors,
        fake_mode: Any,
        opaque: frozenset[str],
        looked_at: LookedAt,
    ) -> None:
        self.observer = Observer(tensors=tensors, on_call=self._call)
        self.failed: TraceAgain | None = None
        self._counts = counts
        self._tensors = tensors
        self._fake_mode = fake_mode
        self._opaque = opaque
        self._looked_at = looked_at
        self._templates: dict[type, list[Template]] = {}
        self._inside: set[torch.fx.Node] = set()
        self._unseen: set[str] = set()
        self._shapes: dict[tuple[torch.fx.Node, str], bool] = {}

    def _call(self, block: nn.Module, tracer: Tracer, args: Any, kwargs: Any, cls: type[nn.Module]) -> Any:
        profiler = sys.getprofile()
        with profiling(None):  # until the model's own code runs
            return self._run(block, tracer, args, kwargs, cls, profiler)

    def _run(
        self, block: nn.Module, tracer: Tracer, args: Any, kwargs: Any, cls: type[nn.Module], profiler: Any
    ) -> Any:
        args, kwargs = look_inside((args, kwargs))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        near: list[tuple[Template, Matching]] = []
        with self.observer.quiet(), plain_tensors():
            call = _Call(block, dict(block.named_modules()), tracer, args, kwargs, leaves, spec, cls, profiler)
            for template in self._templates.get(cls, ()):
                matching = self._compare(template, call)
                if matching is None:
                    continue
                if matching.differing:
                    if not matching.differing & self._looked_at.get(cls, set()):
                        near.append((template, matching))
                elif self._shapes_hold(template, matching, tracer):
                    return self._stamp(template, matching, call)
        if near:
            return self._trace_names(*min(near, key=lambda found: len(found[1].differing)), call)
        return self._trace_plainly(call)

    def _compare(self, template: Template, call: _Call) -> Matching | None:
        """Return what stands for what in the call's block, or None where the template doesn't hold for it."""
        if call.spec != template.spec or shape_of(call.modules) != template.shape:
            return None
        modules = call.modules
        matching = Matching(
            call.tracer, self._tensors, template.recording.paths, {id(m): n for n, m in modules.items()}
        )
        free = by_read(template.free_now())
        arguments = free.get(("", ""), set())
        for i, (mine, given) in enumerate(zip(template.leaves, call.leaves, strict=True)):
            if not matching.leaf(Key("", "", i), mine, given, is_free=i in arguments):
                return None
        for (path, name), value in template.recording.reads.items():
            theirs = getattr(modules[path], name, ABSENT)
            if not matching.read(path, name, value, theirs, free=free.get((path, name), frozenset())):
                return None
        return matching

    def _shapes_hold(self, template: Template, matching: Matching, tracer: Tracer) -> bool:
        """Whether opaque ops' results look the same with the sibling's strings and integers, where that isn't known."""
        for node in template.nodes if self._unseen else ():
            if operator_name(node.target) not in self._unseen:
                continue
            values = {place: v for place, v in _own_names(node, template, matching) if not is_hidden(v)}
            if not values:
                continue
            known = (node, repr(values))
            if known not in self._shapes:
                self._shapes[known] = self._shape_holds(node, values, tracer)
            if not self._shapes[known]:
                return False
        return True

    def _shape_holds(self, node: torch.fx.Node, values: Mapping[Place, Any], tracer: Tracer) -> bool:
        args, kwargs = torch.fx.node.map_arg(with_arguments(node, values), lambda n: n.meta["val"])
        assert callable(node.target)
        with contextlib.suppress(Exception), tracer.paused(), self._fake_mode:  # the user's code, which may look it up
            return bool(metadata(node.target(*args, **kwargs)) == metadata(node.meta["val"]))
        return False

    def _trace_plainly(self, call: _Call) -> Any:
        recording = Recording(paths={id(m): n for n, m in call.modules.items()})
        out, template, problems = self._trace(call, recording, call.args, call.kwargs)
        if problems:
            self._counts.notes.append(f"{call.cls.__name__} is traced by itself: it {problems[0]}")
        else:
            self._templates.setdefault(call.cls, []).append(template)
        return out

    def _trace_names(self, near: Template, matching: Matching, call: _Call) -> Any:
        """Trace a block that differs from a template in names only, to find out whether they matter."""
        keys = near.free_now() | matching.differing
        watch = Watch(previous=call.profiler, outermost=sys._getframe())
        recording = Recording(paths={id(m): n for n, m in call.modules.items()}, open_keys=keys, watch=watch)
        try:
            with PassNames(call.tracer, fake_mode=self._fake_mode, opaque=self._opaque) as passing:
                args, kwargs = self._with_tokens(call, recording)
                out, template, problems = self._trace(call, recording, args, kwargs)
        except Exception as error:
            raise self._again(call, matching, f"a {type(error).__name__} otherwise") from error
        if self.observer.changed_containers() or (problems == [_CHANGES] and args is not call.args):
            raise self._again(call, matching, "it changes a list or dict that holds a name")
        for key in keys if watch.looks else ():
            if key in recording.unwrapped or not is_hidden(template.value_of(key)):
                recording.looked_at.setdefault(key, watch.looks[0])
        if watch.exact_types:
            raise self._again(call, matching, "it asks for the exact type of something")
        looked_at = keys & recording.looked_at.keys()
        if problems or looked_at:
            self._keep_plainly(template, problems, looked_at, call, keys)
        else:
            names = equal_but_for_names(near, template, matching.nodes)
            if names is None:
                raise self._again(call, matching, "with another name it does something else")
            transfer_names(names)
            self._unseen |= passing.unseen
            for key in keys:  # taking a LayerName's string out counts as a look where there is one trace only
                near.recording.looked_at.pop(key, None)
            known = self._templates[call.cls]
            known[known.index(near)] = replace(near, free=keys)
        return out

    def _with_tokens(self, call: _Call, recording: Recording) -> tuple[Any, Any]:
        """Return the call's arguments, with tokens for those that are open."""
        if not any(key.attribute == "" for key in recording.open_keys):
            return call.args, call.kwargs
        leaves = [
            self.observer.argument_token(call.block, i, x, recording) if Key("", "", i) in recording.open_keys else x
            for i, x in enumerate(call.leaves)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        return args, kwargs

    def _keep_plainly(
        self, template: Template, problems: list[str], looked_at: frozenset[Key], call: _Call, keys: frozenset[Key]
    ) -> None:
        """Keep a trace whose names were looked at like one that was traced on the names themselves."""
        self._looked_at.setdefault(call.cls, set()).update(looked_at)
        for key in sorted(looked_at):
            place = template.recording.looked_at[key]
            self._counts.notes.append(f"{call.cls.__name__} blocks are told apart by {_text(key)}: {_looks(place)}")
        if problems:
            self._counts.notes.append(f"{call.cls.__name__} is traced by itself: it {problems[0]}")
        else:
            free = frozenset(k for k in template.free if k not in keys or is_hidden(template.value_of(k)))
            free -= template.recording.unwrapped
            self._templates.setdefault(call.cls, []).append(replace(template, free=free))

    def _again(self, call: _Call, matching: Matching, reason: str) -> TraceAgain:
        self.failed = TraceAgain(call.cls, frozenset(matching.differing), reason)
        return self.failed

    def _trace(self, call: _Call, recording: Recording, args: Any, kwargs: Any) -> tuple[Any, Template, list[str]]:
        """Run the block; returns its result, its template and why that can't be stamped, if so."""
        block, tracer = call.block, call.tracer
        self._tensors.swap(block.modules())
        last = last_node(tracer.graph)
        given = pytree.tree_leaves((args, kwargs))
        profiler = call.profiler if recording.watch is None else recording.watch.see
        with self.observer.record(recording), profiling(profiler):
            out = look_inside(call.cls.__call__(block, *args, **kwargs))
        self._counts.traced += 1
        nodes = list(nodes_after(tracer.graph, last))
        settle(nodes, opaque=self._opaque)
        out_leaves, out_spec = pytree.tree_flatten(out)
        template = Template(
            block=block,
            recording=recording,
            spec=call.spec,
            leaves=call.leaves,
            leaf_nodes=[tracer.node_of(x) if isinstance(x, torch.Tensor) else None for x in call.leaves],
            nodes=nodes,
            free=recording.handed_on(),
            out_spec=out_spec,
            out_leaves=out_leaves,
            out_nodes=[tracer.node_of(x) if isinstance(x, torch.Tensor) else None for x in out_leaves],
            shape=shape_of(call.modules),
        )
        after = pytree.tree_leaves((args, kwargs))
        if len(after) != len(given) or any(a is not b for a, b in zip(after, given, strict=True)):
            problems = [_CHANGES]
        else:
            problems = recording.problems + self._problems(template, tracer)
        self._inside.update(n for n in nodes if not isinstance(n.meta.get("val"), torch.SymInt))
        return out, template, problems

    def _problems(self, template: Template, tracer: Tracer) -> list[str]:
        """Say why the template can't be stamped, if so."""
        own = set(template.nodes)
        known = {n for n in template.leaf_nodes if n is not None}
        for value in template.recording.reads.values():
            known.update(_nodes_of(value, tracer))
        for node in template.nodes:
            for source in node.all_input_nodes:
                if source not in own and source not in known and source in self._inside:
                    return [f"takes {source.target} of an earlier block otherwise than as an argument"]
        for leaf, made in zip(template.out_leaves, template.out_nodes, strict=True):
            if isinstance(leaf, torch.Tensor) and made not in own and made not in known:
                return ["returns a tensor that it neither computed nor was given"]
            if not isinstance(leaf, (torch.Tensor, int, float, bool, str, type(None))):
                return [f"returns a {type(leaf).__name__}"]
        return []

    def _stamp(self, template: Template, matching: Matching, call: _Call) -> Any:
        modules = call.modules
        bound = matching.nodes
        made: list[torch.fx.Node] = []
        for node in template.nodes:
            copy = call.tracer.graph.node_copy(node, lambda n: bound.get(n, n))
            if names_of(node):
                values = dict(_own_names(node, template, matching))
                copy.args, copy.kwargs = with_arguments(copy, values)
                paths = template.recording.paths
                set_names(copy, {place: moved(origins, paths, modules) for place, origins in names_of(node).items()})
            bound[node] = copy
            made.append(copy)
        self._inside.update(n for n in made if not isinstance(n.meta.get("val"), torch.SymInt))
        self._counts.stamped += 1
        free = by_read(template.free_now())
        for path, name in template.recording.reads if self.observer.recordings else ():
            value = getattr(modules[path], name, ABSENT)
            self.observer.note(modules[path], name, value, handed_on=free.get((path, name), frozenset()))
        return pytree.tree_unflatten(self._outputs(template, call, bound), template.out_spec)

    def _outputs(self, template: Template, call: _Call, bound: Mapping[torch.fx.Node, torch.fx.Node]) -> list[Any]:
        tracer = call.tracer
        given = {tracer.node_of(x): x for x in call.leaves if isinstance(x, torch.Tensor)}
        fresh: dict[torch.fx.Node, torch.Tensor] = {}
        outputs: list[Any] = []
        for leaf, node in zip(template.out_leaves, template.out_nodes, strict=True):
            if node is None:
                outputs.append(leaf)
                continue
            target = bound[node]
            if target in given:
                outputs.append(given[target])
                continue
            if target not in fresh:
                with tracer.paused(), self._fake_mode:
                    fresh[target] = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
                tracer.attach(fresh[target], target, new_sizes=False)
            outputs.append(fresh[target])
        return outputs


def _own_names(node: torch.fx.Node, template: Template, matching: Matching) -> Iterator[tuple[Place, Any]]:
    """Yield the places of a node's arguments in which a sibling has names of its own, and those."""
    for place, key, origin in template.free_names(node):
        if key in matching.names:
            yield place, arriving(matching.names[key], origin)


def _text(key: Key) -> str:
    if key.attribute == "":
        return f"argument {key.leaf} of their calls"
    return ".".join(p for p in (key.path, key.attribute) if p) + (f"[{key.leaf}]" if key.leaf >= 0 else "")


def _looks(place: str) -> str:
    file, _, line = place.rpartition(":")
    if file:
        return f"it is looked at in {relative_path(Path(file))}:{line}"
    return f"{place} may look at it" if place else "it is looked at"


def _nodes_of(value: Any, tracer: Tracer) -> Iterator[torch.fx.Node]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            node = tracer.node_of(leaf)
            if node is not None:
                yield node
