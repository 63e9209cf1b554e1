"""`Sequences`: whose the tokens of a batch are, and where the cache has those that came before."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sequences(NamedTuple):
    """S sequences whose new tokens are grouped by sequence; those that decode, with one new token each, come first.

    Attributes:
        block_tables: [S, W] int64; row s lists the blocks of sequence s, padded with any valid block.
        seq_lens: [S] int64, tokens in the cache after this step, at least 1.
        query_start: [S + 1] int64, prefix sums of the new tokens per sequence.
        num_decode_tokens: how many of the first sequences decode; also how many of the first tokens are theirs.
    """

    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    num_decode_tokens: int
