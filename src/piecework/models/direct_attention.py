"""Attention of transformers' models that call torch's `scaled_dot_product_attention` themselves, past the interface.

They don't hand the batch down either, but the cache: it brings the batch along.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from piecework.errors import UnsupportedModelError
from piecework.models.cache_interface import Past
from piecework.models.meta import meta_parameters

_SDPA: Final = "sdpa"

Attend = Callable[..., tuple[Tensor, None]]
"""An attention function as transformers' interface has them."""


def build_with_sdpa(hf_config: PretrainedConfig, *, dtype: torch.dtype, masks: str) -> nn.Module:
    """Build a model for torch's attention whose masks are made by the mask function of the name `masks`."""
    with meta_parameters(), no_init_weights():
        module: Any = AutoModelForCausalLM.from_config(hf_config, attn_implementation=_SDPA, dtype=dtype)
    for part in module.modules():
        if hasattr(part, "layer_idx") and getattr(part, "config", None) is module.config:
            part.config = copy.copy(part.config)  # where its code finds torch's attention asked for, as before
    module.config._attn_implementation = masks
    built: nn.Module = module
    return built


def redirect(module: nn.Module, attend: Attend) -> None:
    """Have those modules of a model that have a place among its layers, a `layer_idx`, attend by `attend`."""
    for part in module.modules():
        if hasattr(part, "layer_idx"):
            original = type(part).forward.__get__(part)
            vars(part)["forward"] = _redirected(part, original, attend)


def _redirected(part: nn.Module, forward: Callable[..., Any], attend: Attend) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        past = next((value for value in (*args, *kwargs.values()) if isinstance(value, Past)), None)
        if past is None:
            raise UnsupportedModelError(
                asked="attention over a paged cache",
                found=f"{type(part).__name__} is given no cache",
                try_="piecework.compile for the module as it is, without the engine",
            )
        with _in_place_of_sdpa(part, past, attend):
            return forward(*args, **kwargs)

    return run


@contextlib.contextmanager
def _in_place_of_sdpa(part: nn.Module, past: Past, attend: Attend) -> Iterator[None]:
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        *_: object,
        scale: float | None = None,
        **__: object,
    ) -> Tensor:
        out = attend(part, query, key, value, attn_mask, scale, batch=past.batch)[0]
        return out.transpose(1, 2)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
