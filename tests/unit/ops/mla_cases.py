"""Batches for multi-head latent attention, and what must come out: everything expanded, token by token, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from piecework.ops.mla import cache as mla_cache
from piecework.ops.mla.core import LatentWeights, NewLatents, Queries
from piecework.ops.sequences import Sequences
from tests.unit.ops.attention_cases import BATCHES as _BATCHES

BATCHES = {
    **_BATCHES,
    "a long prompt": [(0, 300)],
    "a long prefix": [(290, 10)],
    "chunks and decodes": [(299, 1), (1, 1), (0, 17), (100, 33), (16, 16), (260, 2)],
    "the same prefix": [(32, 7), (32, 7), (32, 1)],
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Sizes:
    """Of a layer: heads, dimensions of a head without and with rotation, of a value, and of a latent."""

    heads: int = 3
    nope: int = 8
    rope: int = 4
    value: int = 6
    rank: int = 10


@dataclass(frozen=True)
class MlaCase:
    """A batch by the names of `mla_attention`'s arguments, and all tokens of each sequence before their norm.

    `histories` holds compressed latents with keys [tokens, L + R], cos and sin [tokens, R / 2].
    """

    named: dict[str, Any]  # "turned" may be among them
    histories: list[tuple[Tensor, Tensor, Tensor]]

    @property
    def num_decode_tokens(self) -> int:
        return int(self.named["num_decode_tokens"])

    @property
    def num_prefill_tokens(self) -> int:
        return int(self.named["q_nope"].shape[0]) - self.num_decode_tokens

    @property
    def regime(self) -> str:
        if not self.num_prefill_tokens:
            return "decode"
        return "mixed" if self.num_decode_tokens else "prefill"

    @property
    def values(self) -> dict[str, Any]:
        """What `latent_attention` takes."""
        named = self.named

        def value(kind: Any) -> Any:
            return kind(**{name: named[name] for name in kind._fields if name in named})

        return {
            "queries": value(Queries),
            "new": value(NewLatents),
            "sequences": value(Sequences),
            "weights": value(LatentWeights),
            "scale": named["scale"],
            "num_prefill_tokens": self.num_prefill_tokens,
        }

    def twin(self) -> MlaCase:
        """Return the same with memory of its own."""
        return MlaCase({k: v.clone() if isinstance(v, Tensor) else v for k, v in self.named.items()}, self.histories)


def make_mla_case(
    sequences: list[tuple[int, int]],
    *,
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.float32,
    block_size: int = 4,
    stale: float = float("nan"),
    seed: int = 0,
    large: float = 1.0,
) -> MlaCase:
    """Build a batch from (tokens already cached, new tokens) per sequence; decode sequences first.

    Slots that hold no token hold `stale`; queries are `large` times as large.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads, nope, rope, value, rank = sizes.heads, sizes.nope, sizes.rope, sizes.value, sizes.rank
    sequences = sorted(sequences, key=lambda old_new: old_new[1] != 1)
    norm_weight, eps = (1 + randn(rank) / 4).to(dtype), 1e-6
    kv_b = (randn(heads * (nope + value), rank) / rank**0.5).to(dtype)
    w_uk, w_uv = kv_b.unflatten(0, (heads, -1)).split([nope, value], dim=1)
    width = max(-(-(old + new) // block_size) for old, new in sequences) + 1
    tables = (torch.randperm(len(sequences) * width, generator=generator) + 1).view(len(sequences), width)
    cache = torch.full((len(sequences) * width + 1, block_size, rank + rope), stale, dtype=dtype)
    slots, histories, fresh = [], [], []
    for (old, new), table in zip(sequences, tables, strict=True):
        positions = torch.arange(old + new)
        slot = table[positions // block_size] * block_size + positions % block_size
        angles = positions.unsqueeze(1) * 0.9 ** torch.arange(rope // 2)
        history = (randn(old + new, rank + rope).to(dtype), angles.cos() * 1.1, angles.sin() * 1.1)
        entries = reference_entry(*history, norm_weight=norm_weight, eps=eps)
        cache.view(-1, rank + rope)[slot[:old]] = entries[:old].to(dtype)
        slots.append(slot[old:])
        histories.append(history)
        fresh.append([part[old:] for part in history])
    compressed, cos, sin = (torch.cat(parts) for parts in zip(*fresh, strict=True))
    num_tokens = compressed.shape[0]
    query = (randn(num_tokens, heads, nope + rope) * large).to(dtype)  # split, so that halves are not dense
    num_new = torch.tensor([new for _, new in sequences])
    named = {
        "q_nope": query[..., :nope],
        "q_pe": query[..., nope:],
        "compressed": compressed,
        "norm_weight": norm_weight,
        "eps": eps,
        "cos": cos,
        "sin": sin,
        "latent_cache": cache,
        "slot_mapping": torch.cat(slots),
        "block_tables": tables,
        "seq_lens": torch.tensor([old + new for old, new in sequences]),
        "query_start": torch.cat([torch.zeros(1, dtype=torch.int64), num_new.cumsum(0)]),
        "num_decode_tokens": sum(new == 1 for _, new in sequences),
        "scale": (nope + rope) ** -0.5,
        "kv_b_weight": kv_b,
        "w_uk": w_uk.contiguous(),
        "w_uv": w_uv.transpose(1, 2).contiguous(),
    }
    return MlaCase(named, histories)


def in_fp8(case: MlaCase) -> MlaCase:
    """Return a case whose cache holds its entries in fp8, and NaN where it held NaN."""
    cache = case.named["latent_cache"]
    encoded = mla_cache.encode(cache.flatten(0, 1), case.named["norm_weight"].shape[0])
    return MlaCase({**case.named, "latent_cache": encoded.view(*cache.shape[:2], -1)}, case.histories)


def reference_entry(compressed: Tensor, cos: Tensor, sin: Tensor, *, norm_weight: Tensor, eps: float) -> Tensor:
    """Return what the cache must hold of tokens, [tokens, L + R], in float64."""
    rank = norm_weight.shape[0]
    latent, key = compressed.double().split([rank, compressed.shape[1] - rank], dim=-1)
    latent = latent / (latent.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
    turned = torch.complex(key[:, 0::2], key[:, 1::2]) * torch.complex(cos.double(), sin.double())
    return torch.cat([latent, turned.real, turned.imag], dim=-1)


def reference_cache(case: MlaCase) -> Tensor:
    """Return what the cache must hold after the call, in float64."""
    named = case.named
    cache = named["latent_cache"].double()
    starts = named["query_start"].tolist()
    for index, history in enumerate(case.histories):
        entries = reference_entry(*history, norm_weight=named["norm_weight"], eps=named["eps"])
        new = slice(starts[index], starts[index + 1])
        cache.view(-1, cache.shape[2])[named["slot_mapping"][new]] = entries[entries.shape[0] - new.stop + new.start :]
    return cache


def reference(case: MlaCase) -> Tensor:
    """Expand every token's key and value, and attend token by token, in float64: [T, H * V]."""
    named = case.named
    query = torch.cat([named["q_nope"], named["q_pe"]], dim=-1).double()
    heads, nope = named["q_nope"].shape[1:]
    starts, rank = named["query_start"].tolist(), named["norm_weight"].shape[0]
    made = []
    for index, history in enumerate(case.histories):
        entries = reference_entry(*history, norm_weight=named["norm_weight"], eps=named["eps"])
        entries = entries.to(named["compressed"].dtype).double()  # as the cache holds them
        kv = (entries[:, :rank] @ named["kv_b_weight"].double().t()).unflatten(1, (heads, -1))
        keys = torch.cat([kv[..., :nope], entries[:, None, rank:].expand(-1, heads, -1)], dim=-1)
        new = query[starts[index] : starts[index + 1]]
        for offset, row in enumerate(new):
            end = keys.shape[0] - new.shape[0] + offset + 1
            weights = (torch.einsum("hd,lhd->hl", row, keys[:end]) * named["scale"]).softmax(-1)
            made.append(torch.einsum("hl,lhv->hv", weights, kv[:end, :, nope:]).flatten())
    return torch.stack(made)


@st.composite
def drawn_mla_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)) -> MlaCase:
    """Draw a batch; what no token sees is NaN."""
    decodes = draw(st.lists(st.integers(0, 150), max_size=4))
    prefills = draw(st.lists(st.tuples(st.integers(0, 120), st.integers(2, 110)), max_size=3))
    sizes = Sizes(
        heads=draw(st.sampled_from([1, 2, 6, 9, 16, 17])),
        nope=draw(st.sampled_from([2, 8, 34, 128])),
        rope=draw(st.sampled_from([2, 8, 64])),
        value=draw(st.sampled_from([2, 16, 70, 128])),
        rank=draw(st.sampled_from([2, 16, 70, 512])),
    )
    return make_mla_case(
        [(old, 1) for old in decodes] + prefills or [(0, 1)],
        sizes=sizes,
        dtype=draw(st.sampled_from(dtypes)),
        block_size=draw(st.sampled_from([1, 3, 16, 32])),
        seed=draw(st.integers(0, 1000)),
    )
