"""Trace one block of a stack, stamp its siblings.

While a block is traced, every attribute that its code reads from the block's modules is noted. A sibling is admitted to
the template when each of those reads would give the same there: equal constants, tensors of the same shape and stride,
the same submodules and functions. Then the template's nodes are copied with the sibling's tensors put in. Whatever
can't be checked that way (a write to a module, a value passed between blocks behind the arguments' back) makes the
block be traced by itself; the notes say why.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from piecework.foundation.torch_private import Tracer, current_tracer, last_node, nodes_after, plain_tensors
from piecework.graph.matching import Matching
from piecework.graph.tensors import NamedTensors
from piecework.ops.layer import LayerHandle

_ABSENT = object()
_TABLE_READERS = frozenset(sys.modules[c.__module__].__file__ for c in (nn.Module, nn.Sequential, NamedTensors))
"""Files that read `_modules` and the like whole; names and types in it are compared for every sibling anyway."""
_TABLES = frozenset({"__dict__", "_parameters", "_buffers", "_modules"})


@dataclass
class StackCounts:
    """How many blocks were traced and stamped, and why blocks could not be shared."""

    traced: int = 0
    stamped: int = 0
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def stamping(
    module: nn.Module, *, tensors: NamedTensors, fake_mode: Any
) -> Iterator[tuple[StackCounts, frozenset[nn.Module]]]:
    """Inside, calls of the blocks of `module`'s stacks are traced once per structure and stamped for the rest.

    A stack is a ModuleList; its blocks are the elements that share their class with another one. Yields counts that are
    kept up to date, and the modules inside blocks: `tensors` are put in place there when a block is traced.
    """
    counts = StackCounts()
    observer = _Observer(counts=counts, tensors=tensors, fake_mode=fake_mode)
    blocks = [b for stack in _stacks(module) for b in stack]
    saved: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        heads = {id(b) for b in blocks}
        for part in {id(m): m for b in blocks for m in b.modules()}.values():
            saved.append((part, type(part)))
            part.__class__ = observer.observed(type(part), is_block=id(part) in heads)
        yield counts, frozenset(part for part, _ in saved)
    finally:
        for part, original in saved:
            part.__class__ = original


def _stacks(module: nn.Module) -> list[list[nn.Module]]:
    stacks: list[list[nn.Module]] = []
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            by_class: dict[type, list[nn.Module]] = {}
            for element in part:
                by_class.setdefault(type(element), []).append(element)
            stacks.extend(found for found in by_class.values() if len(found) > 1)
    return stacks


@dataclass
class _Recording:
    """What the trace of one block has read so far, by (path of the module inside the block, attribute)."""

    paths: dict[int, str]
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Template:
    """A traced block: its nodes, what they took in, and what its trace read."""

    block: nn.Module
    recording: _Recording
    spec: pytree.TreeSpec
    leaves: Sequence[Any]
    leaf_nodes: Sequence[torch.fx.Node | None]
    nodes: Sequence[torch.fx.Node]
    handles: dict[str, tuple[str, str]]
    out_spec: pytree.TreeSpec
    out_leaves: Sequence[Any]
    out_nodes: Sequence[torch.fx.Node | None]
    shape: tuple[tuple[str, type], ...]


class _Observer:
    """Sees attribute reads of the observed modules and calls of the observed blocks."""

    def __init__(self, *, counts: StackCounts, tensors: NamedTensors, fake_mode: Any) -> None:
        self._counts = counts
        self._tensors = tensors
        self._fake_mode = fake_mode
        self._recordings: list[_Recording] = []
        self._templates: dict[type, list[_Template]] = {}
        self._classes: dict[tuple[type, bool], type[nn.Module]] = {}
        self._inside: set[torch.fx.Node] = set()
        self._tokens: dict[str, tuple[nn.Module, str, str]] = {}
        self._stamping = False

    def observed(self, cls: type[nn.Module], *, is_block: bool) -> type[nn.Module]:
        """Return a subclass of `cls` that reports to this observer; it looks the same from outside."""
        known = self._classes.get((cls, is_block))
        if known is None:
            known = self._classes[cls, is_block] = self._make_observed(cls, is_block=is_block)
        return known

    def _make_observed(self, cls: type[nn.Module], *, is_block: bool) -> type[nn.Module]:
        observer = self

        def get_attribute(self: Any, name: str) -> Any:
            value = cls.__getattribute__(self, name)
            return observer._read(self, name, value) if observer._recordings else value

        def get_missing(self: Any, name: str) -> Any:
            try:
                value = cls.__getattr__(self, name)
            except AttributeError:
                observer._read(self, name, _ABSENT)
                raise
            if isinstance(value, torch.Tensor) and not observer._stamping and observer._tensors.is_known(value):
                value = observer._tensors.fake(value)  # read before its block is traced, or never traced by itself
            return observer._read(self, name, value) if observer._recordings else value

        def set_attribute(self: Any, name: str, value: Any) -> None:
            for recording in observer._recordings:
                recording.problems.append(f"sets {type(self).__name__}.{name} while it runs")
            cls.__setattr__(self, name, value)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            tracer = current_tracer()
            if tracer is None:
                return cls.__call__(self, *args, **kwargs)
            return observer._call(self, tracer, args, kwargs, original=cls)

        body: dict[str, Any] = {
            "__getattribute__": get_attribute,
            "__getattr__": get_missing,
            "__setattr__": set_attribute,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        if is_block:
            body["__call__"] = call
        return type(cls.__name__, (cls,), body)

    def _read(self, module: nn.Module, name: str, value: Any) -> Any:
        if name in _TABLES:
            if sys._getframe(2).f_code.co_filename not in _TABLE_READERS:
                for recording in self._recordings:
                    recording.problems.append(f"reads {type(module).__name__}.{name} as a whole")
            return value
        if isinstance(value, LayerHandle):
            value = self._token(module, name, value)
        for recording in self._recordings:
            path = recording.paths.get(id(module))
            if path is not None:
                recording.reads.setdefault((path, name), value)
        return value

    def _token(self, module: nn.Module, name: str, value: LayerHandle) -> LayerHandle:
        token = LayerHandle(f"\x00layer:{id(module):x}:{name}")
        self._tokens[token] = (module, name, str(value))
        return token

    def _call(self, block: nn.Module, tracer: Tracer, args: Any, kwargs: Any, *, original: type[nn.Module]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        with _quick():
            self._stamping = True
            try:
                for template in self._templates.get(type(block), ()):
                    bound = self._admit(template, block, leaves, spec, tracer)
                    if bound is not None:
                        self._counts.stamped += 1
                        return self._stamp(template, block, leaves, bound, tracer)
            finally:
                self._stamping = False
        return self._record(block, tracer, leaves, spec, args, kwargs, original=original)

    def _record(
        self,
        block: nn.Module,
        tracer: Tracer,
        leaves: list[Any],
        spec: pytree.TreeSpec,
        args: Any,
        kwargs: Any,
        *,
        original: type[nn.Module],
    ) -> Any:
        self._tensors.swap(block.modules())
        recording = _Recording(paths={id(m): n for n, m in block.named_modules()})
        last = last_node(tracer.graph)
        self._recordings.append(recording)
        try:
            out = original.__call__(block, *args, **kwargs)
        finally:
            self._recordings.pop()
        self._counts.traced += 1
        nodes = list(nodes_after(tracer.graph, last))
        out_leaves, out_spec = pytree.tree_flatten(out)
        template = _Template(
            block=block,
            recording=recording,
            spec=spec,
            leaves=leaves,
            leaf_nodes=[tracer.node_of(x) if isinstance(x, torch.Tensor) else None for x in leaves],
            nodes=nodes,
            handles={v: (path, name) for (path, name), v in recording.reads.items() if isinstance(v, LayerHandle)},
            out_spec=out_spec,
            out_leaves=out_leaves,
            out_nodes=[tracer.node_of(x) if isinstance(x, torch.Tensor) else None for x in out_leaves],
            shape=_shape_of(block),
        )
        problems = recording.problems + self._problems(template, tracer, pytree.tree_flatten((args, kwargs))[0])
        if problems:
            self._counts.notes.append(f"{type(block).__name__} is traced by itself: it {problems[0]}")
        else:
            self._templates.setdefault(type(block), []).append(template)
        self._inside.update(n for n in nodes if not isinstance(n.meta.get("val"), torch.SymInt))
        if not self._recordings:
            self._resolve_tokens(nodes)
        return out

    def _problems(self, template: _Template, tracer: Tracer, leaves_after: list[Any]) -> list[str]:
        """Say why the template can't be stamped, if so."""
        if len(leaves_after) != len(template.leaves) or any(
            a is not b for a, b in zip(leaves_after, template.leaves, strict=True)
        ):
            return ["changes the containers it is called with"]
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

    def _admit(
        self, template: _Template, block: nn.Module, leaves: list[Any], spec: pytree.TreeSpec, tracer: Tracer
    ) -> dict[torch.fx.Node, torch.fx.Node] | None:
        """Return template node → sibling node for everything the template takes in, or None."""
        if spec != template.spec or _shape_of(block) != template.shape:
            return None
        theirs = {id(m): n for n, m in block.named_modules()}
        matching = Matching(tracer, self._tensors, template.recording.paths, theirs)
        for mine, given in zip(template.leaves, leaves, strict=True):
            if not matching.same(mine, given):
                return None
        modules = dict(block.named_modules())
        for (path, name), value in template.recording.reads.items():
            if isinstance(value, LayerHandle):
                continue
            if not matching.same(value, getattr(modules[path], name, _ABSENT)):
                return None
        return matching.nodes

    def _stamp(
        self,
        template: _Template,
        block: nn.Module,
        leaves: list[Any],
        bound: dict[torch.fx.Node, torch.fx.Node],
        tracer: Tracer,
    ) -> Any:
        modules = dict(block.named_modules()) if template.handles else {}
        handles: dict[str, str] = {}
        for token, (path, name) in template.handles.items():
            handles[token] = getattr(modules[path], name)
        made: list[torch.fx.Node] = []
        for node in template.nodes:
            copy = tracer.graph.node_copy(node, lambda n: bound.get(n, n))
            tokens = copy.meta.pop(
                "piecework_handles", None
            )  # not there yet where the template's own block encloses it
            if template.handles:
                copy.args, copy.kwargs = _replace_strings(tokens or (node.args, node.kwargs), handles, bound)
            bound[node] = copy
            made.append(copy)
        self._inside.update(n for n in made if not isinstance(n.meta.get("val"), torch.SymInt))
        if not self._recordings:
            self._resolve_tokens(made)
        return pytree.tree_unflatten(self._outputs(template, leaves, bound, tracer), template.out_spec)

    def _outputs(
        self, template: _Template, leaves: list[Any], bound: dict[torch.fx.Node, torch.fx.Node], tracer: Tracer
    ) -> list[Any]:
        given = {tracer.node_of(x): x for x in leaves if isinstance(x, torch.Tensor)}
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

    def _resolve_tokens(self, nodes: Sequence[torch.fx.Node]) -> None:
        """Put the layers' real names in place of the tokens that stood for them while their block was traced."""
        if not self._tokens:
            return
        names = {token: name for token, (_, _, name) in self._tokens.items()}
        for node in nodes:
            if any(isinstance(a, str) and a in names for a in pytree.tree_leaves((node.args, node.kwargs))):
                node.meta.setdefault("piecework_handles", (node.args, node.kwargs))
                node.args, node.kwargs = _replace_strings((node.args, node.kwargs), names, {})


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Admit and stamp without the hooks that a trace runs under; none of the model's own code runs meanwhile."""
    profiler = sys.getprofile()
    with plain_tensors():
        if not callable(profiler):  # none, or one that is written in C and not ours
            yield
            return
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(profiler)


def _replace_strings(arguments: Any, names: dict[str, str], bound: dict[torch.fx.Node, torch.fx.Node]) -> Any:
    def replace(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return bound.get(value, value)
        return names.get(value, value) if isinstance(value, str) else value

    return torch.fx.map_arg(torch.fx.node.map_aggregate(arguments, replace), lambda n: n)


def _shape_of(block: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(part)) for name, part in block.named_modules())


def _nodes_of(value: Any, tracer: Tracer) -> Iterator[torch.fx.Node]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            node = tracer.node_of(leaf)
            if node is not None:
                yield node
