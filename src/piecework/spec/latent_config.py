"""The part of config.json that is about latent attention and routed experts: DeepSeek-V2 and -V3. Needs no torch.

Besides, what may be chosen for such models: `mla` and `kv_cache_dtype`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from piecework.errors import UnsupportedModelError

LATENT_MODEL_TYPES: Final = ("deepseek_v2", "deepseek_v3")
MLA_MODES: Final = ("exposed", "opaque")
DEFAULT_MLA: Final = "exposed"
KV_CACHE_DTYPES: Final = ("auto", "fp8")
DEFAULT_KV_CACHE_DTYPE: Final = "auto"

# what transformers takes for a field that config.json leaves out
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "deepseek_v2": {
        "n_routed_experts": 64,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
    },
}
_SCORING: Final = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
_TOPK_METHODS: Final = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of a layer's latent attention.

    Attributes:
        kv_rank: length of the latent vector that is cached (L).
        rope_dim: length of the rotary key that is cached beside it (R).
        nope_dim: length of a head's query and key without position (N).
        value_dim: length of a head's value (V).
        query_rank: length of the compressed query, or None where queries aren't compressed.
    """

    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None

    @property
    def entry(self) -> int:
        """Numbers per token and layer in the KV cache."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class ExpertRouting:
    """How the tokens of a layer choose their experts, and how large those are.

    Attributes:
        num_experts, top_k: routed experts, and how many of them a token goes through.
        scoring: "softmax" over all experts, or "sigmoid" of each logit.
        num_groups, top_groups: experts come in groups, and a token chooses among those of its best groups.
        biased: groups are rated by the sum of their two best scores and experts chosen by score, both after a bias
            that is learnt for balance is added (DeepSeek-V3); else a group is as good as its best expert.
        normalized: whether a token's weights are divided by their sum.
        scale: what weights are multiplied with.
        intermediate: an expert's intermediate size.
        shared: the shared experts' intermediate size together.
        first_layer: the layers before it are dense.
    """

    num_experts: int
    top_k: int
    scoring: str
    num_groups: int
    top_groups: int
    biased: bool
    normalized: bool
    scale: float
    intermediate: int
    shared: int
    first_layer: int


def check_kv_cache_dtype(kv_cache_dtype: str, latent: LatentSizes | None, *, asked: str) -> None:
    """Raise UnsupportedModelError where a model of those sizes can't have such a KV cache.

    Args:
        kv_cache_dtype: one of KV_CACHE_DTYPES.
        latent: the model's, or None where it has no latent attention.
        asked: what the error says.
    """
    if kv_cache_dtype != DEFAULT_KV_CACHE_DTYPE and latent is None:
        raise UnsupportedModelError(
            asked=f"{asked} with a KV cache of {kv_cache_dtype!r}",
            found="a model without latent attention, whose keys and values are cached in its own type",
            try_=f'"{DEFAULT_KV_CACHE_DTYPE}", or a model of {" or ".join(LATENT_MODEL_TYPES)}',
        )


def latent_sizes(raw: Mapping[str, Any]) -> LatentSizes:
    """Return the sizes that a config.json gives; raises ValueError or TypeError for values that can't be."""
    rank = raw.get("q_lora_rank", 1536)
    sizes = LatentSizes(
        kv_rank=int(raw.get("kv_lora_rank", 512)),
        rope_dim=int(raw.get("qk_rope_head_dim", 64)),
        nope_dim=int(raw.get("qk_nope_head_dim", 128)),
        value_dim=int(raw.get("v_head_dim", 128)),
        query_rank=None if rank is None else int(rank),
    )
    if min(sizes.kv_rank, sizes.rope_dim, sizes.nope_dim, sizes.value_dim) < 1 or sizes.rope_dim % 2:
        raise ValueError(f"sizes of latent attention {sizes}")
    return sizes


def expert_routing(raw: Mapping[str, Any], model_type: str) -> ExpertRouting | None:
    """Return how tokens are routed, or None where all layers are dense.

    Raises ValueError or TypeError for values that can't be, and for ways of routing that aren't implemented.
    """
    fields: ChainMap[str, Any] = ChainMap(raw, _DEFAULTS[model_type])  # type: ignore[arg-type]
    first_layer = int(fields["first_k_dense_replace"] or 0)
    if first_layer >= int(fields["num_hidden_layers"]):
        return None
    method = fields["topk_method"]
    _require("topk_method", method, _TOPK_METHODS[model_type])
    _require("scoring_func", fields.get("scoring_func", _SCORING[model_type]), (_SCORING[model_type],))
    _require("moe_layer_freq", fields.get("moe_layer_freq", 1), (1,))
    _require("hidden_act", fields.get("hidden_act", "silu"), ("silu",))
    grouped = method != "greedy"
    routing = ExpertRouting(
        num_experts=int(fields["n_routed_experts"]),
        top_k=int(fields["num_experts_per_tok"]),
        scoring=_SCORING[model_type],
        num_groups=int(fields.get("n_group") or 1) if grouped else 1,
        top_groups=int(fields.get("topk_group") or 1) if grouped else 1,
        biased=model_type == "deepseek_v3",
        normalized=model_type == "deepseek_v3" and bool(fields["norm_topk_prob"]),
        scale=float(fields["routed_scaling_factor"]),
        intermediate=int(fields["moe_intermediate_size"]),
        shared=int(fields["moe_intermediate_size"]) * int(fields["n_shared_experts"]),
        first_layer=first_layer,
    )
    per_group, rest = divmod(routing.num_experts, routing.num_groups)
    if rest or not 1 <= routing.top_groups <= routing.num_groups or (routing.biased and per_group < 2):
        raise ValueError(f"{routing.num_experts} experts in {routing.num_groups} groups, {routing.top_groups} of them")
    if not 1 <= routing.top_k <= per_group * routing.top_groups:
        raise ValueError(f"{routing.top_k} experts per token of {per_group * routing.top_groups}")
    return routing


def _require(field: str, value: object, supported: tuple[object, ...]) -> None:
    if value not in supported:
        raise ValueError(f"{field} {value!r}, where {' or '.join(map(repr, supported))} is supported")
