"""Which modules of a model attend, and to caches of which heads: seen in a forward without values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from piecework.capture.request import TensorInput
from piecework.errors import UnsupportedModelError
from piecework.foundation.torch_private import SymbolicSession, grouped_products_of_any_type
from piecework.models.batch import BLOCK_SIZE
from piecework.models.cache_interface import Past, Sight

KV_CACHE: Final = "kv_cache"
TRIAL: Final = "piecework, on trial"
"""The name of attention during the trial."""
UNKNOWN_MASK: Final = "attends with a mask that transformers' mask interface didn't make"


def try_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight | Tensor | None,
    *_: object,
    **__: object,
) -> tuple[Tensor, None]:
    """Take the place of `paged_attention` in a forward without values, and give the module its cache."""
    if key.shape[0] != 1 or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        shapes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise unreached(module, f"attends with queries, keys and values of shapes {shapes}")
    if not isinstance(attention_mask, Sight):
        raise unreached(module, UNKNOWN_MASK)
    if not attention_mask.causal:
        raise unreached(module, "attends to tokens that come later")
    if hasattr(module, KV_CACHE):
        raise unreached(module, "attends twice in one forward")
    entry = (key.shape[1], key.shape[3])
    module.register_buffer(KV_CACHE, key.new_empty((2, 1, BLOCK_SIZE, *entry)), persistent=False)
    return query.transpose(1, 2).contiguous(), None


def give_caches(module: nn.Module) -> dict[str, TensorInput]:
    """Give every module that attends a `kv_cache` on the meta device; return them by qualified name.

    Which these are, and the heads of each, is seen in a forward of two tokens without values.
    """
    given = [*module.named_parameters(), *module.named_buffers()]
    with torch.no_grad(), grouped_products_of_any_type(), SymbolicSession().fake_mode:
        tokens = torch.zeros((1, 2), dtype=torch.int64)
        inputs = {"input_ids": tokens, "position_ids": tokens, "past_key_values": Past(tokens), "use_cache": False}
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in given}
        with _siblings_left_out(module) as twins:
            torch.func.functional_call(module, tensors, kwargs=inputs)
    for block, first in twins:
        for part, like in zip(block.modules(), first.modules(), strict=True):
            part.register_buffer(KV_CACHE, vars(like)["_buffers"].get(KV_CACHE), persistent=False)
    states = {}
    for name, part in module.named_modules():
        fake = vars(part)["_buffers"].get(KV_CACHE)
        if fake is not None:
            part.register_buffer(KV_CACHE, torch.empty(fake.shape, dtype=fake.dtype, device="meta"), persistent=False)
            qualified, dtype = f"{name}.{KV_CACHE}", str(fake.dtype).removeprefix("torch.")
            states[qualified] = TensorInput(qualified, (2, "blocks", *fake.shape[2:]), dtype)
    return states


def unreached(module: nn.Module, why: str, *, asked: str = "attention over a paged cache") -> UnsupportedModelError:
    """Return the error for a module that attends in a way that isn't ours to take over, with the place of its code."""
    code = type(module).forward.__code__
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
