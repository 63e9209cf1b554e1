"""Declaring operators and looking at their calls. torch 2.11-2.13.

torch/_ops.py (OpOverload takes attributes), torch/_subclasses/fake_tensor.py, torch/utils/_python_dispatch.py,
torch/library.py (`Library._destroy`), torch/_library/custom_ops.py (OPDEFS, `_abstract_fn`), torch/_C
(`_dispatch_has_kernel_for_dispatch_key`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_DECLARATION = "_piecework_declaration"


def attach_declaration(overload: Any, declaration: object) -> None:
    """Keep `declaration` with torch's own object for an operator, for as long as torch keeps that."""
    setattr(overload, _DECLARATION, declaration)


def attached_declaration(target: object) -> Any:
    """Return what was attached to an operator (an overload, or its packet `torch.ops.ns.name`), or None."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", None)
    return getattr(target, _DECLARATION, None) if isinstance(target, torch._ops.OpOverload) else None


_QUALIFIED: Final = re.compile(r"([A-Za-z_]\w*)::([A-Za-z_]\w*)(?:\.(\w+))?", re.ASCII)


def find_overload(name: str) -> Any:
    """Return the operator "namespace::name" or "namespace::name.overload", or None where none is registered.

    Only operators are found: `torch.ops` has functions of its own too, `load_library` among them.
    """
    match = _QUALIFIED.fullmatch(name)
    if match is None:
        return None
    namespace, op, overload = match.groups()
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    found = getattr(packet, overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        return None
    # TorchScript alone has some more, such as aten::add of two whole numbers
    return found if torch._C._dispatch_has_kernel(found.name()) else None


def can_run_on_meta(overload: Any) -> bool:
    """Whether tensors on the meta device can stand for an operator's arguments, and nothing is computed for them."""
    name = overload.name()
    made_by_decorator = torch._library.custom_ops.OPDEFS.get(overload._schema.name)
    if made_by_decorator is not None:
        return made_by_decorator._abstract_fn is not None
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "Meta") or has(name, "CompositeImplicitAutograd")


def has_device_kernel(name: str, *, device: str) -> bool:
    """Whether the operator "namespace::name" is registered and has a kernel of its own for "cpu" or "cuda"."""
    return find_overload(name) is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


def cuda_graph_unsafe_tags() -> tuple[torch.Tag, ...]:
    """Return the tag that keeps an operator out of CUDA graphs, where this torch has it."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    return () if tag is None else (tag,)


def withdraw(library: torch.library.Library) -> None:
    """Take the operators of `library` out of torch's registry; their names are free again."""
    library._destroy()


def fake_results(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator's fake implementation on stand-ins of these arguments; sizes stay numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._pytree import tree_map_only

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(tensor.detach(), static_shapes=True)

    fake_args, fake_kwargs = tree_map_only(torch.Tensor, stand_in, (tuple(args), dict(kwargs)))
    with mode:
        return overload(*fake_args, **fake_kwargs)


GROUPED_PRODUCT: Final = "aten::_grouped_mm"
"""Products of rows of a matrix [T, K] with one each of several matrices [E, K, N]; group by group."""


def grouped_product_shape(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """Return a tensor like what that operator gives on a CPU, without values; in any type of elements.

    torch 2.11-2.13: torch/_meta_registrations.py checks for what the CUDA kernel takes, bfloat16 only. Raises
    NotImplementedError for other forms of the product, ValueError for what it doesn't take.
    """
    if a.dim() != 2 or b.dim() != 3 or offs is None or bias is not None:
        raise NotImplementedError("a grouped product of another form")
    if a.dtype is not b.dtype or a.shape[1] != b.shape[1] or offs.shape[0] != b.shape[0]:
        raise ValueError("a grouped product of matrices that don't go together")
    return torch.empty(a.shape[0], b.shape[2], dtype=out_dtype or a.dtype, device=a.device)


@contextmanager
def grouped_products_of_any_type() -> Iterator[None]:
    """Let fake tensors on CPUs go through `aten::_grouped_mm` in types other than bfloat16."""
    from torch._subclasses import fake_impls

    overload = torch.ops.aten._grouped_mm.default
    known: dict[Any, Any] = fake_impls.op_implementations_dict
    if overload in known:
        yield
        return

    def shape(mode: Any, _: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        if a.dtype is torch.bfloat16 or a.device.type != "cpu":
            return NotImplemented
        try:
            with mode:
                return grouped_product_shape(a, b, *args, **kwargs)
        except NotImplementedError:
            return NotImplemented

    known[overload] = shape
    try:
        yield
    finally:
        del known[overload]


def is_stand_in(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no data: on the meta device, or the fake tensor of a trace."""
    return tensor.is_meta or type(tensor).__name__ in {"FakeTensor", "FunctionalTensor"}


def computes_plainly() -> bool:
    """Whether an operator that is called now computes and nothing else: no mode, trace, transform or autocast.

    torch 2.11-2.13: torch/utils/_python_dispatch.py, torch/csrc/functorch/init.cpp, torch/jit/_trace.py,
    torch/csrc/autograd/init.cpp. Vmapped tensors have torch.Tensor's own type: the arguments don't tell.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._is_any_autocast_enabled()
    )


Handler = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


def intercept_calls(handler: Handler) -> AbstractContextManager[Any]:
    """Inside, every operator that is called runs as `handler(overload, args, kwargs)`, whose result it gives."""

    class Interception(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handler(func, args, kwargs or {})

    made: AbstractContextManager[Any] = Interception()  # type: ignore[no-untyped-call]
    return made
