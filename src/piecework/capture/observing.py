"""See which attributes of a stack's modules are read while a block is traced, and hand out tokens for layers' names."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from piecework.capture.recording import PLAIN, WHOLE, Key, Origin, Recording
from piecework.capture.tensors import NamedTensors
from piecework.capture.tokens import Subject, look
from piecework.foundation.torch_private import Tracer, current_tracer
from piecework.ops.ir.layer import IS_OBJECT, LayerName

ABSENT: Final = object()
"""What a module has under a name that it doesn't have."""

_TABLE_READERS = frozenset(sys.modules[c.__module__].__file__ for c in (nn.Module, nn.Sequential, NamedTensors))
"""Files that read `_modules` and the like whole; names and types in it are compared for every sibling anyway."""
_TABLES = frozenset({"__dict__", "_parameters", "_buffers", "_modules"})
_CONTAINERS = (list, tuple, dict)

OnCall = Callable[[nn.Module, Tracer, Any, Any, type[nn.Module]], Any]


class Observer:
    """Makes classes whose instances report what is read of them, as long as there are recordings.

    Args:
        tensors: the model's tensors.
        on_call: runs a call of a block in a trace: the block, the trace, args, kwargs, the block's own class.
    """

    def __init__(self, *, tensors: NamedTensors, on_call: OnCall) -> None:
        self.recordings: list[Recording] = []
        self._idle = True  # nothing is to be recorded
        self._quiet = False
        self._tensors = tensors
        self._on_call = on_call
        self._classes: dict[tuple[type, bool], type[nn.Module]] = {}
        self._subjects: dict[Any, Subject] = {}
        self._containers: dict[tuple[int, str], _Container] = {}
        self._changed = False
        self._in_property = 0

    @contextlib.contextmanager
    def record(self, recording: Recording) -> Iterator[None]:
        """Inside, `recording` gets what is read."""
        containers = self._containers
        self.recordings.append(recording)
        self._idle = False
        self._containers = {}
        try:
            yield
        finally:
            self._changed = any(c.changed() for c in self._containers.values())
            self._containers = containers
            self.recordings.pop()
            self._idle = not self.recordings
            if self._idle:
                self._subjects.clear()

    def changed_containers(self) -> bool:
        """Whether the block that was recorded last has changed a list or dict that holds layers' names."""
        return self._changed

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, nothing is recorded, and attributes have their real values."""
        self._quiet = self._idle = True
        try:
            yield
        finally:
            self._quiet, self._idle = False, not self.recordings

    def note(self, module: nn.Module, attribute: str, value: Any, *, handed_on: AbstractSet[int]) -> None:
        """Note for all recordings a read that didn't happen because a block was stamped.

        All of the value counts as looked at, but for the leaves `handed_on` (see Key).
        """
        for recording in self.recordings:
            path = recording.paths.get(id(module))
            if path is not None:
                recording.reads.setdefault((path, attribute), value)
                for key in [Key(path, attribute), *(k for k in recording.open_keys if k[:2] == (path, attribute))]:
                    if key.leaf not in handed_on:
                        recording.looked_at.setdefault(key, "")

    def argument_token(self, block: nn.Module, leaf: int, value: Any, recording: Recording) -> Any:
        """Return a token for an argument of a block's call; `leaf` is its number among the arguments' leaves."""
        subject = Subject(value)
        subject.add(Origin(id(block), "", leaf), [(recording, Key("", "", leaf))])
        return subject.token()

    def observed(self, cls: type[nn.Module], *, is_block: bool) -> type[nn.Module]:
        """Return a subclass of `cls` that reports to this observer; it looks the same from outside."""
        known = self._classes.get((cls, is_block))
        if known is None:
            known = self._classes[cls, is_block] = self._make_observed(cls, is_block=is_block)
        return known

    def _make_observed(self, cls: type[nn.Module], *, is_block: bool) -> type[nn.Module]:
        observer = self
        properties = _properties(cls)

        def get_attribute(self: Any, name: str) -> Any:
            if observer._idle:
                return cls.__getattribute__(self, name)
            if name in properties:
                return observer._read_property(self, name, cls)
            return observer._read(self, name, cls.__getattribute__(self, name))

        def get_missing(self: Any, name: str) -> Any:
            try:
                value = cls.__getattr__(self, name)
            except AttributeError:
                if not observer._idle:
                    observer._read(self, name, ABSENT)
                raise
            value = observer._as_fake(value)
            return value if observer._idle else observer._read(self, name, value)

        def set_attribute(self: Any, name: str, value: Any) -> None:
            for recording in observer.recordings:
                recording.problems.append(f"sets {type(self).__name__}.{name} while it runs")
            cls.__setattr__(self, name, look(value))

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            tracer = current_tracer()
            if tracer is None:
                return cls.__call__(self, *args, **kwargs)
            return observer._on_call(self, tracer, args, kwargs, cls)

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

    def _as_fake(self, value: Any) -> Any:
        """Return what stands for a tensor that is read before its block is traced, or is never traced by itself."""
        known = isinstance(value, torch.Tensor) and not self._quiet and self._tensors.is_known(value)
        return self._tensors.fake(value) if known else value

    def _read_property(self, module: nn.Module, name: str, cls: type[nn.Module]) -> Any:
        """Read a property: of a plain one it is the value that counts, not what it is computed from."""
        before = [(r, len(r.reads), len(r.looked_at)) for r in self.recordings]
        self._in_property += 1
        try:
            value = cls.__getattribute__(module, name)
        finally:
            self._in_property -= 1
        if type(value) in PLAIN or isinstance(value, (bool, float, type(None))):
            for recording, num_reads, num_looks in before:
                _cut(recording.reads, num_reads)
                _cut(recording.looked_at, num_looks)
        return self._read(module, name, value)

    def _read(self, module: nn.Module, name: str, value: Any) -> Any:
        if name in _TABLES:
            if sys._getframe(2).f_code.co_filename not in _TABLE_READERS:
                for recording in self.recordings:
                    recording.problems.append(f"reads {type(module).__name__}.{name} as a whole")
            return value
        readers: list[tuple[Recording, str]] = []
        is_open = IS_OBJECT and type(value) is LayerName
        for recording in self.recordings:
            path = recording.paths.get(id(module))
            if path is not None:
                recording.reads.setdefault((path, name), value)
                readers.append((recording, path))
                is_open = is_open or (path, name) in recording.open_reads
        if not is_open or not readers:
            return value
        if self._in_property:
            for recording, path in readers:
                for key in [Key(path, name), *(k for k in recording.open_keys if k[:2] == (path, name))]:
                    recording.looked_at.setdefault(key, "")
            return value
        if isinstance(value, _CONTAINERS):
            return self._container(module, name, value, readers)
        return self._token(module, name, WHOLE, value, readers) if type(value) in PLAIN else value

    def _token(self, module: nn.Module, name: str, leaf: int, value: Any, readers: list[tuple[Recording, str]]) -> Any:
        # one object read from two attributes is one token, so that `is` gives the same answers
        place = id(value) if IS_OBJECT and type(value) is LayerName else (id(module), name, leaf)
        subject = self._subjects.get(place)
        if subject is None or subject.value != value:
            subject = self._subjects[place] = Subject(value)
        subject.add(Origin(id(module), name, leaf), [(r, Key(path, name, leaf)) for r, path in readers])
        return subject.token()

    def _container(self, module: nn.Module, name: str, value: Any, readers: list[tuple[Recording, str]]) -> Any:
        """Return a tuple, list or dict with tokens in the places that are open; for a list it is a copy."""
        known = self._containers.get((id(module), name))
        if known is None or known.original is not value:
            leaves, spec = pytree.tree_flatten(value)
            for index, leaf in enumerate(leaves):
                wanting = [(r, path) for r, path in readers if Key(path, name, index) in r.open_keys]
                if wanting:
                    leaves[index] = self._token(module, name, index, leaf, wanting)
            known = self._containers[id(module), name] = _Container(value, pytree.tree_unflatten(leaves, spec), leaves)
        return known.made


@dataclass(frozen=True)
class _Container:
    """A tuple, list or dict of a module, and what is read in its place."""

    original: Any
    made: Any
    leaves: list[Any]

    def changed(self) -> bool:
        """Whether the code has changed what it read."""
        leaves = pytree.tree_leaves(self.made)
        return len(leaves) != len(self.leaves) or any(a is not b for a, b in zip(leaves, self.leaves, strict=True))


def _properties(cls: type) -> frozenset[str]:
    return frozenset(n for c in cls.__mro__ for n, v in vars(c).items() if isinstance(v, property))


def _cut(table: dict[Any, Any], length: int) -> None:
    """Take the newest entries out until `length` are left."""
    while len(table) > length:
        table.popitem()
