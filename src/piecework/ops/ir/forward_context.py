"""The forward context: what an operator that gets a layer's name finds under it, and what it knows of the batch.

An engine makes one `ForwardContext` with its layers' states, and runs each forward inside `context.running(batch)`.
Which context runs is told by a ContextVar, so that threads and tasks that run other engines never meet.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, final

from torch import Tensor

from piecework.errors import OpError
from piecework.ops.ir.layer import LayerName, resolve

State = TypeVar("State")


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward, grouped by sequence: S sequences, T tokens, decode sequences first.

    Attributes:
        slot_mapping: [T] int64, where each new token's key and value go: block * block size + offset.
        block_tables: [S, W] int64, the blocks of each sequence, padded with any valid block.
        seq_lens: [S] int64, tokens of each sequence after this forward.
        query_start: [S + 1] int64, prefix sums of the new tokens per sequence.
        num_decode_tokens: how many leading sequences have exactly one new token and are handled together.
        state_slots: [S] int64, the slot of each sequence in recurrent states; None in models without them.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    num_decode_tokens: int
    state_slots: Tensor | None = None


@final
class ForwardContext:
    """One engine's layers by name, and while it runs, the batch.

    Args:
        layers: each layer's state under its LayerName, name or index. What is added to it later is not seen.
    """

    __slots__ = ("_batch", "_layers")

    def __init__(self, layers: Mapping[Any, object]) -> None:
        self._layers: dict[Any, Any] = {_plain(key): state for key, state in layers.items()}
        self._batch: Any = None

    @contextlib.contextmanager
    def running(self, batch: Any = None) -> Iterator[ForwardContext]:
        """Make this the running context of the thread or async task; yields it with `batch`.

        The batch is a `Batch`, or whatever an engine's own operators want. Inside another context's block this one
        runs until its own block ends.
        """
        bound = ForwardContext.__new__(ForwardContext)
        bound._layers = self._layers
        bound._batch = batch
        token = _RUNNING.set(bound)
        try:
            yield bound
        finally:
            _RUNNING.reset(token)

    @property
    def batch(self) -> Any:
        """What the running forward was given as its batch. Raises OpError where there is none."""
        if self._batch is not None:
            return self._batch
        running = _RUNNING.get(None)
        if running is not None and running._layers is self._layers and running._batch is not None:
            return running._batch
        raise OpError(
            asked="the batch of the forward",
            found="a forward context that runs without one, or does not run",
            try_="with context.running(Batch(...)): model(...)",
        )

    def layer(self, key: LayerName | str | int) -> Any:
        """Return the state of a layer. Raises OpError, with names that are near, where there is none of that name."""
        try:
            return self._layers[key if isinstance(key, (str, int)) else resolve(key)]
        except KeyError:
            raise self._unknown(_plain(key)) from None

    def _unknown(self, key: str | int) -> OpError:
        names = [str(n) for n in self._layers]
        near = difflib.get_close_matches(str(key), names, n=3)
        near += [n for n in names if isinstance(key, int) and str(key) in n.split(".")][: 3 - len(near)]
        few = near or names[:3]
        return OpError(
            asked=f"the state of layer {key!r}",
            found=f"a forward context of {len(names)} layers without it",
            try_=("one of its names, such as " + ", ".join(few)) if few else "a context that was given layers",
        )


_RUNNING: ContextVar[ForwardContext] = ContextVar("piecework_forward_context")


def running_context() -> ForwardContext:
    """Return the context that runs in this thread or async task. Raises OpError outside of one."""
    try:
        return _RUNNING.get()
    except LookupError:
        raise OpError(
            asked="the forward context that an operator finds its layer in",
            found="no context running in this thread or task",
            try_="with ForwardContext(layers).running(batch): model(...)",
        ) from None


def has_running_context() -> bool:
    """Whether a context runs in this thread or async task."""
    return _RUNNING.get(None) is not None


def layer_state(layer: LayerName | str | int, kind: type[State]) -> State:
    """Return the running context's state of a layer, which must be a `kind`.

    Raises OpError where no context runs, where it has no such layer, and where the layer has another kind of state.
    """
    state = running_context().layer(layer)
    if not isinstance(state, kind):
        raise OpError(
            asked=f"the {kind.__name__} of layer {_plain(layer)!r}",
            found=f"a {type(state).__name__} under that name",
            try_="the name of a layer of that kind, or another operator",
        )
    return state


def _plain(key: Any) -> str | int:
    """Return the name or index that a key stands for."""
    return key if isinstance(key, int) else resolve(key)
