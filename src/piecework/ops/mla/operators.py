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
from piecework.ops.ir.values import flattened
from piecework.ops.mla import plain as mla_plain
from piecework.ops.mla.cache import entry_width
from piecework.ops.mla.core import ROTATED, Angles, LatentCores, NewLatents
from piecework.ops.mla.plain import Prompts
from piecework.ops.rows import rows
from piecework.ops.sequences import Sequences

MLA_WRITE_OP: Final = "piecework::mla_write"
MLA_DECODE_OP: Final = "piecework::mla_decode"
MLA_WRITE_DECODE_OP: Final = "piecework::mla_write_decode"
MLA_PREFILL_OP: Final = "piecework::mla_prefill"
PACKABLE: Final[Mapping[str, tuple[str, str]]] = {MLA_PREFILL_OP: ("kv_b_weight", "packed")}
"""Weights that an operator takes in blocks of columns as well (ops/packed.py), and the parameter that says so."""


@opaque_op(MLA_WRITE_OP, mutates=("latent_cache",))
@flattened
def mla_write(new: NewLatents) -> Tensor:
    """Norm the new tokens' latents, rotate their keys, and store both in the cache.

    Returns:
        [T, L + R], contiguous, dtype of `compressed`: what the cache holds now, latents as fp8 left them where it is
        uint8. Rotated pairs are halves there: all firsts, then all seconds.
    """
    return mla_plain.write(*new)


@mla_write.fake
@flattened
def _mla_write_fake(new: NewLatents) -> Tensor:
    _check_write(new, asked="mla_write")
    return new.compressed.new_empty(new.compressed.shape)


@opaque_op(MLA_DECODE_OP)
@flattened
def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    entry: Tensor | None,
    latent_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    angles: Angles = ROTATED,
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
        angles: of each query, [D or more, R / 2], as `mla_write` takes them; or none.

    Returns:
        [D, H, L], contiguous, dtype of the queries.
    """
    return mla_plain.decode(q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale, *angles)


@mla_decode.fake
@flattened
def _mla_decode_fake(
    q_latent: Tensor,
    q_pe: Tensor,
    entry: Tensor | None,
    latent_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    angles: Angles = ROTATED,
) -> Tensor:
    check_same("heads of q_latent and q_pe", q_latent.shape[1], q_pe.shape[1], asked="mla_decode")
    sizes = {"rank": q_latent.shape[2], "rope": q_pe.shape[2]}
    _check_cache("q_latent with q_pe", latent_cache, q_latent, **sizes, asked="mla_decode")
    mla_plain.check_angles(angles, rope=q_pe.shape[2], asked="mla_decode")
    return q_latent.new_empty(q_latent.shape)


@opaque_op(MLA_WRITE_DECODE_OP, mutates=("latent_cache",))
@flattened
def mla_write_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    turned: bool,  # noqa: FBT001  an operator's arguments come in order
    new: NewLatents,
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
        new: as `mla_write` takes it.
        block_tables: as `mla_decode` takes it; so are the others.
        seq_lens: the same.
        scale: the same.

    Returns:
        [T, H, L], contiguous, dtype of the queries.
    """
    return mla_plain.write_decode(q_latent, q_pe, turned, *new, block_tables, seq_lens, scale)


@mla_write_decode.fake
@flattened
def _mla_write_decode_fake(
    q_latent: Tensor,
    q_pe: Tensor,
    turned: bool,  # noqa: FBT001
    new: NewLatents,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    check_same("heads of q_latent and q_pe", q_latent.shape[1], q_pe.shape[1], asked="mla_write_decode")
    check_same("q_latent and norm_weight", q_latent.shape[2], new.norm_weight.shape[0], asked="mla_write_decode")
    _check_write(new, asked="mla_write_decode")
    return q_latent.new_empty(q_latent.shape)


@opaque_op(MLA_PREFILL_OP)
@flattened
def mla_prefill(
    prompts: Prompts,
    kv_b_weight: Tensor,
    latent_cache: Tensor,
    sequences: Sequences,
    scale: float,
    decode_out: Tensor | None = None,
    angles: Angles = ROTATED,
    packed: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    """Attend prompts' new tokens over keys and values of their own; rows of decode tokens are copied in.

    New tokens see each other causally. What a sequence has cached before them is expanded a few tokens at a time, and
    attention over each chunk is merged by log-sum-exp.

    Args:
        prompts: the new tokens; row D is the first prompt's first.
        kv_b_weight: [H * (N + V), L]; packed or not.
        latent_cache: [blocks, B, E]. Slots without a visible token may hold anything.
        sequences: prompts are sequences D … S - 1.
        scale: factor of the scores before the softmax.
        decode_out: [D, H * V], becomes the first D rows; None where D is 0.
        angles: of each query, [T, R / 2], as `mla_write` takes them; or none.
        packed: whether `kv_b_weight` is what `packed_linear` made of it (ops/packed.py).

    Returns:
        [T, H * V], contiguous, dtype of the queries.
    """
    rest = (scale, decode_out, *angles, packed)
    return mla_plain.prefill(*prompts, kv_b_weight, latent_cache, *sequences, *rest)


@mla_prefill.fake
@flattened
def _mla_prefill_fake(
    prompts: Prompts,
    kv_b_weight: Tensor,
    latent_cache: Tensor,
    sequences: Sequences,
    scale: float,
    decode_out: Tensor | None = None,
    angles: Angles = ROTATED,
    packed: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    q_nope, q_pe, kv, _ = prompts
    num_tokens, num_heads, nope = q_nope.shape
    check_same("heads of q_nope and q_pe", num_heads, q_pe.shape[1], asked="mla_prefill")
    check_same("kv and the rows of kv_b_weight", kv.shape[1], kv_b_weight.shape[0], asked="mla_prefill")
    sizes = {"rank": kv_b_weight.shape[1], "rope": q_pe.shape[2]}
    _check_cache("latents with q_pe", latent_cache, q_nope, **sizes, asked="mla_prefill")
    mla_plain.check_angles(angles, rope=q_pe.shape[2], asked="mla_prefill")
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


def _check_write(new: NewLatents, *, asked: str) -> None:
    rank, width = new.norm_weight.shape[0], new.compressed.shape[1]
    check_same("norm_weight and 2 * cos, against compressed", rank + 2 * new.cos.shape[1], width, asked=asked)
    _check_cache("compressed", new.latent_cache, new.compressed, rank=rank, rope=width - rank, asked=asked)


def _check_cache(what: str, latent_cache: Tensor, like: Tensor, *, rank: int, rope: int, asked: str) -> None:
    """Raise OpError where a cache isn't one of such entries, in the dtype of `like` or in fp8."""
    if latent_cache.dtype not in (like.dtype, torch.uint8):
        found = f"a latent_cache of {latent_cache.dtype} for tensors of {like.dtype}"
        raise OpError(asked=f"trace {asked}", found=found, try_="a cache of the same dtype, or of uint8 for fp8")
    wanted = entry_width(latent_cache.dtype, like.dtype, rank=rank, rope=rope)
    check_same(f"{what}, against latent_cache", wanted, latent_cache.shape[2], asked=asked)
