"""What transformers' models are given in place of a mask and of a cache: what a token sees; the rest is attention's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn
from transformers import Cache, masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    sliding_window_overlay,
)

from piecework.errors import UnsupportedModelError
from piecework.models.batch import ForwardBatch

_WINDOW: Final = sliding_window_overlay(1).__code__
_overlay = getattr(masking_utils, "sliding_window_bidirectional_overlay", None)  # not in the first versions
_WINDOW_BOTH_WAYS: Final = None if _overlay is None else _overlay(1).__code__
_CHUNK: Final = chunked_overlay(1, torch.zeros(1)).__code__


@dataclass(frozen=True)
class Sight:
    """What a token sees, in place of a mask: of the tokens up to itself all, or the last `window`, or its chunk's.

    Chunks are `chunk` tokens each, counted from the sequence's first. 0 stands for no window, and no chunks. Where
    sight is not `causal`, a token sees those behind itself as well, less than `window` places away.

    Code that has no attention interface handles its mask like a tensor. `bias`, added to scores, is what such code
    has put into it: [1, H, 1, P], for each head and key.
    """

    window: int = 0
    chunk: int = 0
    causal: bool = True
    bias: Tensor | None = field(default=None, compare=False)

    ndim: ClassVar[int] = 4
    dtype: ClassVar[None] = None

    def to(self, *_: object, **__: object) -> Sight:
        """Return the same."""
        return self

    def __lt__(self, _other: object) -> Sight:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take what is masked for the bias; other functions of torch's don't take a `Sight`."""
        if func in _MASKED_FILLS and len(args) > 1 and isinstance(args[1], Sight) and isinstance(args[0], Tensor):
            return replace(args[1], bias=args[0])
        return NotImplemented


_MASKED_FILLS: Final = (torch.masked_fill, torch.Tensor.masked_fill)


@final
class Past(Cache):  # type: ignore[misc]  # transformers' classes have no types
    """Stands for a cache in a model's forward: new keys and values are what attention takes, the rest is paged.

    Args:
        positions: [1, T] int64, of the new tokens.
        batch: of the forward, for attention that isn't given it and for mixers with recurrent states.
        length: the tokens that it seems to hold after this forward, new ones included; 0: these alone.

    Attributes:
        follower: while a module attends by itself, makes of its new keys and values what stands for all.
        biased: whether such a module has added biases by keys' positions to its scores.
    """

    def __init__(self, positions: Tensor, batch: ForwardBatch | None = None, length: int = 0) -> None:
        super().__init__(layers=[])
        self.length = length
        self.biased = False
        self.follower: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self._batch = batch
        self._positions = positions

    @property
    def batch(self) -> ForwardBatch:
        """The forward's batch, which a model that caches has."""
        assert self._batch is not None
        return self._batch

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return the new keys and values, or what stands for all of them."""
        return (key_states, value_states) if self.follower is None else self.follower(key_states, value_states)

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Return 0, or how many tokens there seem to be before the new ones.

        Of a layer, return what its new tokens' places are to be shifted by, [T], to become their positions.
        """
        if self.length:
            return self.length - self._positions.shape[-1]
        if layer_idx is None:
            return 0
        positions = self._positions.view(-1)
        return positions - torch.arange(positions.shape[0], device=positions.device)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys there are, and where they begin; nobody counts them."""
        return self.length or query_length, 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """Raise UnsupportedModelError: of mixers with recurrent states only those come here that aren't reached."""
        raise _kept(layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """Raise UnsupportedModelError, as `get_conv_state` does."""
        raise _kept(layer_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *_: object, **__: object) -> Any:
        """Raise UnsupportedModelError, as `get_conv_state` does."""
        raise _kept(layer_idx)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *_: object, **__: object) -> Any:
        """Raise UnsupportedModelError, as `get_conv_state` does."""
        raise _kept(layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> Any:
        """Raise UnsupportedModelError, as `get_conv_state` does."""
        raise _kept(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return where queries begin."""
        return 0


def cache_arguments(module: nn.Module, past: Past) -> dict[str, Any]:
    """Return the arguments by which a model's forward takes a cache and returns none."""
    names = inspect.signature(type(module).forward).parameters
    return {"cache_params" if "cache_params" in names else "past_key_values": past, "use_cache": False}


def _kept(layer: int | None) -> UnsupportedModelError:
    return UnsupportedModelError(
        asked="a language model on the engine",
        found=f"layer {layer} keeps a recurrent state of a function that piecework has no operator for",
        try_="piecework.compile for the module as it is, without the engine",
    )


def sight(*, mask_function: Callable[..., Any], **_ignored: object) -> Sight:
    """Serve as transformers' mask function: return what a token sees by a rule that transformers has a name for.

    Raises UnsupportedModelError for any other rule.
    """
    window = chunk = 0
    causal = False
    for rule in _rules(mask_function):
        held = _held(rule)
        if rule.__code__ is _WINDOW:
            window, causal = int(held["sliding_window"]), True
        elif rule.__code__ is _WINDOW_BOTH_WAYS:
            window = int(held["sliding_window"]) + 1
        elif rule.__code__ is _CHUNK:
            chunk = int(held["chunk_size"])
        elif rule is causal_mask_function:
            causal = True
        elif rule is not bidirectional_mask_function:
            raise UnsupportedModelError(
                asked="attention by transformers' interface",
                found=f"tokens see each other by the rule {rule.__qualname__}, which isn't causal, bidirectional, a "
                "window or chunks",
                try_="piecework.compile for the module as it is, without the engine",
            )
    return Sight(window, chunk, causal)


def _rules(mask_function: Callable[..., Any]) -> list[Any]:
    """Return the rules that a mask function holds together; it is one itself where it holds none."""
    inner = _held(mask_function).get("mask_functions")
    return [mask_function] if inner is None else [rule for function in inner for rule in _rules(function)]


def _held(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}
