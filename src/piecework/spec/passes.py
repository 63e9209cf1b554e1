"""The passes' names, in the order in which they run; needs no torch."""

from __future__ import annotations

from typing import Final

ADD_RMS_NORM: Final = "add_rms_norm"
MERGE_LINEAR: Final = "merge_linear"

PASS_NAMES: Final = (
    "no_ops",
    "layer_norm",
    "rms_norm",
    "silu_mul",
    "gelu_mul",
    "rotary",
    "rotate_pairs",
    ADD_RMS_NORM,
    MERGE_LINEAR,
)
"""Those that can be turned off. Lowering comes after them, always: no backend knows the IR's ops."""
