"""The one place that touches private torch API, a file per subject.

Each entry says what it is for, the torch versions it was tried with, and where upstream discusses it. Every entry has a
test in tests/unit/foundation/test_torch_private.py that fails when torch changes underneath it. Compiler-side imports
stand inside functions: a warm start imports this package and must not pay for Dynamo or Inductor.
"""

from piecework.foundation.torch_private.artifacts import (
    append_calls,
    bind_constants,
    called_operators,
    open_aoti_library,
    pack_linear_weight,
    read_calls,
)
from piecework.foundation.torch_private.custom_ops import (
    attach_declaration,
    attached_declaration,
    can_run_on_meta,
    computes_plainly,
    cuda_graph_unsafe_tags,
    fake_results,
    find_overload,
    intercept_calls,
    is_stand_in,
    withdraw,
)
from piecework.foundation.torch_private.expressions import expression_text
from piecework.foundation.torch_private.frame_sizes import holds, is_static_input, size_bounds
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
    register_reference_type,
)
from piecework.foundation.torch_private.operators import (
    TORCHS_NAMESPACES,
    Argument,
    Operator,
    arguments_of_call,
    call_arguments,
    function_module,
    is_computation,
    last_node,
    nodes_after,
    operator_arguments,
    operator_name,
    operator_of,
    parameter_position,
    parse_operator,
    single_overload,
    storage_key,
)
from piecework.foundation.torch_private.profiling import thread_wide_profiler
from piecework.foundation.torch_private.scheduled_kernels import OnKernels, watching_kernels
from piecework.foundation.torch_private.stock import stock_inductor
from piecework.foundation.torch_private.symbolic import Guard, SymbolicSession, size_oblivious
from piecework.foundation.torch_private.tracing import (
    Tracer,
    current_tracer,
    data_dependent_errors,
    functional,
    functionalized,
    not_functionalized,
    plain_tensors,
    real,
    run_and_record,
    trace,
)

__all__ = [
    "TORCHS_NAMESPACES",
    "Argument",
    "Guard",
    "OnKernels",
    "Operator",
    "ReferenceBase",
    "SymbolicSession",
    "Tracer",
    "aoti_interface_source",
    "append_calls",
    "arguments_of_call",
    "attach_declaration",
    "attached_declaration",
    "bind_constants",
    "call_arguments",
    "called_operators",
    "can_run_on_meta",
    "compile_aoti",
    "computes_plainly",
    "cuda_graph_unsafe_tags",
    "current_tracer",
    "data_dependent_errors",
    "expression_text",
    "fake_results",
    "find_overload",
    "function_module",
    "functional",
    "functionalized",
    "has_reference_types",
    "holds",
    "intercept_calls",
    "is_computation",
    "is_python_object",
    "is_stand_in",
    "is_static_input",
    "is_traced_object",
    "last_node",
    "nodes_after",
    "not_functionalized",
    "open_aoti_library",
    "operator_arguments",
    "operator_name",
    "operator_of",
    "pack_linear_weight",
    "parameter_position",
    "parse_operator",
    "plain_tensors",
    "read_calls",
    "real",
    "real_object",
    "register_reference_type",
    "run_and_record",
    "set_inductor_options",
    "single_overload",
    "size_bounds",
    "size_oblivious",
    "stock_inductor",
    "storage_key",
    "thread_wide_profiler",
    "trace",
    "warm_up_inductor",
    "watching_kernels",
    "withdraw",
]
