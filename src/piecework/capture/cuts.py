"""Where a graph is cut: at every operator that is not torch's own, at attention, and at those that the caller names.

Compilers can look into torch's operators only. Any other one is a call of its own anyway, so it is a step of the plan,
where its constants (a layer's name, a window) are data and tell no pieces apart. Torch's own kernels for attention and
for experts are such calls too; between two of them lies what layers have in common. Ops of the IR stay inside: a
compile lowers them there (compiler/passes/lower.py). Where blocks have none of these, compiler/repeats.py finds where
they end.
"""

from __future__ import annotations

from typing import Final

import torch

from piecework.foundation.torch_private import TORCHS_NAMESPACES, operator_of
from piecework.ops.head_matmul import HEAD_MATMUL_OP
from piecework.ops.ir.op import ir_op
from piecework.ops.linear import LINEAR_OP
from piecework.ops.linear_quantized import LINEAR_QUANTIZED_OP

_INSIDE: Final = frozenset({LINEAR_OP, LINEAR_QUANTIZED_OP, HEAD_MATMUL_OP})
"""Operators of other namespaces that stay inside pieces."""

_KERNELS: Final = frozenset(
    f"aten::_{name}"
    for name in (
        "grouped_mm",
        "scaled_dot_product_flash_attention_for_cpu",
        "scaled_dot_product_flash_attention",
        "scaled_dot_product_efficient_attention",
        "scaled_dot_product_cudnn_attention",
        "scaled_dot_product_fused_attention_overrideable",
    )
)
"""Operators of torch's own that no compiler looks into: what `torch.nn.functional.scaled_dot_product_attention` becomes
where it isn't plain products and a softmax, and products of experts."""


def is_opaque(node: torch.fx.Node, opaque: frozenset[str]) -> bool:
    """Whether `node` calls an operator at which the graph is cut; `opaque` are those that the caller names."""
    operator = operator_of(node.target)
    return operator is not None and is_opaque_name(operator.name, opaque)


def is_opaque_name(name: str, opaque: frozenset[str]) -> bool:
    """Whether the graph is cut at the operator "namespace::name"."""
    if name in opaque or name in _KERNELS:
        return True
    return name not in _INSIDE and name.partition("::")[0] not in TORCHS_NAMESPACES and ir_op(name) is None
