"""Rotary embeddings whose frequencies transformers changes with the longest sequence of a call: they are fixed here.

What a sequence gets must not depend on which others are in its batch, and cached keys keep the frequencies that they
were written with. So frequencies are those for sequences as long as the model's longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIXED: Final = "default"


def fixed_frequencies(module: nn.Module, *, longest: int) -> tuple[str, ...]:
    """Fix the frequencies of a model's rotary embeddings; return a note for each kind that was not fixed before.

    LongRoPE (arXiv:2402.13753) has a set of factors for sequences beyond the length that the model was trained with
    first, and "dynamic" scales with a sequence's length beyond `longest`, which no sequence is.

    Args:
        module: of transformers.
        longest: the model's longest sequence, in tokens.
    """
    notes: list[str] = []
    for part in module.modules():
        kinds = vars(part).get("rope_type")
        if isinstance(kinds, str):
            part.rope_type = _fix(part, kinds, longest, notes, layer_type=None)  # type: ignore[assignment]
        elif isinstance(kinds, Mapping):
            fixed = {layer: _fix(part, kind, longest, notes, layer_type=layer) for layer, kind in kinds.items()}
            part.rope_type = fixed  # type: ignore[assignment]
    return tuple(dict.fromkeys(notes))


def _fix(part: Any, kind: str, longest: int, notes: list[str], *, layer_type: str | None) -> str:
    if "dynamic" not in kind and kind != "longrope":
        return kind
    if kind == "longrope":
        which = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](part.config, torch.device("cpu"), seq_len=longest, **which)
        prefix = "" if layer_type is None else f"{layer_type}_"
        part.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
        setattr(part, f"{prefix}attention_scaling", scaling)
    notes.append(f"rotary frequencies of type {kind!r} are those of sequences of {longest} tokens, for all")
    return _FIXED
