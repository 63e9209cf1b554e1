"""`piecework.compile`: any `nn.Module` that traces as one graph, from example arguments to a bundle."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piecework.bundle.bundle import Bundle, write_bundle
from piecework.bundle.run.structure import unflatten
from piecework.bundle.store.directory import DirectoryStore
from piecework.capture.request import CaptureRequest, Dim, TensorInput
from piecework.capture.structure import changed, flatten
from piecework.compiler.check.results import check_results
from piecework.compiler.driver import compile_request
from piecework.compiler.model import started_backend
from piecework.compiler.setup import CompileSetup, OnProgress, unheard
from piecework.errors import CaptureError
from piecework.foundation.environment import Environment, read_environment
from piecework.foundation.files import lasting_scratch, store_errors
from piecework.foundation.target import read_target
from piecework.foundation.torch_private import is_compiled_module, is_stand_in, operator_name
from piecework.spec.compile_options import CompileOptions

_LOG = logging.getLogger("piecework")


def compile(
    module: nn.Module,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, Dim] | None = None,
    opaque: Iterable[object] = (),
    states: Mapping[str, tuple[int | str, ...]] | None = None,
    out: str | Path | None = None,
    options: CompileOptions | None = None,
    on_progress: OnProgress = unheard,
    check: bool = False,
) -> Bundle:
    """Compile a module's forward into a bundle. Compiling happens in worker processes.

    Args:
        module: the module; it is not changed. Its forward is traced, and where its code asks whether a size is 1 it
            runs once, on copies (capture/general.py). Parameters may be on the meta device.
        example_args: positional arguments of its forward: tensors (only shape, dtype, stride and device are used),
            nested tuples, lists and dicts of them, numbers, strings, None.
        example_kwargs: keyword arguments, likewise.
        dynamic: dynamic sizes by name; `Dim.axes` says which axes of which arguments they are. With a single Dim
            without axes, it is axis 0 of every tensor argument. The first one is what `options.ranges` are about.
        opaque: operators of torch's own at which the graph is cut as well: "namespace::name" or an operator such as
            `torch.ops.ns.name`. At any other operator it is cut anyway.
        states: buffers that opaque ops read and write between calls, by name, with shapes that may name dynamic sizes.
        out: where to write the bundle (".pwb" for an archive); default: a directory that is removed when this process
            ends.
        options: see CompileOptions.
        on_progress: is told what is done.
        check: whether to run what was compiled beside the module, on random inputs at the ends of the ranges, before
            the bundle is written (compiler/check/results.py); how far apart they are is in its record's notes.

    Raises CaptureError, ShapeContractError, CompileError, CheckError, StoreError.

    Example:
        >>> import torch, piecework
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
        >>> eager = piecework.CompileOptions(backend=piecework.BackendName.EAGER)
        >>> sizes = {"rows": piecework.Dim(1, 64)}
        >>> bundle = piecework.compile(mlp, (torch.randn(3, 8),), dynamic=sizes, options=eager)
        >>> model = piecework.load(bundle, weights=mlp)
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(model(x), mlp(x), atol=1e-6)
        True
    """
    request, arguments = module_request(
        module, example_args, example_kwargs or {}, dynamic=dynamic or {}, opaque=opaque, states=states or {}
    )
    return _write(
        None if out is None else Path(out),
        request,
        arguments=arguments,
        options=options or CompileOptions(),
        environment=read_environment(),
        on_progress=on_progress,
        check=check,
    )


def _write(
    place: Path | None,
    request: CaptureRequest,
    *,
    arguments: Mapping[str, Any],
    options: CompileOptions,
    environment: Environment,
    on_progress: OnProgress,
    check: bool,
) -> Bundle:
    """Compile a request and write its bundle; `arguments` say how a caller's map to the graph's inputs."""
    store, target = DirectoryStore(environment.store_root), read_target()
    if place is None:
        with store_errors(f"write to the store {store.root}"):
            place = lasting_scratch(store.root / "scratch") / "bundle"
    with (
        store.scratch() as scratch,
        started_backend(
            options, scratch=scratch, environment=environment, target=target, device=request.device
        ) as backend,
    ):
        sealed = compile_request(
            request,
            CompileSetup(options, backend, store, target, on_progress=on_progress, overtake_s=environment.overtake_s),
            identity={"module": type(request.module).__qualname__},
            arguments=arguments,
            check=(lambda built: check_results(built, order=options.providers).lines()) if check else None,
        )
        for fallback in sealed.fallbacks:
            _LOG.warning(fallback)
        return write_bundle(place, sealed.content, extract_root=environment.store_root)


def module_request(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic: Mapping[str, Dim],
    opaque: Iterable[object],
    states: Mapping[str, tuple[int | str, ...]],
) -> tuple[CaptureRequest, dict[str, Any]]:
    """Return what to capture, and how a caller's arguments map to the graph's inputs."""
    _check_kinds(module, dynamic)
    given, parameters, defaults = _bind(module, args, kwargs)
    inputs: list[TensorInput] = []
    values: dict[str, torch.Tensor] = {}
    structures: list[tuple[str, Any]] = []
    for name, value in given.items():
        leaves, structure = flatten(value)
        structures.append((name, _shifted(structure, len(inputs))))
        for i, leaf in enumerate(leaves):
            label = name if len(leaves) == 1 else f"{name}.{i}"
            inputs.append(_tensor_input(label, leaf, argument=name, dynamic=dynamic))
            if not is_stand_in(leaf):
                values[label] = leaf
    _check_axes(dynamic, given)
    _check_states(states, module, dynamic)
    named = [i.name for i in inputs]
    star = next((n for n in parameters if n.startswith("*")), "")
    before = parameters[: parameters.index(star)] if star else parameters
    by_position = before[: len(args)]  # exported programs take them in no other way

    def call(target: nn.Module, values: Mapping[str, Any]) -> Any:
        leaves = [values[n] for n in named]
        made = {name: unflatten(structure, leaves) for name, structure in structures}
        positional = [made.pop(name) for name in by_position]
        positional += made.pop(star.removeprefix("*"), ())
        return target(*positional, **made)

    buffers = dict(module.named_buffers())
    devices = {leaf.device for leaf in inputs}
    if len(devices) > 1:
        raise CaptureError(
            asked="compile for one device", found=f"arguments on {sorted(devices)}", try_="put them on one device"
        )
    request = CaptureRequest(
        module=module,
        call=call,
        inputs=tuple(inputs),
        sizes=dict(dynamic),
        states={
            n: TensorInput(n, tuple(shape), str(buffers[n].dtype).removeprefix("torch.")) for n, shape in states.items()
        },
        opaque=frozenset(_operator_name(o) for o in opaque),
        device=next(iter(devices), "cpu"),
        values=values,
        notes=(*_training_notes(module), *_gradient_notes(values)),
        held=(),
    )
    return request, {"parameters": parameters, "given": structures, "defaults": defaults}


def _check_kinds(module: object, dynamic: Mapping[str, object]) -> None:
    """Raise CaptureError for arguments that are taken for others easily."""
    if not isinstance(module, nn.Module):
        raise CaptureError(
            asked="compile a module",
            found=f"a {type(module).__name__}",
            try_="a torch.nn.Module; a function can be the `forward` of one",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            asked="compile a module",
            found="a scripted one, whose code torch.jit runs",
            try_="the module that it was made of",
        )
    if is_compiled_module(module):
        raise CaptureError(
            asked="compile a module",
            found="one that torch.compile has wrapped already",
            try_="the module itself, `module._orig_mod`",
        )
    if not isinstance(dynamic, Mapping):
        raise CaptureError(
            asked="dynamic sizes",
            found=f"a {type(dynamic).__name__}",
            try_='a mapping of names to sizes: dynamic={"rows": piecework.Dim(1, 64)}',
        )
    for name, dim in dynamic.items():
        if not isinstance(dim, Dim):
            low, high = getattr(dim, "min", None), getattr(dim, "max", None)
            bounds = f"{low}, {high}" if isinstance(low, int) and isinstance(high, int) else "1, 64"
            raise CaptureError(
                asked=f"the dynamic size {name}",
                found=f"a {type(dim).__module__}.{type(dim).__name__}",
                try_=f"piecework.Dim({bounds}), which says where it is by `axes`",
            )


def _training_notes(module: nn.Module) -> tuple[str, ...]:
    """Say that a module in training mode is compiled as such, where that changes what it computes."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    found = {
        type(m).__name__ for m in module.modules() if m.training and isinstance(m, kinds) and getattr(m, "p", True)
    }
    if not found:
        return ()
    return (f"in training mode, which {' and '.join(sorted(found))} compute otherwise in: call .eval() first",)


def _gradient_notes(values: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Say that there are no gradients where example arguments ask for them."""
    asking = [name for name, value in values.items() if value.requires_grad]
    if not asking:
        return ()
    return (f"{', '.join(asking)} requires gradients: a loaded model is for inference, and its results have none",)


def _bind(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            asked=f"call {type(module).__name__}.forward with the example arguments",
            found=str(error),
            try_=f"its signature is {signature}",
        ) from error
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        else:
            given[name] = value
    plain = [
        str(p).partition(":")[0] if p.kind is inspect.Parameter.VAR_POSITIONAL else n
        for n, p in signature.parameters.items()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    defaults = {
        n: p.default
        for n, p in signature.parameters.items()
        if p.default is None or isinstance(p.default, (bool, int, float, str))
    }
    return given, plain, defaults


def _shifted(structure: Any, by: int) -> Any:
    """Return `structure` with its leaves counted from `by`."""
    return changed(structure, lambda end: {"leaf": end["leaf"] + by} if "leaf" in end else end)


def _tensor_input(label: str, tensor: torch.Tensor, *, argument: str, dynamic: Mapping[str, Dim]) -> TensorInput:
    shape: list[int | str] = list(tensor.shape)
    for name, dim in dynamic.items():
        for axis in _axes(name, dim, argument=argument, label=label, tensor=tensor, alone=len(dynamic) == 1):
            if not -tensor.dim() <= axis < tensor.dim():
                raise CaptureError(
                    asked=f"{name} as axis {axis} of {label}",
                    found=f"a tensor of {tensor.dim()} dimensions",
                    try_="name an axis that it has",
                )
            if not dim.min <= tensor.shape[axis] <= dim.max:
                raise CaptureError(
                    asked=f"{name} in {dim.min} to {dim.max}",
                    found=f"{label} has {tensor.shape[axis]} at axis {axis}",
                    try_="give an example inside the range",
                )
            shape[axis] = name
    dynamic_axes = [axis for axis, size in enumerate(shape) if isinstance(size, str)]
    keeps_strides = not dynamic_axes or not tensor.is_contiguous()
    if dynamic_axes and keeps_strides and dynamic_axes != [_outermost(tensor)]:
        raise CaptureError(
            asked=f"a dynamic size in {label}",
            found="an example that is not contiguous, whose strides depend on that size",
            try_="pass it contiguous",
        )
    return TensorInput(
        name=label,
        shape=tuple(shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        device=tensor.device.type if not tensor.is_meta else "cpu",
        stride=tuple(tensor.stride()) if keeps_strides else None,
    )


def _outermost(tensor: torch.Tensor) -> int:
    """Return the axis on whose size no stride depends: the batch of a tensor in channels-last layout."""
    return max(range(tensor.dim()), key=lambda axis: (tensor.stride(axis), -axis))


def _axes(name: str, dim: Dim, *, argument: str, label: str, tensor: torch.Tensor, alone: bool) -> tuple[int, ...]:
    if dim.axes is None:
        if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[0] == 1 < tensor.shape[1]:
            raise CaptureError(
                asked=f"the dynamic size {name} as the first axis of every argument, because it has no `axes`",
                found=f"{label} of shape {list(tensor.shape)}, which looks like one sequence of tokens",
                try_=f'Dim({dim.min}, {dim.max}, axes={{"{argument}": 1}}) for its length, or 0 for the batch',
            )
        if not alone:
            raise CaptureError(
                asked=f"the dynamic size {name}",
                found="several dynamic sizes, of which this one doesn't say where it is",
                try_=f'Dim({dim.min}, {dim.max}, axes={{"{argument}": 0}})',
            )
        return (0,) if tensor.dim() else ()
    found = dim.axes.get(label, dim.axes.get(argument, ()))
    return (found,) if isinstance(found, int) else tuple(found)


def _check_axes(dynamic: Mapping[str, Dim], given: Mapping[str, Any]) -> None:
    for name, dim in dynamic.items():
        if dim.axes is not None and all(axes == () for axes in dim.axes.values()):
            raise CaptureError(
                asked=f"the dynamic size {name}",
                found="no axis of any argument that has it",
                try_=f'Dim({dim.min}, {dim.max}, axes={{"{next(iter(given), "x")}": 0}})',
            )
        unknown = [a for a in dim.axes or () if a.split(".")[0] not in given]
        if unknown:
            raise CaptureError(
                asked=f"the dynamic size {name} in {unknown[0]}",
                found=f"the arguments {', '.join(given)}",
                try_="name one of those",
            )


def _check_states(states: Mapping[str, tuple[int | str, ...]], module: nn.Module, dynamic: Mapping[str, Dim]) -> None:
    buffers = dict(module.named_buffers())
    for name, shape in states.items():
        undeclared = [d for d in shape if isinstance(d, str) and d not in dynamic]
        if name not in buffers or undeclared:
            raise CaptureError(
                asked=f"the state {name} of shape {list(shape)}",
                found=f"no dynamic size {undeclared[0]!r}" if undeclared else "no buffer of that name",
                try_="declare it in `dynamic`" if undeclared else f"the buffers are {', '.join(buffers) or 'none'}",
            )


def _operator_name(operator: object) -> str:
    qualified: object = operator_name(operator) or getattr(operator, "_qualname", operator)
    if isinstance(qualified, str) and "::" in qualified:
        return qualified
    raise CaptureError(
        asked=f"cut the graph at {operator!r}",
        found="no operator",
        try_='pass "namespace::name" or torch.ops.namespace.name',
    )
