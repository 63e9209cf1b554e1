"""Operators of multi-head latent attention: `mla_write`, `mla_decode`, `mla_prefill`, and two of these in one.

They are what `latent_attention` (ops/mla/core.py) is traced with, so that projections, matrix products and
slices between them stay visible. `mla_attention` (ops/mla/attention.py) is the same description, run within one
operator. What they mean is written in plain torch, in `ops/mla/plain.py`; on the CPU a bundle may have kernels for them
(providers/cpu_mla).

The cache [blocks, B, E] holds, per token, the normed latent and the rotated key: E is L + R in a cache of the model's
type; in one of uint8, latents are fp8 and E is the bytes of an `Fp8Entry` (ops/mla/cache.py). Reading is ordered after
writing by data: `mla_write` returns what the cache then holds, and the others take it.

Shape suffixes as in `ops/mla/core.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from piecework.errors import OpError
from piecework.ops.head_matmul import head_matmul
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.mla import plain as mla_plain
from piecework.ops.mla.cache import entry_width
from piecework.ops.mla.core import LatentCores
from piecework.ops.rows import rows

MLA_WRITE_OP: Final = "piecework::mla_write"
MLA_DECODE_OP: Final = "piecework::mla_decode"
MLA_WRITE_DECODE_OP: Final = "piecework::mla_write_decode"
MLA_PREFILL_OP: Final = "piecework::mla_prefill"
PACKABLE: Final[Mapping[str, tuple[str, str]]] = {MLA_PREFILL_OP: ("kv_b_weight", "packed")}
"""Weights that an operator takes in blocks of columns as well (ops/packed.py), and the parameter that says so."""


@opaque_op(MLA_WRITE_OP, mutates=("latent_cache",))
def mla_write(
    compressed: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Norm the new tokens' latents, rotate their keys, and store both in the cache.

    Args:
        compressed: [T, L + R], float32 | bfloat16 | float16; the last R are pairs (2i, 2i + 1) to rotate.
        norm_weight: [L], of the RMS norm, which is computed in float32, rounded, and then multiplied with this.
        eps: of the norm.
        cos: [T, R / 2], of each token's angles, with a model's attention scaling; float32 or the dtype of `compressed`.
        sin: [T, R / 2].
        latent_cache: [blocks, B, E], of the dtype of `compressed` or uint8.
        slot_mapping: [T] int64, block * B + offset of each new token.

    Returns:
        [T, L + R], contiguous, dtype of `compressed`: what the cache holds now, latents as fp8 left them where it is
        uint8. Rotated pairs are halves there: all firsts, then all seconds.
    """
    return mla_plain.write(compressed, norm_weight, eps, cos, sin, latent_cache, slot_mapping)


@mla_write.fake
def _mla_write_fake(
    compressed: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    _check_write(compressed, norm_weight, cos, latent_cache, asked="mla_write")
    return compressed.new_empty(compressed.shape)


@opaque_op(MLA_DECODE_OP)
def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    entry: Tensor | None,
    latent_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Attend one new token of each of the first D sequences over its cached latents, which all heads share.

    score = (q_latent · latent + q_pe · key) * scale; the result is the weighted sum of latents.

    Args:
        q_latent: [D, H, L], float32 | bfloat16 | float16, any strides; D may be 0.
        q_pe: [D or more, H, R], any strides; the first D rows are used. Rotated as `mla_write` leaves
            keys, or, where angles are given, pairs (2i, 2i + 1) yet to be rotated.
        entry: what `mla_write` returned, which says that the cache holds the new tokens; or None.
        latent_cache: [blocks, B, E], as `mla_write` takes it. Slots without a visible token may hold anything.
        block_tables: [D or more, W] int64.
        seq_lens: [D or more] int64, tokens in the cache, at least 1.
        scale: factor of the scores before the softmax.
        cos: [D or more, R / 2], of each query's angles, as `mla_write` takes them; or None.
        sin: the same.

    Returns:
        [D, H, L], contiguous, dtype of the queries.
    """
    return mla_plain.decode(q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale, cos, sin)


@mla_decode.fake
def _mla_decode_fake(
    q_latent: Tensor,
    q_pe: Tensor,
    entry: Tensor | None,
    latent_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    check_same("heads of q_latent and q_pe", q_latent.shape[1], q_pe.shape[1], asked="mla_decode")
    sizes = {"rank": q_latent.shape[2], "rope": q_pe.shape[2]}
    _check_cache("q_latent with q_pe", latent_cache, q_latent, **sizes, asked="mla_decode")
    mla_plain.check_angles(cos, sin, rope=q_pe.shape[2], asked="mla_decode")
    return q_latent.new_empty(q_latent.shape)


@opaque_op(MLA_WRITE_DECODE_OP, mutates=("latent_cache",))
def mla_write_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    turned: bool,  # noqa: FBT001  an operator's arguments come in order
    compressed: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Do what `mla_write` and then `mla_decode` do, where every sequence has one new token: T = S = D.

    Args:
        q_latent: as `mla_decode` takes it.
        q_pe: [T, H, R], any strides but the last; rotated as `mla_decode` takes it, or pairs (2i, 2i + 1) yet to be
            rotated, by the angles of the new keys.
        turned: which of the two.
        compressed: this and the others are as `mla_write` and `mla_decode` take them.

    Returns:
        [T, H, L], contiguous, dtype of the queries.
    """
    written = (compressed, norm_weight, eps, cos, sin, latent_cache, slot_mapping)
    return mla_plain.write_decode(q_latent, q_pe, turned, *written, block_tables, seq_lens, scale)


@mla_write_decode.fake
def _mla_write_decode_fake(
    q_latent: Tensor,
    q_pe: Tensor,
    turned: bool,  # noqa: FBT001
    compressed: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    check_same("heads of q_latent and q_pe", q_latent.shape[1], q_pe.shape[1], asked="mla_write_decode")
    check_same("q_latent and norm_weight", q_latent.shape[2], norm_weight.shape[0], asked="mla_write_decode")
    _check_write(compressed, norm_weight, cos, latent_cache, asked="mla_write_decode")
    return q_latent.new_empty(q_latent.shape)


@opaque_op(MLA_PREFILL_OP)
def mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv: Tensor,
    entry: Tensor,
    kv_b_weight: Tensor,
    latent_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_decode_tokens: int,
    scale: float,
    decode_out: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    packed: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    """Attend prompts' new tokens over keys and values of their own; rows of decode tokens are copied in.

    New tokens see each other causally. What a sequence has cached before them is expanded a few tokens at a time, and
    attention over each chunk is merged by log-sum-exp.

    Args:
        q_nope: [T, H, N], float32 | bfloat16 | float16, any strides; row D is the first prompt's first.
        q_pe: [T, H, R], any strides; rotated as `mla_write` leaves keys, or, where angles are given, pairs (2i, 2i + 1)
            yet to be rotated.
        kv: [P, H * (N + V)], the prompts' new latents expanded by `kv_b_weight`.
        entry: [T, L + R], what `mla_write` returned.
        kv_b_weight: [H * (N + V), L]; packed or not.
        latent_cache: [blocks, B, E]. Slots without a visible token may hold anything.
        block_tables: [S, W] int64.
        seq_lens: [S] int64, tokens in the cache after this step.
        query_start: [S + 1] int64, prefix sums of the new tokens per sequence.
        num_decode_tokens: D; prompts are sequences D … S - 1.
        scale: factor of the scores before the softmax.
        decode_out: [D, H * V], becomes the first D rows; None where D is 0.
        cos: [T, R / 2], of each query's angles, as `mla_write` takes them; or None.
        sin: the same.
        packed: whether `kv_b_weight` is what `packed_linear` made of it (ops/packed.py).

    Returns:
        [T, H * V], contiguous, dtype of the queries.
    """
    return mla_plain.prefill(
        q_nope,
        q_pe,
        kv,
        entry,
        kv_b_weight,
        latent_cache,
        block_tables,
        seq_lens,
        query_start,
        num_decode_tokens,
        scale,
        decode_out,
        cos,
        sin,
        packed,
    )


@mla_prefill.fake
def _mla_prefill_fake(
    q_nope: Tensor,
    q_pe: Tensor,
    kv: Tensor,
    entry: Tensor,
    kv_b_weight: Tensor,
    latent_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_decode_tokens: int,
    scale: float,
    decode_out: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    packed: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    num_tokens, num_heads, nope = q_nope.shape
    check_same("heads of q_nope and q_pe", num_heads, q_pe.shape[1], asked="mla_prefill")
    check_same("kv and the rows of kv_b_weight", kv.shape[1], kv_b_weight.shape[0], asked="mla_prefill")
    sizes = {"rank": kv_b_weight.shape[1], "rope": q_pe.shape[2]}
    _check_cache("latents with q_pe", latent_cache, q_nope, **sizes, asked="mla_prefill")
    mla_plain.check_angles(cos, sin, rope=q_pe.shape[2], asked="mla_prefill")
    return q_nope.new_empty(num_tokens, kv_b_weight.shape[0] - num_heads * nope)


def row_view(x: Tensor, begin: int, count: int) -> Tensor:
    """Return rows begin … begin + count - 1 of x as a view, which only operators' results may not be."""
    return x.narrow(0, begin, count)


TRACED: Final = LatentCores(mla_write, mla_decode, mla_write_decode, mla_prefill, rows, head_matmul)
"""Operators, which a trace keeps apart."""

PLAIN: Final = LatentCores(mla_plain.write, mla_plain.decode, mla_plain.write_decode, mla_plain.prefill, row_view)
"""What they mean, for use within one operator."""


def check_same(what: str, found: int, wanted: int, *, asked: str) -> None:
    """Raise OpError where two sizes, which a trace knows, differ."""
    if found != wanted:
        raise OpError(asked=f"trace {asked}", found=f"{what}: sizes {found} and {wanted}", try_="tensors of one layer")


def _check_write(compressed: Tensor, norm_weight: Tensor, cos: Tensor, latent_cache: Tensor, *, asked: str) -> None:
    rank, width = norm_weight.shape[0], compressed.shape[1]
    check_same("norm_weight and 2 * cos, against compressed", rank + 2 * cos.shape[1], width, asked=asked)
    _check_cache("compressed", latent_cache, compressed, rank=rank, rope=width - rank, asked=asked)


def _check_cache(what: str, latent_cache: Tensor, like: Tensor, *, rank: int, rope: int, asked: str) -> None:
    """Raise OpError where a cache isn't one of such entries, in the dtype of `like` or in fp8."""
    if latent_cache.dtype not in (like.dtype, torch.uint8):
        found = f"a latent_cache of {latent_cache.dtype} for tensors of {like.dtype}"
        raise OpError(asked=f"trace {asked}", found=found, try_="a cache of the same dtype, or of uint8 for fp8")
    wanted = entry_width(latent_cache.dtype, like.dtype, rank=rank, rope=rope)
    check_same(f"{what}, against latent_cache", wanted, latent_cache.shape[2], asked=asked)
