"""Which modules of a model attend or keep a state, and of which shapes: seen in a forward without values."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from piecework.capture.request import TensorInput
from piecework.errors import UnsupportedModelError
from piecework.foundation.torch_private import SymbolicSession, grouped_products_of_any_type
from piecework.models.batch import BLOCK_SIZE, STATE_SLOTS, ForwardBatch
from piecework.models.cache_interface import Past, Sight, cache_arguments

KV_CACHE: Final = "kv_cache"
CONV_STATE: Final = "conv_state"
RECURRENT_STATE: Final = "recurrent_state"
TRIAL: Final = "piecework, on trial"
"""The name of attention during the trial."""
_NOT_KNOWN: Final = ("position_bias", "sinks", "block_indices")
"""What some modules give to attention that isn't known here: biases for each query, sinks and keys by token."""
UNKNOWN_MASK: Final = "attends with a mask that transformers' mask interface didn't make"


def try_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight | Tensor | None,
    *_: object,
    **others: object,
) -> tuple[Tensor, None]:
    """Take the place of `paged_attention` in a forward without values, and give the module its cache."""
    if key.shape[0] != 1 or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        shapes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise unreached(module, f"attends with queries, keys and values of shapes {shapes}")
    if not isinstance(attention_mask, Sight):
        raise unreached(module, UNKNOWN_MASK)
    unknown = [name for name in _NOT_KNOWN if others.get(name) is not None]
    if unknown:
        raise unreached(module, f"attends with {unknown[0]}")
    if not attention_mask.causal:
        raise unreached(module, "attends to tokens that come later")
    if hasattr(module, KV_CACHE):
        raise unreached(module, "attends twice in one forward")
    entry = (key.shape[1], key.shape[3])
    module.register_buffer(KV_CACHE, key.new_empty((2, 1, BLOCK_SIZE, *entry)), persistent=False)
    return query.transpose(1, 2).contiguous(), None


def give_states(module: nn.Module, *, cache_length: int = 0) -> dict[str, TensorInput]:
    """Give every module that attends or keeps a state its buffers on the meta device; return these by qualified name.

    Which modules these are, and the shapes, is seen in a forward of two tokens without values. Its cache
    seems to hold `cache_length` tokens.
    """
    given = [*module.named_parameters(), *module.named_buffers()]
    with torch.no_grad(), grouped_products_of_any_type(), SymbolicSession().fake_mode:
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in given}
        past = _first_two(cache_length)
        arguments = _two_tokens(module, past)
        uses = _Uses(arguments["position_ids"])
        with _siblings_left_out(module) as twins, uses if cache_length else contextlib.nullcontext():
            output = torch.func.functional_call(module, tensors, kwargs=arguments)
    if cache_length and not (uses.found or past.biased):
        raise unreached(module, "takes positions from its cache's length, and not those that it is given")
    if output.logits.shape[:2] != (1, 1):
        raise unreached(module, "gives logits of tokens that weren't asked for in `logits_to_keep`")
    for block, first in twins:
        for part, like in zip(block.modules(), first.modules(), strict=True):
            for name in _SIZES.keys() & vars(like)["_buffers"].keys():
                part.register_buffer(name, vars(like)["_buffers"][name], persistent=False)
    states = {}
    for name, part in module.named_modules():
        for buffer, (axis, size) in _SIZES.items():
            fake = vars(part)["_buffers"].get(buffer)
            if fake is not None:
                part.register_buffer(buffer, torch.empty(fake.shape, dtype=fake.dtype, device="meta"), persistent=False)
                qualified, dtype = f"{name}.{buffer}", str(fake.dtype).removeprefix("torch.")
                shape = (*fake.shape[:axis], size, *fake.shape[axis + 1 :])
                states[qualified] = TensorInput(qualified, shape, dtype)
    return states


_SIZES: Final = {KV_CACHE: (1, "blocks"), CONV_STATE: (0, STATE_SLOTS), RECURRENT_STATE: (0, STATE_SLOTS)}
"""States, by the axis of theirs that has a size of the engine's, and that size."""


def _first_two(cache_length: int) -> Past:
    """Return the cache of a forward of one sequence that begins with two tokens."""
    tokens, one = torch.zeros((1, 2), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return Past(tokens, ForwardBatch(tokens[0], one[None], one, tokens[0], 0, 2, one), cache_length)


def _two_tokens(module: nn.Module, past: Past) -> dict[str, Any]:
    """Return the arguments of that forward."""
    tokens, positions, one = (torch.zeros(shape, dtype=torch.int64) for shape in ((1, 2), (1, 2), (1,)))
    arguments = {"input_ids": tokens, "position_ids": positions, "logits_to_keep": one, "batch": past.batch}
    return arguments | cache_arguments(module, past)


class _Uses(TorchFunctionMode):
    """While active, sees whether one of torch's functions is given a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.found = False
        self._tensor = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do a call."""
        kwargs = kwargs or {}
        self.found = self.found or any(value is self._tensor for value in (*args, *kwargs.values()))
        return func(*args, **kwargs)


def unreached(module: nn.Module, why: str, *, asked: str = "a language model on the engine") -> UnsupportedModelError:
    """Return the error for a module whose attention or state can't be kept for many, with the place of its code."""
    code = inspect.unwrap(type(module).forward).__code__
    return UnsupportedModelError(
        asked=asked,
        found=f"{type(module).__name__} ({code.co_filename}:{code.co_firstlineno}) {why}",
        try_="piecework.compile for the module as it is, without the engine",
    )


@contextlib.contextmanager
def _siblings_left_out(module: nn.Module) -> Iterator[list[tuple[nn.Module, nn.Module]]]:
    """Inside, of blocks of a stack that differ in nothing but weights' values one runs, and gives its result for all.

    Gives the others, each with the one that runs.
    """
    runs: dict[Hashable, nn.Module] = {}
    results: dict[nn.Module, Any] = {}
    twins: list[tuple[nn.Module, nn.Module]] = []
    blocks = [b for stack in module.modules() if isinstance(stack, nn.ModuleList) for b in stack]

    def keep(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            results[block] = forward(*args, **kwargs)
            return results[block]

        return run

    for block in blocks:
        first = runs.setdefault(_structure(block), block)
        if first is not block:
            twins.append((block, first))
    changed = {first: keep(first, first.forward) for _, first in twins}
    changed |= {block: lambda *_, first=first, **__: results[first] for block, first in twins}
    for block, forward in changed.items():
        vars(block)["forward"] = forward
    try:
        yield twins
    finally:
        for block in changed:
            del vars(block)["forward"]


def _structure(block: nn.Module) -> Hashable:
    """Return what makes two blocks do the same with other weights: classes, shapes, and numbers but their place."""
    return tuple(
        (
            *(name, type(part)),
            tuple((n, None if p is None else tuple(p.shape)) for n, p in vars(part)["_parameters"].items()),
            tuple((n, v) for n, v in vars(part).items() if type(v) in {bool, int, float, str} and n != "layer_idx"),
        )
        for name, part in block.named_modules()
    )
