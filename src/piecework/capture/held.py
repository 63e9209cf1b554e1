"""Buffers that a module's forward changes: the loaded model holds them between calls, as the module would.

They are inputs of the graph, and each write to one is a step of the plan. Which ones they are is found by tracing.
"""

from __future__ import annotations

from collections.abc import Iterable

from piecework.capture.request import CaptureRequest
from piecework.capture.tensors import NamedTensors
from piecework.errors import CaptureError


class BuffersChange(Exception):
    """The forward changes buffers that are not held yet: `names`."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        super().__init__(", ".join(sorted(names)))


def require_held(names: Iterable[str], request: CaptureRequest) -> None:
    """Raise BuffersChange where buffers among `names`, which the forward changes, could be held and are not.

    Raises CaptureError where one of them can't be: an argument, a parameter, a buffer that gets another shape.
    """
    changed = set(names)
    buffers = {name for name, _ in request.module.named_buffers()}
    can_be = set() if request.held is None else buffers - set(request.held)
    for name in sorted(changed - can_be - set(request.states)):
        if request.held is not None and name in request.held:
            found, try_ = f"it puts a tensor of another shape or type in place of {name}", "keep its shape and type"
        else:
            found = f"it changes {name}, which outlives the call"
            try_ = "return the new value instead, or change it inside an opaque op and declare it as a state"
        raise CaptureError(asked="a module whose forward only computes its result", found=found, try_=try_)
    if changed:
        raise BuffersChange(frozenset(changed))


def write_back(tensors: NamedTensors, request: CaptureRequest) -> None:
    """Write what the forward has put in place of a held buffer into that buffer, while it is traced."""
    held = set(request.held or ())
    assigned = [(name, value) for name, value in tensors.assigned() if name in held]
    # one may be the value that another had before
    values = [value.clone() if tensors.name_of(value) is not None else value for _, value in assigned]
    for (name, _), value in zip(assigned, values, strict=True):
        buffer = tensors.fake(tensors.by_name[name])
        if value.shape == buffer.shape and value.dtype == buffer.dtype:
            buffer.copy_(value)
            tensors.put_back(name)
