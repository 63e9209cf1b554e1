"""The one place that touches private torch API, a file per subject.

Each entry says what it is for, the torch versions it was tried with, and where upstream discusses it. Every entry has a
test in tests/unit/foundation/test_torch_private.py that fails when torch changes underneath it. Compiler-side imports
stand inside functions: a warm start imports this package and must not pay for Dynamo or Inductor.
"""

from piecework.foundation.torch_private.artifacts import bind_constants, open_aoti_library, pack_linear_weight
from piecework.foundation.torch_private.custom_ops import (
    attach_declaration,
    attached_declaration,
    cuda_graph_unsafe_tags,
    fake_function,
    fake_results,
    find_overload,
    intercept_calls,
    is_stand_in,
    withdraw,
)
from piecework.foundation.torch_private.frame_sizes import holds, size_bounds
from piecework.foundation.torch_private.inductor import (
    aoti_interface_source,
    compile_aoti,
    set_inductor_options,
    warm_up_inductor,
)
from piecework.foundation.torch_private.opaque import (
    ReferenceBase,
    has_reference_types,
    is_python_object,
    is_traced_object,
    real_object,
    reference_type_name,
    register_reference_type,
    stand_in,
)
from piecework.foundation.torch_private.operators import (
    TORCHS_NAMESPACES,
    Argument,
    Operator,
    arguments_of_call,
    call_arguments,
    function_name,
    last_node,
    nodes_after,
    operator_arguments,
    operator_name,
    operator_of,
    operator_returns,
    parse_operator,
    single_overload,
    storage_key,
)
from piecework.foundation.torch_private.standalone import (
    compile_standalone,
    inductor_settings,
    load_standalone,
    trusted_instructions,
)
from piecework.foundation.torch_private.symbolic import Guard, SymbolicSession, size_oblivious
from piecework.foundation.torch_private.tracing import (
    Tracer,
    current_tracer,
    data_dependent_errors,
    functionalized,
    is_bookkeeping,
    plain_tensors,
    trace,
)

__all__ = [
    "TORCHS_NAMESPACES",
    "Argument",
    "Guard",
    "Operator",
    "ReferenceBase",
    "SymbolicSession",
    "Tracer",
    "aoti_interface_source",
    "arguments_of_call",
    "attach_declaration",
    "attached_declaration",
    "bind_constants",
    "call_arguments",
    "compile_aoti",
    "compile_standalone",
    "cuda_graph_unsafe_tags",
    "current_tracer",
    "data_dependent_errors",
    "fake_function",
    "fake_results",
    "find_overload",
    "function_name",
    "functionalized",
    "has_reference_types",
    "holds",
    "inductor_settings",
    "intercept_calls",
    "is_bookkeeping",
    "is_python_object",
    "is_stand_in",
    "is_traced_object",
    "last_node",
    "load_standalone",
    "nodes_after",
    "open_aoti_library",
    "operator_arguments",
    "operator_name",
    "operator_of",
    "operator_returns",
    "pack_linear_weight",
    "parse_operator",
    "plain_tensors",
    "real_object",
    "reference_type_name",
    "register_reference_type",
    "set_inductor_options",
    "single_overload",
    "size_bounds",
    "size_oblivious",
    "stand_in",
    "storage_key",
    "trace",
    "trusted_instructions",
    "warm_up_inductor",
    "withdraw",
]
