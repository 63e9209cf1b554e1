"""Under which key a model's bundle is stored, and the facts that whoever asks for it expects. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from piecework.bundle.facts import Fact, config_fact, environment_facts, option_facts
from piecework.foundation.digests import JsonScalar, digest_json
from piecework.foundation.target import Target
from piecework.foundation.version import VERSION
from piecework.models.config import ModelConfig
from piecework.models.latent_config import DEFAULT_KV_CACHE_DTYPE, DEFAULT_MLA, check_kv_cache_dtype
from piecework.ops.ir.selection import ProviderOrder

DEFAULT_MAX_TOKENS = 2048
DEFAULT_OPTIONS: Mapping[str, JsonScalar] = {
    "backend": "aoti",
    "ranges": "",
    "pack_linear": None,
    "merge_linear": None,
    "passes_off": "",
    "device": "cpu",
    "providers": ProviderOrder().text(),
}


def expected_facts(
    config: ModelConfig,
    *,
    dtype: str,
    max_tokens: int,
    options: Mapping[str, JsonScalar] = DEFAULT_OPTIONS,
    mla: str = DEFAULT_MLA,
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE,
) -> tuple[Fact, ...]:
    """Return what a caller who wants this model compiled this way expects of a bundle.

    Args:
        config: the model's.
        dtype: type of weights and activations, such as "bfloat16".
        max_tokens: most tokens in one forward pass.
        options: `CompileOptions.facts()`.
        mla: "exposed" or "opaque"; it makes no difference to a model without latent attention.
        kv_cache_dtype: "auto", or "fp8" for a model with latent attention.

    Raises UnsupportedModelError where the model can't have such a KV cache.
    """
    check_kv_cache_dtype(kv_cache_dtype, config.latent, asked=f"{config.path}")
    asked = {"dtype": dtype, "max_tokens": max_tokens, **options}
    if config.latent is not None:
        asked |= {"mla": mla, "kv_cache_dtype": kv_cache_dtype}
    return (config_fact(config.raw), *option_facts(asked))


def given_bundle_facts(
    config: ModelConfig, *, providers: ProviderOrder | None, kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE
) -> tuple[Fact, ...]:
    """Return what is expected of a bundle that a caller names: its model, and what of its options is asked for.

    Args:
        config: the model's.
        providers: the order; None takes any.
        kv_cache_dtype: "auto" takes any.

    Raises UnsupportedModelError where the model can't have such a KV cache.
    """
    check_kv_cache_dtype(kv_cache_dtype, config.latent, asked=f"{config.path}")
    asked = {} if providers is None else {"providers": providers.text()}
    if kv_cache_dtype != DEFAULT_KV_CACHE_DTYPE:
        asked["kv_cache_dtype"] = kv_cache_dtype
    return (config_fact(config.raw), *option_facts(asked))


def bundle_key(expected: Sequence[Fact], *, target: Target) -> str:
    """Return the key for a bundle with the facts `expected` on this machine."""
    facts = sorted((*expected, *environment_facts(target=target)))
    return digest_json([VERSION, [f.to_json() for f in facts]])
