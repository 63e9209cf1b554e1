"""`piecework::recurrent_layer`: torch's GRU and RNN layers as one operator, for sequences of any length.

Below autograd torch writes them out step by step, so that a graph would hold for one length only. (Its LSTM stays one
operator on CPUs.) Shape suffixes: T steps, B sequences, H hidden size, L layers, times 2 where they go both ways.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from piecework.ops.ir.opaque_op import opaque_op

RECURRENT_LAYER_OP: Final = "piecework::recurrent_layer"

_VF: Any = torch._VF
_KINDS: Final = (_VF.gru, _VF.rnn_tanh, _VF.rnn_relu)
"""By their numbers in the operator's arguments."""


@opaque_op(RECURRENT_LAYER_OP)
def recurrent_layer(
    x: Tensor,
    state: Tensor,
    weights: list[Tensor],
    kind: int,
    has_biases: bool,  # noqa: FBT001  operators take their arguments by place
    num_layers: int,
    bidirectional: bool,  # noqa: FBT001
    batch_first: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """Run a stack of recurrent layers, without dropout.

    Args:
        x: [T, B, ..], or [B, T, ..] with `batch_first`.
        state: [L, B, H], before the first step.
        weights: as torch's modules have them in order.
        kind: 0 for GRU, 1 for RNN with tanh, 2 with relu.
        has_biases: whether biases are among the weights.
        num_layers: how many.
        bidirectional: whether each goes both ways.
        batch_first: how x and the result lie.

    Returns:
        The last layer's hidden states, x's shape with H (times 2) at the end, and those of all after the last step.
    """
    made, last = _KINDS[kind](x, state, weights, has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    return made.contiguous(), last.contiguous()


@recurrent_layer.fake
def _recurrent_layer_fake(
    x: Tensor,
    state: Tensor,
    weights: list[Tensor],
    kind: int,
    has_biases: bool,  # noqa: FBT001
    num_layers: int,
    bidirectional: bool,  # noqa: FBT001
    batch_first: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    width = state.shape[2] * (2 if bidirectional else 1)
    return x.new_empty((*x.shape[:2], width)), state.new_empty(state.shape)


class KeepRecurrent(TorchFunctionMode):
    """While active, GRU and RNN layers over a dynamic length call `piecework::recurrent_layer`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Redirect those layers, leave everything else alone: packed sequences, and dropout in training."""
        if func in _KINDS and not kwargs and len(args) == 9 and isinstance(args[2], (list, tuple)):
            x, state, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first = args
            if not isinstance(x.shape[1 if batch_first else 0], int) and not (dropout and training):
                return recurrent_layer(
                    x, state, list(weights), _KINDS.index(func), has_biases, num_layers, bidirectional, batch_first
                )
        return func(*args, **(kwargs or {}))
