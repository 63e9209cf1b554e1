"""What the plan executor calls for an opaque op: declared ones as plain functions, others through the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from piecework.errors import BundleError
from piecework.foundation.torch_private import TORCHS_NAMESPACES, find_overload, is_computation
from piecework.ops import recurrent_layers as _recurrent_layers  # noqa: F401
from piecework.ops.attention import ATTENTION_OP, attention_native
from piecework.ops.ir.opaque_op import declared_op
from piecework.ops.mla import attention as _mla  # noqa: F401  registers its operators, and those of ops/mla/operators.py
from piecework.ops.moe import experts as _moe_experts  # noqa: F401
from piecework.ops.rows import ROWS_OP, rows_view
from piecework.ops.states import causal_conv as _causal_conv  # noqa: F401  as the next ones, registers its operator
from piecework.ops.states import delta_rule as _delta_rule  # noqa: F401
from piecework.ops.states import mamba2_scan as _mamba2_scan  # noqa: F401
from piecework.ops.states import selective_scan as _selective_scan  # noqa: F401
from piecework.ops.texts import packed as _packed_texts  # noqa: F401  registers its operators

_DIRECT: Mapping[str, Callable[..., Any]] = {ATTENTION_OP: attention_native, ROWS_OP: rows_view}


def implementation(name: str) -> Callable[..., Any]:
    """Return the function for "namespace::name.overload".

    Raises BundleError where no such op is registered in this process.
    """
    qualified, _, overload = name.partition(".")
    if qualified in _DIRECT and overload in {"", "default"}:
        return _DIRECT[qualified]
    found: Callable[..., Any] = operator_of_plan(name)
    declared = declared_op(found)
    return found if declared is None else declared.function


def operator_of_plan(name: str) -> Any:
    """Return torch's object for an operator "namespace::name.overload" that is a step of a plan.

    Of torch's own namespaces only aten's operators can be steps, and none that reads files. Raises BundleError where no
    such operator is registered in this process.
    """
    found = find_overload(name)
    namespace, _, rest = name.partition("::")
    refused = namespace in TORCHS_NAMESPACES and (namespace != "aten" or not is_computation(rest))
    if found is None or refused:
        raise BundleError(
            asked=f"run a bundle that calls the opaque op {name.partition('.')[0]}",
            found="no step of a plan may call it" if refused else "no op of that name is registered in this process",
            try_="import the package that defines it before loading the bundle",
        )
    return found
