"""Names of the forms that recipes bring weights into, at load, for what reads them (bundle/run/constants.py)."""

from __future__ import annotations

from typing import Final

MKLDNN_LINEAR: Final = "mkldnn_linear"
"""A linear layer's weight [out, in] in oneDNN's blocked layout."""

LINEAR_COLUMNS: Final = "linear_columns"
"""The same in blocks of columns, for code of ours (ops/packed.py)."""

HEAD_COLUMNS: Final = "head_columns"
"""Heads' matrices [H, K, W] in such blocks."""

OWN: Final = frozenset({LINEAR_COLUMNS, HEAD_COLUMNS})
"""Those that code of ours reads (providers/cpu_common/products.h), in pieces and in native kernels."""

PACKINGS: Final = OWN | {MKLDNN_LINEAR}
"""All of them."""
