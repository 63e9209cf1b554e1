"""Attention of transformers' models that compute it themselves, past the interface.

Some call torch's `scaled_dot_product_attention`, others write it out: scores of queries and keys, a mask, a softmax,
values weighed. Their forward runs as it is. Their cache seems to hold as many tokens as a sequence may have; what they
do with its keys and values, and with scores, is followed from call to call, and where they weigh the values, the
paged attention comes in. What they computed in vain is in no result, and so in no graph. They don't hand the batch
down either, but the cache: it brings the batch along.

Shape suffixes: T new tokens, H query heads, K key/value heads, D head dim, P tokens that a cache seems to hold.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from piecework.errors import UnsupportedModelError
from piecework.models.cache_interface import Past, Sight
from piecework.models.meta import meta_parameters
from piecework.models.trial import unreached

_IMPLEMENTATIONS: Final = ("sdpa", "eager")
_INTERFACE: Final = "ALL_ATTENTION_FUNCTIONS"
"""What the code of modules that attend by the interface finds its functions in."""

Attend = Callable[..., tuple[Tensor, None]]
"""An attention function as transformers' interface has them."""


def build_by_name(hf_config: PretrainedConfig, *, dtype: torch.dtype, masks: str) -> nn.Module:
    """Build a model that knows its own attentions only, by their names; masks are made by the function named `masks`.

    Raises KeyError where it knows neither torch's attention nor one that is written out.
    """
    module = _built(hf_config, dtype=dtype)
    for part in module.modules():
        if hasattr(part, "layer_idx") and getattr(part, "config", None) is module.config:
            part.config = copy.copy(part.config)  # where its code finds its attention asked for, as before
    module.config._attn_implementation = masks
    built: nn.Module = module
    return built


def _built(hf_config: PretrainedConfig, *, dtype: torch.dtype) -> Any:
    refused: Exception = KeyError("attention")
    for name in _IMPLEMENTATIONS:
        try:
            with meta_parameters(), no_init_weights():
                return AutoModelForCausalLM.from_config(hf_config, attn_implementation=name, dtype=dtype)
        except (KeyError, ValueError) as error:  # the name is none of its own
            refused = error
    raise refused


def direct_parts(module: nn.Module) -> list[nn.Module]:
    """Return those modules that have a place among a model's layers, a `layer_idx`, and attend past the interface.

    These are the innermost with such a place, in whose code the interface doesn't occur. Mixers with recurrent states,
    whose forward has been replaced, are none of them.
    """
    return [
        part
        for part in module.modules()
        if hasattr(part, "layer_idx")
        and not any(hasattr(inner, "layer_idx") for inner in part.modules() if inner is not part)
        and "forward" not in vars(part)
        and _INTERFACE not in inspect.unwrap(type(part).forward).__globals__
    ]


def redirect(parts: Sequence[nn.Module], attend: Attend) -> None:
    """Have modules of a model attend by `attend`."""
    for part in parts:
        vars(part)["forward"] = _redirected(part, type(part).forward.__get__(part), attend)


def _redirected(part: nn.Module, forward: Callable[..., Any], attend: Attend) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        past = next((value for value in (*args, *kwargs.values()) if isinstance(value, Past)), None)
        if past is None:
            raise UnsupportedModelError(
                asked="attention over a paged cache",
                found=f"{type(part).__name__} is given no cache",
                try_="piecework.compile for the module as it is, without the engine",
            )
        with _followed(part, past, attend):
            return forward(*args, **kwargs)

    return run


@contextlib.contextmanager
def _followed(part: nn.Module, past: Past, attend: Attend) -> Iterator[None]:
    """Inside, what a module does with what it gets of the cache is followed."""
    following = _Following(part, past, attend)
    past.follower = following.cached
    try:
        with following:
            yield
    finally:
        past.follower = None


class _Cached(NamedTuple):
    """New keys or values [1, K, T, D], for which a tensor of the whole cache stands."""

    new: Tensor
    are_keys: bool


@dataclass(frozen=True)
class _Scores:
    """What was done to the scores of queries [.., H, T, D] and keys: scaled, a bias added, masked, softened."""

    query: Tensor
    new_keys: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    sight: Sight | None = None
    softened: bool = False


_Role = _Cached | _Scores


class _Following(TorchFunctionMode):
    """While active, knows which tensors are the cache's keys and values, and which are scores.

    Args:
        part: the module that attends.
        past: its cache.
        attend: the attention that comes in.
    """

    def __init__(self, part: nn.Module, past: Past, attend: Attend) -> None:
        super().__init__()
        self._part, self._past, self._attend = part, past, attend
        self._roles: dict[int, tuple[Tensor, _Role]] = {}  # with the tensor, so that its id stays its own
        self._lost = ""

    def cached(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands for all keys and all values of the cache, [1, K, P, D] both, where new ones came in."""
        batch, heads, _, dim = key.shape
        shape = (batch, heads, self._past.length, dim)
        keys, values = (self._known(new.new_empty(shape), _Cached(new, new is key)) for new in (key, value))
        return keys, values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do a call, and say what its result is; or attend."""
        kwargs = kwargs or {}
        given = [self._role(value) for value in (*args, *kwargs.values())]
        name = getattr(func, "__name__", "")
        if not any(given):
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attend_at_once(*args, **kwargs)
        if name in _PRODUCTS:
            return self._product(func, args, kwargs)
        if name in _SAME and given[0] is not None:
            return self._known(func(*args, **kwargs), given[0])
        if isinstance(given[0], _Scores) and name in _CHANGES:
            changed = _CHANGES[name](given[0], *args[1:], **kwargs)
            if changed is not None:
                seen = any(isinstance(value, Sight) for value in (*args, *kwargs.values()))
                return self._known(args[0].view(args[0].shape) if seen else func(*args, **kwargs), changed)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._lost = name
        return result

    def _product(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Multiply matrices: queries and keys become scores, scores and values the result."""
        factors = [v for name, v in kwargs.items() if name in {"batch1", "batch2", "mat2", "other"}]
        left, right = [*args, *factors][-2:]
        weights, cached = self._role(left), self._role(right)
        if isinstance(weights, _Scores) and isinstance(cached, _Cached) and weights.softened and not cached.are_keys:
            shape = (*left.shape[:-1], right.shape[-1])
            out = self._attended(weights, cached.new)
            return out.reshape(shape)
        result = func(*args, **kwargs)
        if weights is None and isinstance(cached, _Cached) and cached.are_keys:
            scores = _Scores(left, cached.new)
            if func.__name__ == "baddbmm":
                scores = _biased(scores, args[0], kwargs.get("alpha", 1), kwargs.get("beta", 1))
            return self._known(result, scores)
        self._lost = func.__name__
        return result

    def _attend_at_once(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: object,
        scale: float | None = None, **__: object,
    ) -> Tensor:  # fmt: skip
        """Take the place of torch's function."""
        keys, values = self._role(key), self._role(value)
        if not (isinstance(keys, _Cached) and isinstance(values, _Cached) and isinstance(attn_mask, Sight)):
            raise unreached(self._part, "attends to other keys than its cache's, or with a mask of its own")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self._attended(_Scores(query, keys.new, scale, sight=attn_mask), values.new)

    def _attended(self, scores: _Scores, values: Tensor) -> Tensor:
        """Return what the paged attention gives, [1, H, T, D]."""
        if scores.sight is None or self._lost:
            why = (
                f"does with keys or scores what can't be followed ({self._lost})"
                if self._lost
                else "attends without transformers' mask"
            )
            raise unreached(self._part, why)
        query, sight = scores.query, scores.sight
        heads = math.prod(query.shape[:-2])
        queries = query.reshape(1, heads, *query.shape[-2:]).to(values.dtype)
        bias = self._by_key(scores, sight.bias, heads=heads)
        self._past.biased |= bias is not None
        out = self._attend(
            self._part, queries, scores.new_keys, values, sight, scores.scale, batch=self._past.batch, key_bias=bias
        )
        return out[0].transpose(1, 2)

    def _by_key(self, scores: _Scores, masks_bias: Tensor | None, *, heads: int) -> Tensor | None:
        """Return what is added to scores as [H, P]; raises UnsupportedModelError where queries differ in it."""
        biases = [bias for bias in (scores.bias, masks_bias) if bias is not None]
        for bias in biases:
            if bias.shape[-2:] != (1, self._past.length) or math.prod(bias.shape) != heads * self._past.length:
                raise unreached(self._part, f"adds to its scores what has the shape {list(bias.shape)}")
        made = [bias.reshape(heads, self._past.length) for bias in biases]
        return sum(made[1:], made[0]) if made else None

    def _known(self, tensor: Tensor, role: _Role) -> Tensor:
        self._roles[id(tensor)] = (tensor, role)
        return tensor

    def _role(self, value: object) -> _Role | None:
        known = self._roles.get(id(value))
        return None if known is None else known[1]


_PRODUCTS: Final = frozenset({"matmul", "__matmul__", "bmm", "baddbmm"})
_SAME: Final = frozenset(
    {
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "to",
        "float",
        "type_as",
        "expand",
        "unsqueeze",
        "flatten",
    }
    | {"squeeze", "dropout", "view_as", "type"}
)
"""Calls whose result is the same keys, values or scores, in another shape or type."""


def _added(scores: _Scores, other: object, **_: object) -> _Scores | None:
    if isinstance(other, Sight):
        return replace(scores, sight=other)
    return _biased(scores, other, 1, 1) if isinstance(other, Tensor) else None


def _biased(scores: _Scores, bias: Tensor, alpha: float, beta: float) -> _Scores:
    bias = bias if beta == 1 else bias * beta
    return replace(scores, scale=scores.scale * alpha, bias=bias if scores.bias is None else scores.bias + bias)


def _scaled(scores: _Scores, factor: object) -> _Scores | None:
    if not isinstance(factor, (int, float)):
        return None
    return replace(scores, scale=scores.scale * factor, bias=None if scores.bias is None else scores.bias * factor)


def _divided(scores: _Scores, divisor: object) -> _Scores | None:
    return _scaled(scores, 1 / divisor) if isinstance(divisor, (int, float)) else None


def _masked(scores: _Scores, mask: object, *_: object, **__: object) -> _Scores | None:
    return replace(scores, sight=mask) if isinstance(mask, Sight) else None


def _softened(scores: _Scores, *_: object, **__: object) -> _Scores:
    return replace(scores, softened=True)


_CHANGES: Final[Mapping[str, Callable[..., _Scores | None]]] = {
    **dict.fromkeys(("add", "__add__", "__iadd__", "__radd__", "add_"), _added),
    **dict.fromkeys(("mul", "__mul__", "__imul__", "__rmul__", "mul_"), _scaled),
    **dict.fromkeys(("div", "__truediv__", "__itruediv__", "div_"), _divided),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked),
    "softmax": _softened,
}
"""What is done to scores; None of it where it can't be followed."""
