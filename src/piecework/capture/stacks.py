"""Find a model's stacks, and have the calls of their blocks stamped (templates.py) while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from piecework.capture.templates import LookedAt, StackCounts, Stamper
from piecework.capture.tensors import NamedTensors


@contextlib.contextmanager
def stamping(
    module: nn.Module, *, tensors: NamedTensors, fake_mode: Any, opaque: frozenset[str], looked_at: LookedAt
) -> Iterator[tuple[StackCounts, frozenset[nn.Module]]]:
    """Inside, calls of the blocks of `module`'s stacks are traced once per structure and stamped for the rest.

    A stack is a ModuleList; its blocks are the elements that share their class with another one.

    Args:
        module: the model.
        tensors: its tensors; they are put in place inside a block when it is traced.
        fake_mode: of the trace.
        opaque: operators at which the graph is cut, beside those that aren't torch's own.
        looked_at: what earlier attempts have found out, added to.

    Yields counts that are kept up to date, and the modules inside blocks. Raises TraceAgain.
    """
    counts = StackCounts()
    stamper = Stamper(counts=counts, tensors=tensors, fake_mode=fake_mode, opaque=opaque, looked_at=looked_at)
    blocks = [b for stack in _stacks(module) for b in stack]
    saved: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        heads = {id(b) for b in blocks}
        for part in {id(m): m for b in blocks for m in b.modules()}.values():
            saved.append((part, type(part)))
            part.__class__ = stamper.observer.observed(type(part), is_block=id(part) in heads)
        yield counts, frozenset(part for part, _ in saved)
    finally:
        for part, original in saved:
            part.__class__ = original
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
